"""The site: every page has a place in it, and its tutorials run."""

import re
from pathlib import Path

import pytest
import yaml


ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
TUTORIALS = sorted((DOCS / "tutorials").glob("*.md"))


def pages(nav):
    """Paths of a navigation."""
    if isinstance(nav, str):
        return [nav]
    return [path for item in (nav.values() if isinstance(nav, dict) else nav) for path in pages(item)]


def test_every_page_is_in_the_navigation():
    found = pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    beside = {"changes.md", "contributing.md", "experiments.md"}  # copied from beside docs/ by its hooks
    assert sorted(found) == sorted({path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")} | beside)


def test_the_questions_quote_messages_that_the_code_has():
    sources = [path for folder in (".", "commands", "readers") for path in (ROOT / folder).glob("*.py")]
    code = re.sub(r'"\s*\n\s*f?"', "", "\n".join(path.read_text() for path in sources))
    quoted = re.findall(r"^### `(.+)`$", (DOCS / "faq.md").read_text(), re.MULTILINE)
    assert len(quoted) > 5
    assert [message for message in quoted if message not in code] == []


@pytest.mark.slow
@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_a_tutorial_runs(page, tmp_path, monkeypatch):
    pytest.importorskip("scanpy", reason="the tutorials annotate the cells that come with scanpy")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    session = {}
    for block in re.findall(r"```python[^\n]*\n(.*?)```", page.read_text(), flags=re.DOTALL):
        exec(block, session)  # of our own pages
    assert len(session) > 5
