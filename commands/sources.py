"""Inputs of commands over cells: files, folders of files, Zarr stores and corpora, whole or a range of rows."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scmmgpt.commands.progress import log_if_slow


_OPENED: list[tuple[Any, Any]] = []  # identity and cells of the file that is open in this process


@dataclass(frozen=True)
class Source:
    """A file of cells or a split of a corpus, as plain data for workers.

    Args:
        path: File, store or folder.
        split: Split of a corpus.
        model: Checkpoint whose gene vocabulary helps to orient text tables.
    """

    path: Path
    split: str
    model: str

    @property
    def is_corpus(self) -> bool:
        """Whether the source is a corpus that `prepare` made."""
        return (self.path / "manifest.json").is_file()

    def open(self) -> Any:
        """Open the cells and their annotations; matrices stay on disk if the writer can copy them from there."""
        return read_adata(self.path, self.split, self.model, backed=True)

    def open_rows(self, start: int, stop: int) -> Any:
        """Open cells `start` to `stop`; other rows are loaded only for text formats."""
        if self.is_corpus:
            from scmmgpt.train.data.corpus import open_corpus

            return open_corpus(self.path, verify=False).to_adata(self.split, start, stop)
        return self.open_whole()[start:stop]

    def open_whole(self) -> Any:
        """Open a file for a worker, and keep it open for the next partition; only `var` is in memory."""
        from scmmgpt.readers.cell_files import read_file

        key = (self, *self.fingerprint().values())
        if not _OPENED or _OPENED[0][0] != key:
            _OPENED.clear()
            genes = _gene_index(self.path, self.model)
            _OPENED.append((key, read_file(self.path, backed=True, gene_index=genes, obs_on_disk=True)))
        return _OPENED[0][1]

    def fingerprint(self) -> dict[str, Any]:
        """Path, split, size and modification time of the source, which identify its content."""
        files = sorted(path for path in self.path.rglob("*") if path.is_file()) if self.path.is_dir() else [self.path]
        stats = [file.stat() for file in files]
        newest = max((stat.st_mtime_ns for stat in stats), default=0)
        size = sum(stat.st_size for stat in stats)
        return {"path": str(self.path.absolute()), "split": self.split, "bytes": size, "newest": newest}


def check_split(split: str | None, paths: Iterable[Path | None]) -> None:
    """Refuse `--split` for files of cells, which have no splits: all their cells would be read."""
    named = [path for path in paths if path is not None]
    manifests = (next(path.glob(name), None) for path in named for name in ("manifest.json", "*/manifest.json"))
    if split is not None and not any(manifests):
        none = ", ".join(map(str, named)) or "an index"
        raise ValueError(
            f"--split {split} names a split of a corpus of `prepare`; {none} has no splits. Leave --split out, or "
            "pass a file of the wanted cells."
        )


def outputs_of(paths: list[Path], split: str, model: str, output: Path) -> dict[Source, Path]:
    """Find the sources of a command line, and the `.h5ad` file of each result.

    Each path is a source. If `output` is a folder, a folder of several data sets is replaced by these data sets. If
    `output` is a file, a folder is read as one source.

    Returns:
        Source -> output; several results are written to the folder `output`.

    Raises:
        ValueError: If there are several sources, and `output` has the name of a file.
    """
    from scmmgpt.readers.mtx_folders import find_inside, find_matrices, is_zarr
    from scmmgpt.readers.soma import is_soma

    found: list[Path] = []
    for path in paths:
        is_known = is_soma(path) or is_zarr(path) or (path / "manifest.json").is_file()
        is_one = not path.is_dir() or is_known or bool(find_matrices(path))
        inside = [] if is_one or output.suffix else find_inside(path)
        found += inside if len(inside) > 1 else [path]
    found = list(dict.fromkeys(found))
    sources = [Source(path, split, model) for path in found]
    if len(sources) == 1:
        return {sources[0]: output}
    if output.suffix:
        raise ValueError(f"--output is {str(output)!r}; it must name a folder, for the results of {len(found)} files.")
    return {s: output / f"{name}.h5ad" for s, name in zip(sources, output_names(found), strict=True)}


def output_names(paths: list[Path]) -> list[str]:
    """Name the results of sources by the path below the common parent folder, without the suffix.

    >>> output_names([Path("A/outs/cells.h5"), Path("B/outs/cells.h5"), Path("C.h5ad")])
    ['A-outs-cells', 'B-outs-cells', 'C']

    Raises:
        ValueError: If two sources would have one name.
    """
    shared = os.path.commonpath([path.absolute().parent for path in paths])
    relative = [path.absolute().relative_to(shared) for path in paths]
    names = ["-".join([*path.parts[:-1], path.name.removesuffix(".gz").rsplit(".", 1)[0]]) for path in relative]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"Several files would have one result, {repeated[0]}.h5ad. Rename one, or pass them apart.")
    return names


def read_adata(path: Path, split: str = "test", model: str | None = None, backed: bool = False) -> Any:
    """Read a file of cells, or a split of a corpus.

    Args:
        split: Split of a corpus.
        model: Checkpoint whose gene vocabulary helps to orient text tables.
        backed: Whether the matrices of an `.h5ad` file or a Zarr store stay on disk.
    """
    with log_if_slow(f"Reading {path}"):
        if (path / "manifest.json").is_file():
            from scmmgpt.train.data.corpus import open_corpus

            return open_corpus(path).to_adata(split)
        from scmmgpt.commands.results import can_copy
        from scmmgpt.readers.cell_files import read_file

        return read_file(path, backed=backed and can_copy(path), gene_index=_gene_index(path, model))


def _gene_index(path: Path, model: str | None) -> Any:
    """Gene index of a checkpoint, which tells whether rows or columns of a text table are genes; else None."""
    from scmmgpt.readers.cell_files import is_table

    if model is None or not is_table(path):
        return None
    from scmmgpt.processing_scmmgpt import ScMMGPTProcessor

    return ScMMGPTProcessor.from_pretrained(model).gene_index
