"""The result of a command: what it added to the cells, written without a matrix in memory where that is possible.

A command reads matrices in chunks and changes none. From an `.h5ad` it therefore writes a copy of the file, with new
`obs`, `obsm` and `uns`, and its memory does not grow with the cells. Cells of other formats are in memory.
"""

import logging
import shutil
from pathlib import Path
from typing import Any, TypeAlias

import anndata
import h5py

from scmmgpt.commands.files import check_file
from scmmgpt.commands.writing import make_writable, size_in_memory, writable_frame
from scmmgpt.readers.cell_files import CellFile


logger = logging.getLogger(__name__)

Cells: TypeAlias = anndata.AnnData | CellFile


def can_copy(path: Path) -> bool:
    """Whether a file is an `.h5ad`, by what it holds."""
    if not path.is_file():
        return False
    try:
        with h5py.File(path) as file:
            return "obs" in file and "var" in file and "mod" not in file
    except OSError:  # another format, or a truncated or locked file, which `read_file` explains
        return False


def rehearse(cells: Cells, source: Path, output: Path) -> None:
    """Change what `.h5ad` cannot hold, and check that `output` has room, before any cell is computed."""
    if isinstance(cells, CellFile):
        changes: list[str] = []
        cells.obs = writable_frame(cells.obs, "obs", changes)
        for change in changes:
            logger.warning(change)
        check_file(output, source.stat().st_size)
    else:
        make_writable(cells)
        check_file(output, size_in_memory(cells))


def write_result(cells: Cells, source: Path, target: Path) -> None:
    """Write cells with their results to the `.h5ad` file `target`; a [`CellFile`] is a view of `source`."""
    if not isinstance(cells, CellFile):
        cells.write_h5ad(target)
        return
    shutil.copyfile(source, target)
    with h5py.File(target, "r+") as file:
        _replace(file, "obs", cells.obs)
        for part, added in (("obsm", cells.obsm), ("uns", {"scmmgpt": cells.uns["scmmgpt"]})):
            if part not in file:
                anndata.io.write_elem(file, part, {})
            for name, value in added.items():
                _replace(file[part], name, value)


def _replace(group: h5py.Group, name: str, value: Any) -> None:
    if name in group:
        del group[name]
    anndata.io.write_elem(group, name, value)
