"""On-disk index of the embeddings of many cells, which finds the nearest cells of a text without reading all cells.

An index is a folder of segments. A segment has the cells of one file, or of a range of its rows: `vectors.faiss`, and
`cells.parquet` with file, row, barcode and `obs`. Adding cells adds segments and does not change existing segments.
FAISS memory-maps the vectors, which are stored in inverted lists with 8 bits per dimension;
`tests/benchmarks/vector_indexes.py` compares types of indexes.
"""

import contextlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd

from scmmgpt.commands.cluster import Workers
from scmmgpt.commands.conditions import columns_of, rows_where
from scmmgpt.commands.files import read_json, whole_folder, write_json
from scmmgpt.query_scmmgpt import Search, read_query


logger = logging.getLogger(__name__)

MANIFEST = "index.json"
CALLED = "scmmgpt_cell_type"  # column of obs that `annotate` writes
KEY = "X_scmmgpt"  # entry of obsm that `embed` writes
OF_TEXTS = "cell-text"  # embedding in the space shared with texts
SAME = 0.99  # smallest cosine similarity of a cell and its stored copy, which has 8 bits per dimension
SAME_AMONG = 10  # nearest cells in which the stored copy of a cell is looked for
CELLS_PER_SEGMENT = 1_000_000
TRAINING_VECTORS = 65  # training vectors per centroid; FAISS recommends 39 to 256
PROBES = 64  # probed lists of a query; 48 of 4,000 lists find 98.8 % of the ten nearest among a million cells
EXACT_BELOW = 10_000  # smaller segments are searched exhaustively with 32-bit floats


@dataclass(frozen=True)
class Hit:
    """A hit of a search; `cell` is the barcode, and `row` the row in `file`."""

    rank: int
    cell: str
    file: str
    row: int
    score: float


@dataclass(frozen=True)
class Segment:
    """A segment to build, as plain data for workers: rows of a file, and the folder to write."""

    path: Path
    start: int
    stop: int
    source: str
    folder: Path


def add_files(folder: Path, paths: list[Path], workers: int = 1, cluster: str | None = None) -> dict[str, int]:
    """Add embedded cells to an index, which is created if missing.

    Segments that are already in the index are skipped. Each segment is added whole or not at all.

    Args:
        folder: Folder of the index.
        paths: Results of `embed`.
        workers, cluster: See [`Workers`]; a worker builds one segment at a time.

    Returns:
        `added` (cells), `cells` (of the whole index) and `left_out` (skipped segments).

    Raises:
        ValueError: If a file has no embeddings, or embeddings of another checkpoint or space.
    """
    known = read_manifest(folder) if (folder / MANIFEST).is_file() else None
    is_new = known is None
    done = {entry["source"] for entry in read_segments(folder)}
    number = max((int(path.name.removeprefix("segment-")) + 1 for path in folder.glob("segment-*")), default=0)
    missing: list[Segment] = []
    skipped = 0
    for path in paths:
        with _embedded(path) as (_, obs, about):
            if known is None:
                known = about
                folder.mkdir(parents=True, exist_ok=True)
                write_json(folder / MANIFEST, about)
            changed = sorted(name for name in known if about[name] != known[name])
            if changed:
                texts = ", ".join(f"{name} {about[name]!r}, not {known[name]!r}" for name in changed)
                raise ValueError(f"{path} does not fit the index {folder}: {texts}. Build another index for it.")
            for start in range(0, len(obs), CELLS_PER_SEGMENT):
                source = f"{path.absolute()}:{path.stat().st_size}:{path.stat().st_mtime_ns}:{start}"
                if source in done:
                    skipped += 1
                    continue
                stop, new = min(start + CELLS_PER_SEGMENT, len(obs)), folder / f"segment-{number + len(missing):05d}"
                missing.append(Segment(path, start, stop, source, new))
    if is_new and known is not None and known["of"] != OF_TEXTS:
        logger.warning(
            f"The cells of {folder} are embedded as {known['of']!r}, which cannot be compared with texts. The index "
            "finds similar cells (`scmmgpt search FILE --like CELL --index`). For texts, embed the cells with "
            f"`--of {OF_TEXTS}`."
        )
    from transformers.utils import logging as progress_logging

    with Workers(workers, cluster) as running:
        outcomes = running.run(build_segment, missing)
        progress = progress_logging.tqdm(outcomes, desc="Indexing", unit="segment", total=len(missing), delay=3)
        failures = [error for _, _, error in progress if error is not None]
    if failures:
        raise failures[0]
    n_cells = sum(entry["cells"] for entry in read_segments(folder))
    return {"added": sum(s.stop - s.start for s in missing), "cells": n_cells, "left_out": skipped}


@contextlib.contextmanager
def _embedded(path: Path) -> Iterator[tuple[h5py.Dataset, pd.DataFrame, dict[str, Any]]]:
    """Open the embeddings of a file on disk; yield them, `obs`, and checkpoint, space and width of the embeddings."""
    try:
        file = h5py.File(path)
    except OSError as error:
        raise ValueError(f"{path} is not an .h5ad file ({error}). Embed cells first: `scmmgpt embed`.") from None
    with file:
        if f"obsm/{KEY}" not in file or "uns/scmmgpt/embed" not in file:
            raise ValueError(f"{path} has no embeddings of `scmmgpt embed` in obsm[{KEY!r}]. Embed the cells first.")
        done, vectors = anndata.io.read_elem(file["uns/scmmgpt"]), file[f"obsm/{KEY}"]
        about: dict[str, Any] = {"checkpoint": str(done.get("checkpoint", "")), "of": str(done["embed"]["of"])}
        about["dimensions"] = int(vectors.shape[1])
        yield vectors, anndata.io.read_elem(file["obs"]), about


def build_segment(segment: Segment) -> None:
    """Build a segment, and write it whole or not at all."""
    faiss = _faiss()
    with _embedded(segment.path) as (stored, obs, _):
        vectors, obs = stored[segment.start : segment.stop], obs.iloc[segment.start : segment.stop]
    usable = np.isfinite(vectors).all(axis=1)  # cells of a failed partition have NaN
    rows = segment.start + np.flatnonzero(usable)
    vectors = np.ascontiguousarray(vectors[usable], dtype=np.float32)
    table = obs.iloc[np.flatnonzero(usable)].drop(columns=["barcode", "row", "file"], errors="ignore")
    table = table.reset_index(names="barcode")
    table.insert(0, "row", rows)
    table.insert(0, "file", str(segment.path))
    index = build_index(vectors)
    with whole_folder(segment.folder) as new:
        faiss.write_index(index, str(new / "vectors.faiss"))
        table.to_parquet(new / "cells.parquet", index=False)
        write_json(new / "segment.json", {"source": segment.source, "cells": len(rows)})


def build_index(vectors: np.ndarray) -> Any:
    """Build a FAISS index of unit-length vectors, float32 `(n_cells, width)`, for inner products.

    The index has inverted lists with 8 bits per dimension; below `EXACT_BELOW` cells, one list of 32-bit floats.
    """
    faiss = _faiss()
    n_cells, width = vectors.shape
    kind = "IVF1,Flat" if n_cells < EXACT_BELOW else f"IVF{int(4 * np.sqrt(n_cells))},SQ8"
    index = faiss.index_factory(width, kind, faiss.METRIC_INNER_PRODUCT)
    index.cp.seed = 0
    sample = vectors
    if n_cells > TRAINING_VECTORS * index.nlist:
        chosen = np.random.default_rng(0).choice(n_cells, TRAINING_VECTORS * index.nlist, replace=False)
        sample = vectors[np.sort(chosen)]
    index.train(sample)
    index.add(vectors)
    return index


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise ImportError("An index needs FAISS. Install `scmmgpt[index]`.") from error
    return faiss


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read `checkpoint`, space (`of`) and width (`dimensions`) of the embeddings of an index.

    Raises:
        FileNotFoundError: If the folder is not an index.
    """
    if not (folder / MANIFEST).is_file():
        raise FileNotFoundError(f"{folder} is not an index: it has no {MANIFEST}. `scmmgpt index` makes one.")
    return {"of": OF_TEXTS, **read_json(folder / MANIFEST, dict)}


def read_segments(folder: Path) -> list[dict[str, Any]]:
    """Read `source`, number of `cells` and `path` of each segment."""
    paths = sorted(folder.glob("segment-*/segment.json"))
    return [{**read_json(path, dict), "path": path.parent} for path in paths]


def find_text(folder: Path, text: str, pipeline: Any, model: str, top_k: int, where: str | None = None) -> list[Hit]:
    """Find the cells of an index that are most similar to a text.

    Args:
        pipeline: Checkpoint that embeds the text.
        model: Name of the checkpoint.
        top_k, where: See [`search_index`].

    Raises:
        ValueError: If the text has denials or comparisons, or the index is of another checkpoint or space.
    """
    if denied := read_query(text).denied:
        raise ValueError(f"An index ranks by similarity and cannot exclude {denied[0]!r}; search FILE for that.")
    for level in Search([text], pipeline.processor.gene_index).queries[0].levels:
        lacks = "cannot compare texts" if level.is_text else "has no counts"
        raise ValueError(f"An index {lacks} for {level.high or level.low!r}; search FILE for that.")
    if (of := read_manifest(folder)["of"]) != OF_TEXTS:
        raise ValueError(
            f"The cells of {folder} are embedded as {of!r}, which cannot be compared with texts. Embed the cells with "
            f"`scmmgpt embed --of {OF_TEXTS}`, and index the result."
        )
    pipeline.warn_of_strange([text])
    query = pipeline.embed_texts([text])[0]
    _check_dimensions(folder, query, model)
    hits = search_index(folder, query, top_k, where)
    types = (pipeline.model.config.annotation or {}).get("profiles", [])
    named = [str(types[number]["name"]) for number in pipeline.profiles_named(text)]
    return with_called(hits, folder, query, top_k, where, named) if named else hits


def find_like(
    folder: Path,
    adata: Any,
    like: Sequence[str],
    pipeline: Any,
    model: str,
    top_k: int,
    where: str | None = None,
    **reading: Any,
) -> list[Hit]:
    """Find the cells of an index that are most similar to cells of a file, without these cells themselves.

    Args:
        adata: Cells of the file.
        like: Names of the query cells.
        pipeline, model: See [`find_text`].
        top_k, where: See [`search_index`].
        reading: Arguments of `choose_input`.

    Raises:
        ValueError: If a cell is not in the file, or the index is of another checkpoint.
    """
    from scmmgpt.searching_scmmgpt import middle

    choice = pipeline.processor.choose_input(adata, **reading)
    places = pipeline.places_named(adata, choice, like, read_manifest(folder)["of"])
    _check_dimensions(folder, places[0], model)
    known = set(map(str, like))
    nearest = (hit for place in places for hit in search_index(folder, place, SAME_AMONG))
    same = {(hit.file, hit.row) for hit in nearest if hit.cell in known and hit.score >= SAME}
    hits = search_index(folder, middle(places), top_k + len(same), where)
    others = [hit for hit in hits if (hit.file, hit.row) not in same]
    return [replace(hit, rank=rank) for rank, hit in enumerate(others[:top_k], 1)]


def _check_dimensions(folder: Path, query: np.ndarray, model: str) -> None:
    about = read_manifest(folder)
    if len(query) != about["dimensions"]:
        raise ValueError(
            f"The embeddings of {folder} have {about['dimensions']} dimensions, those of {model} {len(query)}. The "
            f"index was made with another checkpoint, {about['checkpoint']!r}."
        )


def with_called(
    hits: list[Hit], folder: Path, query: np.ndarray, top_k: int, where: str | None, named: list[str]
) -> list[Hit]:
    """Rank the cells that `annotate` named by a profile-only type before the other hits.

    A type without training cells has no place in the shared space. As in a search of a file, 1 is added to the scores
    of its cells.

    Args:
        hits: Hits of [`search_index`] for the same query.
        named: Names of the types.
    """
    called = " or ".join(f"{CALLED} == {json.dumps(name)}" for name in named)
    condition = f"({called})" if where is None else f"({where}) and ({called})"
    if not all(CALLED in columns_of_segment(segment["path"]) for segment in read_segments(folder)):
        logger.warning(
            f"The shared space has no place for {named[0]!r}, which has no training cells. Annotate the cells before "
            "`scmmgpt index`, or search FILE."
        )
        return hits
    try:
        first = search_index(folder, query, top_k, condition)
    except ValueError:  # no cell has this label
        logger.warning(f"No cell of {folder} is labelled {named[0]!r}; the hits are cells of other types.")
        return hits
    first = [replace(hit, score=round(hit.score + 1, 6)) for hit in first]
    known = {(hit.file, hit.row) for hit in first}
    rest = [hit for hit in hits if (hit.file, hit.row) not in known]
    return [replace(hit, rank=rank) for rank, hit in enumerate([*first, *rest][:top_k], 1)]


def search_index(folder: Path, query: np.ndarray, top_k: int, where: str | None = None) -> list[Hit]:
    """Find the cells of an index with the highest cosine similarity, best first.

    Args:
        query: Unit-length vector, float `(width,)`.
        top_k: Number of hits.
        where: Condition on columns of `obs`, such as `tissue == 'lung' and n_genes > 500`; see [`rows_where`].

    Raises:
        ValueError: If the condition cannot be evaluated, or no cell fulfils it.
    """
    hits: list[tuple[float, Path, int]] = []
    n_kept = 0
    for segment in read_segments(folder):
        keep = None if where is None else _rows_where(segment["path"], where)
        n_kept += segment["cells"] if keep is None else len(keep)
        hits += [(score, segment["path"], i) for score, i in _search_segment(segment, query, top_k, keep)]
    if not n_kept:
        raise ValueError(f"No cell of {folder} fulfils {where!r}." if where else f"The index {folder} has no cells.")
    best = sorted(hits, key=lambda hit: (-hit[0], str(hit[1]), hit[2]))[:top_k]
    rows = _rows_of(best)
    return [Hit(rank, *rows[hit[1], hit[2]], round(hit[0], 6)) for rank, hit in enumerate(best, 1)]


def _search_segment(
    segment: dict[str, Any], query: np.ndarray, top_k: int, keep: np.ndarray | None
) -> Iterator[tuple[float, int]]:
    faiss = _faiss()
    index = faiss.read_index(str(segment["path"] / "vectors.faiss"), faiss.IO_FLAG_MMAP)
    if keep is not None and not len(keep):
        return
    # With a condition, more lists are probed, so that about the same number of matching cells is compared.
    share = 1.0 if keep is None else len(keep) / segment["cells"]
    options = {"nprobe": min(index.nlist, int(np.ceil(PROBES / share)))}
    if keep is not None:
        options["sel"] = faiss.IDSelectorBatch(keep)
    scores, rows = index.search(query[None].astype(np.float32), top_k, params=faiss.SearchParametersIVF(**options))
    yield from ((float(score), int(i)) for score, i in zip(scores[0], rows[0], strict=True) if i >= 0)


def columns_of_segment(path: Path) -> list[str]:
    """Columns of `cells.parquet` of a segment."""
    import pyarrow.parquet as pq

    return list(pq.read_schema(path / "cells.parquet").names)


def _rows_where(path: Path, where: str) -> np.ndarray:
    """Positions of the cells of a segment that fulfil a condition, int64; only columns of the condition are read."""
    names = columns_of_segment(path)
    table = pd.read_parquet(path / "cells.parquet", columns=columns_of(where, names))
    return np.flatnonzero(rows_where(table.reset_index(drop=True), where, names)).astype(np.int64)


def _rows_of(hits: list[tuple[float, Path, int]]) -> dict[tuple[Path, int], tuple[str, str, int]]:
    """Read barcode, file and row of hits: (segment, position) -> values."""
    import pyarrow.parquet as pq

    rows: dict[tuple[Path, int], tuple[str, str, int]] = {}
    for path in {hit[1] for hit in hits}:
        table = pq.read_table(path / "cells.parquet", columns=["barcode", "file", "row"], memory_map=True)
        for number in (hit[2] for hit in hits if hit[1] == path):
            row = table.slice(number, 1).to_pylist()[0]
            rows[path, number] = (str(row["barcode"]), str(row["file"]), int(row["row"]))
    return rows


def render_hits(hits: list[Hit]) -> list[str]:
    """Format hits as lines of a table."""
    head = f"{'rank':>4}  {'score':>7}  cell  (row, file)"
    return [head, *(f"{hit.rank:>4}  {hit.score:>7.4f}  {hit.cell}  ({hit.row}, {hit.file})" for hit in hits)]
