"""The page in a real browser, wide and narrow: a loop on the map selects cells, and the tabs answer about them."""

import shutil
import threading

import anndata
import numpy as np
import pytest

from scmmgpt import app, synthetic
from scmmgpt.commands import page_session


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
TIMEOUT = 120_000  # milliseconds, on a busy machine
MOST_BYTES = 2**20  # of a file, on this page


@pytest.fixture(scope="module")
def address():
    """The page of a tiny checkpoint, served on a free port."""
    pytest.importorskip("gradio", reason="the page needs gradio, which the extra `app` installs")
    page = app.build(synthetic.fitted_pipeline())
    yield app.launch(page, "127.0.0.1", max_size=MOST_BYTES)
    page.close()


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed (extra `dev`)")
    if CHROMIUM is None:
        pytest.skip("There is no Chromium here; Debian's package is `chromium`")
    assert threading.current_thread() is threading.main_thread()
    with playwright.sync_playwright() as started:
        yield started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])


def open_page(browser, address, width=1280, height=900):
    """A page in a context of its own, as of another user."""
    page = browser.new_context(viewport={"width": width, "height": height}).new_page()
    page.set_default_timeout(TIMEOUT)
    page.errors, page.asked = [], []
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.on("request", lambda asked: page.asked.append(asked.url))
    page.goto(address)
    return page


def close_page(page, address):
    assert page.errors == []
    assert all(url.startswith((address, "data:", "blob:")) for url in page.asked), page.asked  # nothing calls home
    page.context.close()


@pytest.fixture(params=[(1280, 900), (390, 844)], ids=["wide", "narrow"])
def page(request, browser, address):
    page = open_page(browser, address, *request.param)
    yield page
    close_page(page, address)


def blood_cells(n=60):
    """Cells with a map of their own, since a computed one takes seconds."""
    cells = synthetic.synthetic_adata(n)
    cells.obsm["X_umap"] = np.random.default_rng(0).normal(size=(n, 2)).astype(np.float32)
    return cells


def upload(page, path):
    page.locator("input[type=file]").first.set_input_files(path)


def show_tab(page, name):
    page.get_by_role("tab", name=name).click()


def select_all(page):
    """Draw a loop around the whole map."""
    page.locator("canvas").scroll_into_view_if_needed()
    box = page.locator("canvas").bounding_box()
    left, top, right, bottom = box["x"] + 1, box["y"] + 1, box["x"] + box["width"] - 1, box["y"] + box["height"] - 1
    page.mouse.move(left, top)
    page.mouse.down()
    for x, y in ((right, top), (right, bottom), (left, bottom)):
        page.mouse.move(x, y, steps=3)
    page.mouse.up()


def test_cells_are_opened_annotated_found_selected_explained_asked_about_generated_and_saved(page, tmp_path):
    cells = blood_cells()
    cells.write_h5ad(tmp_path / "cells.h5ad")
    upload(page, tmp_path / "cells.h5ad")
    page.get_by_text(f"{cells.n_obs} cells").first.wait_for()
    page.get_by_role("button", name="Annotate").click()
    page.get_by_text("Colour: cell type (scMMGPT)").wait_for()
    select_all(page)
    page.get_by_text(f"{cells.n_obs} cells selected: ").wait_for()

    show_tab(page, "Selected")
    page.get_by_role("button", name="Why these types?").click()
    page.get_by_text("CD19").locator("visible=true").first.wait_for()
    page.get_by_role("button", name="Describe the cells").click()
    page.get_by_text("A B cell from blood, shown by").locator("visible=true").first.wait_for()

    show_tab(page, "Ask")
    page.get_by_label("Question").locator("visible=true").fill("Which types are here?")
    page.get_by_role("button", name="Ask", exact=True).click()
    page.get_by_text(f"Labels of the {cells.n_obs} cells: ").wait_for()

    show_tab(page, "Search")
    page.get_by_role("button", name="Search", exact=True).click()
    page.locator(".toast-body", has_text="The text to search for is empty").wait_for()
    page.get_by_label("Which cells are wanted?").fill("a B cell")
    page.get_by_role("button", name="Search", exact=True).click()
    page.get_by_text("Colour: match with “a B cell”").wait_for()

    show_tab(page, "Generate")
    page.get_by_label("Description of the new cells").fill("A B cell from blood.")
    page.get_by_role("button", name="Generate", exact=True).click()
    page.locator("a[href*=generated]").first.wait_for()

    page.get_by_role("button", name="Save the cells").click()
    with page.expect_download() as download:
        page.locator("a[href*=cells_scmmgpt]").first.click()
    saved = anndata.read_h5ad(download.value.path())
    assert saved.obs_names.tolist() == cells.obs_names.tolist()
    assert {"scmmgpt_cell_type", "scmmgpt_search", "scmmgpt_description"} <= set(saved.obs)


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_all_tabs_are_in_view_on_any_screen(browser, address, width):
    page = open_page(browser, address, width)
    page.get_by_role("tab", name="Generate").wait_for()
    tabs = page.get_by_role("tab")
    assert tabs.all_inner_texts() == ["Annotate", "Search", "Selected", "Ask", "Generate"]
    boxes = [tab.bounding_box() for tab in tabs.all()]
    assert all(0 <= box["x"] and box["x"] + box["width"] <= width for box in boxes), boxes
    if width >= 390:
        assert len({box["y"] for box in boxes}) == 1  # one line
    assert page.evaluate("document.documentElement.scrollWidth") <= width  # nothing to scroll sideways
    close_page(page, address)


def test_a_type_is_selected_by_keyboard_and_stays_selected_in_another_colour(page, tmp_path):
    cells = blood_cells()
    cells.write_h5ad(tmp_path / "cells.h5ad")
    upload(page, tmp_path / "cells.h5ad")
    page.get_by_role("button", name="B cell (15)").focus()
    page.keyboard.press("Enter")
    page.get_by_text("15 cells selected: B cell 15.").wait_for()
    page.locator("button[aria-pressed=true]", has_text="B cell (15)").wait_for()
    page.get_by_role("combobox", name="Colour of the cells").click()
    page.get_by_role("option", name="donor_id").click()
    page.get_by_text("15 cells selected: donor-").wait_for()
    page.get_by_role("combobox", name="Colour of the cells").click()
    page.get_by_role("option", name="cell_type", exact=True).click()
    page.locator("button[aria-pressed=true]", has_text="B cell (15)").click()
    page.get_by_text(page_session.NO_SELECTION).wait_for()


def test_who_passes_a_dropdown_by_keyboard_leaves_no_list_over_the_map(page, tmp_path):
    blood_cells().write_h5ad(tmp_path / "cells.h5ad")
    upload(page, tmp_path / "cells.h5ad")
    page.get_by_role("button", name="natural killer cell (15)").focus()
    page.keyboard.press("Tab")
    colours = page.get_by_role("combobox", name="Colour of the cells")
    assert colours.evaluate("dropdown => dropdown === document.activeElement")
    page.get_by_role("option", name="donor_id").wait_for()
    page.keyboard.press("Tab")
    page.get_by_role("option").first.wait_for(state="detached")
    page.keyboard.press("Tab")
    assert not page.get_by_role("option").count()
    colours.focus()  # the keys of the list work as before
    page.keyboard.type("donor")
    page.get_by_role("option", name="tissue", exact=True).wait_for(state="detached")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    page.get_by_text("Colour: donor_id.").wait_for()


COLOURED = """() => { const canvas = document.querySelector("canvas");
    const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
    let n = 0;
    for (let i = 3; i < data.length; i += 4) n += data[i] > 128;  // of shadows it is 20
    return n; }"""


def test_a_search_with_a_selection_shows_the_match_of_the_other_cells(page, tmp_path):
    blood_cells().write_h5ad(tmp_path / "cells.h5ad")
    upload(page, tmp_path / "cells.h5ad")
    page.get_by_role("button", name="B cell (15)").click()
    page.get_by_text("15 cells selected: B cell 15.").wait_for()
    few = page.evaluate(COLOURED)
    show_tab(page, "Search")
    page.get_by_role("button", name="More like the selected cells").click()
    page.get_by_text("Colour: match with 15 selected cells").wait_for()
    assert page.evaluate(COLOURED) > 2 * few  # the other 45 cells are no shadows


def test_results_of_other_cells_leave_the_page(page, tmp_path):
    for n in (24, 36):
        blood_cells(n).write_h5ad(tmp_path / f"of-{n}.h5ad")
    upload(page, tmp_path / "of-24.h5ad")
    page.get_by_text("of-24.h5ad: 24 cells").wait_for()
    page.get_by_role("button", name="Annotate").click()
    page.get_by_text("Colour: cell type (scMMGPT)").wait_for()
    page.get_by_role("button", name="Save the cells").click()
    page.locator("a[href*=of-24_scmmgpt]").first.wait_for()
    show_tab(page, "Selected")
    page.get_by_role("button", name="Why these types?").click()
    page.get_by_text("CD19").locator("visible=true").first.wait_for()
    page.locator("a[href*=of-24_scmmgpt]").first.wait_for(state="hidden")  # it lacks what was found since
    show_tab(page, "Ask")
    page.get_by_label("Question").locator("visible=true").fill("Which types are here?")
    page.keyboard.press("Enter")
    page.get_by_text("Labels of the 24 cells").first.wait_for()

    upload(page, tmp_path / "of-36.h5ad")
    page.get_by_text("of-36.h5ad: 36 cells").wait_for()
    page.get_by_text("Labels of the 24 cells").first.wait_for(state="detached")
    show_tab(page, "Selected")
    assert not page.get_by_text("CD19").locator("visible=true").count()


def test_files_without_cells_or_too_large_are_refused_in_words(page, tmp_path, monkeypatch):
    (tmp_path / "nothing.csv").write_text("nothing")
    (tmp_path / "text.h5ad").write_text("no HDF5")
    (tmp_path / "page.h5ad").write_text("<!DOCTYPE html><img src='https://example.org/x'>")
    (tmp_path / "large.h5ad").write_bytes(bytes(MOST_BYTES + 1))
    blood_cells(40).write_h5ad(tmp_path / "many.h5ad")
    monkeypatch.setattr(app, "MAX_CELLS", 30)
    for name, words in (
        ("nothing.csv", "nothing.csv"),
        ("text.h5ad", "is not an HDF5 file, despite its name (it is text: 'no HDF5')"),
        ("page.h5ad", '(it is text: "<!DOCTYPE html><img src='),
        ("large.h5ad", "maximum allowed size"),
        ("many.h5ad", "many.h5ad has 40 cells, and the page takes at most 30"),
    ):
        upload(page, tmp_path / name)
        page.get_by_text(words).locator("visible=true").first.wait_for()
        page.reload()
    page.get_by_role("button", name="Annotate").click()  # without cells
    page.locator(".toast-body", has_text=app.NO_CELLS).wait_for()


def test_a_reload_brings_the_cells_back_and_another_tab_has_none(page, address, tmp_path):
    blood_cells().write_h5ad(tmp_path / "cells.h5ad")
    upload(page, tmp_path / "cells.h5ad")
    page.get_by_text("60 cells").first.wait_for()
    page.get_by_role("button", name="Annotate").click()
    page.get_by_text("Colour: cell type (scMMGPT)").wait_for()
    select_all(page)
    page.get_by_text("60 cells selected: ").wait_for()
    page.reload()
    page.get_by_text("Colour: cell type (scMMGPT)").wait_for()
    page.get_by_text("60 cells selected: ").wait_for()
    show_tab(page, "Selected")
    page.get_by_role("button", name="Why these types?").click()
    page.get_by_text("CD19").locator("visible=true").first.wait_for()
    other = page.context.new_page()  # of the same browser
    other.set_default_timeout(TIMEOUT)
    other.goto(address)
    other.get_by_role("button", name="Annotate").click()
    other.locator(".toast-body", has_text=app.NO_CELLS).wait_for()
    page.evaluate(f"sessionStorage.setItem('{app.STORE}', 'of a page that was restarted')")
    page.reload()
    page.get_by_text(app.GONE).wait_for()
    page.reload()
    page.get_by_text("No cells yet.").wait_for()
    assert not page.get_by_text(app.GONE).count()


def test_names_of_a_file_are_no_html(page, tmp_path):
    cells = blood_cells()
    cells.obs["cell_type"] = "<img src='https://example.org/x'>"  # `close_page` counts the requests
    cells.write_h5ad(tmp_path / "cells.h5ad")
    upload(page, tmp_path / "cells.h5ad")
    page.get_by_role("button", name="<img src='https://example.org/x'> (60)").click()
    page.get_by_text("60 cells selected: <img src='https://example.org/x'> 60.").wait_for()
    show_tab(page, "Ask")
    page.get_by_label("Question").locator("visible=true").fill("Which cells are <img src='https://example.org/y'>?")
    page.keyboard.press("Enter")
    page.get_by_text("Which cells are <img src='https://example.org/y'>?").locator("visible=true").first.wait_for()


def test_two_users_at_once_have_their_own_cells(browser, address, tmp_path):
    pages = [open_page(browser, address) for _ in range(2)]
    for n, page in zip((24, 36), pages, strict=True):
        blood_cells(n).write_h5ad(tmp_path / f"of-{n}.h5ad")
        upload(page, tmp_path / f"of-{n}.h5ad")
    for n, page in zip((24, 36), pages, strict=True):
        page.get_by_text(f"of-{n}.h5ad: {n} cells").wait_for()
        page.get_by_role("button", name="Annotate").click()
    for page in pages:
        page.get_by_text("Colour: cell type (scMMGPT)").wait_for()
        select_all(page)
    for n, page in zip((24, 36), pages, strict=True):
        page.get_by_text(f"{n} cells selected: ").wait_for()
        assert not page.get_by_text(f"of-{60 - n}.h5ad").count()
        close_page(page, address)
