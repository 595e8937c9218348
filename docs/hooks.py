"""Pages of the site that lie beside docs/: the links to them lead to their copies."""

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files


BESIDE = {
    "CHANGELOG.md": "changes.md",
    "CONTRIBUTING.md": "contributing.md",
    "README.md": "index.md",
    "SKILL.md": "agents.md",
    "train/LOG.md": "experiments.md",
}


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that have no page of their own in docs/."""
    root = Path(config["config_file_path"]).resolve().parent
    for source, target in BESIDE.items():
        if files.get_file_from_path(target) is None:
            files.append(File.generated(config, target, abs_src_path=str(root / source)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, **_: object) -> str:
    """Make links between the repository's pages links of the site, and find the pages for users first."""
    source = Path(page.file.abs_src_path).relative_to(Path(config["config_file_path"]).resolve().parent)
    up = "../" * (len(source.parts) - 1)
    down = "../" * page.file.src_path.count("/")
    for path, target in BESIDE.items():
        markdown = markdown.replace(f"]({up}{path}", f"]({down}{target}")
    if source.parts[0] == "docs":
        return markdown
    page.meta["search"] = {"boost": 0.1}  # of the theme's search: the log and the rules for contributors come last
    return markdown.replace(f"]({up}docs/", "](")
