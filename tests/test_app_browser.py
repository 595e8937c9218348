"""The page in a real browser, wide and narrow: a loop on the map selects cells, and the tabs answer about them."""

import shutil
import threading

import anndata
import pytest

from scmmgpt import app, synthetic


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
TIMEOUT = 120_000  # milliseconds, on a busy machine


@pytest.fixture(scope="module")
def address():
    """The page of a tiny checkpoint, served on a free port."""
    gradio = pytest.importorskip("gradio", reason="the page needs gradio, which the extra `app` installs")
    page = app.build(synthetic.fitted_pipeline())
    _, url, _ = page.launch(
        server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, theme=gradio.themes.Default(**app.FONTS)
    )
    yield url
    page.close()


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed (extra `dev`)")
    if CHROMIUM is None:
        pytest.skip("There is no Chromium here; Debian's package is `chromium`")
    assert threading.current_thread() is threading.main_thread()
    with playwright.sync_playwright() as started:
        yield started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])


@pytest.fixture(params=[(1280, 900), (390, 844)], ids=["wide", "narrow"])
def page(request, browser, address):
    width, height = request.param
    page = browser.new_page(viewport={"width": width, "height": height})
    page.set_default_timeout(TIMEOUT)
    page.errors = []
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.asked = []
    page.on("request", lambda asked: page.asked.append(asked.url))
    page.goto(address)
    yield page
    assert page.errors == []
    assert all(url.startswith((address, "data:", "blob:")) for url in page.asked), page.asked  # nothing calls home
    page.close()


def test_cells_are_opened_annotated_selected_explained_and_saved(page, tmp_path):
    cells = synthetic.synthetic_adata()
    cells.write_h5ad(tmp_path / "cells.h5ad")
    page.locator("input[type=file]").first.set_input_files(tmp_path / "cells.h5ad")
    page.get_by_text(f"{cells.n_obs} cells").first.wait_for()
    page.get_by_role("button", name="Annotate").click()
    page.get_by_text("Colour: scmmgpt_cell_type").wait_for()

    page.locator("canvas").scroll_into_view_if_needed()
    box = page.locator("canvas").bounding_box()
    left, top, right, bottom = box["x"] + 1, box["y"] + 1, box["x"] + box["width"] - 1, box["y"] + box["height"] - 1
    page.mouse.move(left, top)
    page.mouse.down()
    for x, y in ((right, top), (right, bottom), (left, bottom)):
        page.mouse.move(x, y, steps=3)
    page.mouse.up()
    page.get_by_text(f"{cells.n_obs} cells selected: ").wait_for()

    tab = page.get_by_role("tab", name="Selected")
    if not tab.is_visible():  # a narrow screen has no room for all tabs
        page.locator(".overflow-menu > button").click()
        tab = page.locator(".overflow-dropdown button", has_text="Selected")
    tab.click()
    page.get_by_role("button", name="Show the evidence").click()
    page.get_by_text("CD19").locator("visible=true").first.wait_for()

    page.get_by_role("button", name="Save the cells").click()
    with page.expect_download() as download:
        page.locator("a[href*=cells_scmmgpt]").first.click()
    saved = anndata.read_h5ad(download.value.path())
    assert saved.obs_names.tolist() == cells.obs_names.tolist()
    assert "scmmgpt_cell_type" in saved.obs


def test_a_file_without_cells_is_refused_in_words(page, tmp_path):
    (tmp_path / "cells.csv").write_text("nothing")
    page.locator("input[type=file]").first.set_input_files(tmp_path / "cells.csv")
    page.locator(".toast-body").first.wait_for()
    assert "cells.csv" in page.locator(".toast-body").first.inner_text()
