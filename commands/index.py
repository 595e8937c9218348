"""An index of the embeddings of many cells, on disk, in which texts are looked up without a pass over the cells.

An index is a folder of segments, each with the cells of one file, or of a range of them: `vectors.faiss`, and
`cells.parquet` with file, row, barcode and `obs`. Adding cells adds segments and changes no other. A segment is opened
without loading it; FAISS maps its vectors into memory. Vectors lie in lists around centroids, 8 bits a dimension:
`tests/benchmarks/vector_indexes.py` compares this kind with others.
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
CALLED = "scmmgpt_cell_type"  # of obs, as `annotate` writes it
KEY = "X_scmmgpt"  # of obsm, as `embed` writes it
OF_TEXTS = "cell-text"  # the embedding that texts are compared with
SAME = 0.99  # cosine similarity of a cell with itself, rounded to 8 bits a dimension
SAME_AMONG = 10  # nearest cells, among which a cell that is in the index itself is sought
CELLS_PER_SEGMENT = 1_000_000
TRAINING_VECTORS = 65  # for each centroid; FAISS recommends 39 to 256
PROBES = 64  # lists that a query looks into: 48 of 4,000 find 98.8 % of the ten nearest of a million cells
EXACT_BELOW = 10_000  # cells of a segment: so few are compared one by one, as 32-bit floats


@dataclass(frozen=True)
class Hit:
    """A cell that was found; `cell` is its barcode, and `row` its position in `file`."""

    rank: int
    cell: str
    file: str
    row: int
    score: float


@dataclass(frozen=True)
class Segment:
    """A segment to build, as plain data for workers: rows of a file, and the folder that it becomes."""

    path: Path
    start: int
    stop: int
    source: str
    folder: Path


def add_files(folder: Path, paths: list[Path], workers: int = 1, cluster: str | None = None) -> dict[str, int]:
    """Add cells that `embed` has embedded to an index, which may be new.

    A file that is in the index already is left out. Each segment becomes part of the index as a whole or not at all.

    Args:
        folder: The index.
        paths: Results of `embed`.
        workers, cluster: As for `Workers`: each builds a segment at a time.

    Returns:
        The numbers of added cells, of all cells, and of files that were left out.

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
                said = ", ".join(f"{name} {about[name]!r}, not {known[name]!r}" for name in changed)
                raise ValueError(f"{path} does not fit the index {folder}: {said}. Build another index for it.")
            for start in range(0, len(obs), CELLS_PER_SEGMENT):
                source = f"{path.absolute()}:{path.stat().st_size}:{path.stat().st_mtime_ns}:{start}"
                if source in done:
                    skipped += 1
                    continue
                stop, new = min(start + CELLS_PER_SEGMENT, len(obs)), folder / f"segment-{number + len(missing):05d}"
                missing.append(Segment(path, start, stop, source, new))
    if is_new and known is not None and known["of"] != OF_TEXTS:
        logger.warning(
            f"The cells of {folder} are embedded as {known['of']!r}, which no text is compared with: the index finds "
            "cells that are like a cell (`scmmgpt search FILE --like CELL --index`). For texts, embed the cells with "
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
    """The embeddings of a file, which stay on disk, its `obs`, and how they were made."""
    try:
        file = h5py.File(path)
    except OSError as error:
        raise ValueError(f"{path} is no .h5ad ({error}). Embed cells first: `scmmgpt embed`.") from None
    with file:
        if f"obsm/{KEY}" not in file or "uns/scmmgpt/embed" not in file:
            raise ValueError(f"{path} has no embeddings of `scmmgpt embed` in obsm[{KEY!r}]. Embed the cells first.")
        done, vectors = anndata.io.read_elem(file["uns/scmmgpt"]), file[f"obsm/{KEY}"]
        about: dict[str, Any] = {"checkpoint": str(done.get("checkpoint", "")), "of": str(done["embed"]["of"])}
        about["dimensions"] = int(vectors.shape[1])
        yield vectors, anndata.io.read_elem(file["obs"]), about


def build_segment(segment: Segment) -> None:
    """Build a segment and write it, whole."""
    faiss = _faiss()
    with _embedded(segment.path) as (stored, obs, _):
        vectors, obs = stored[segment.start : segment.stop], obs.iloc[segment.start : segment.stop]
    usable = np.isfinite(vectors).all(axis=1)  # cells of a partition that failed have none
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
    """A FAISS index of vectors of unit length: inner products with 8 bits a dimension, in lists around centroids."""
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
    """The checkpoint, the space (`of`) and the width of the embeddings of an index.

    Raises:
        FileNotFoundError: If the folder is not an index.
    """
    if not (folder / MANIFEST).is_file():
        raise FileNotFoundError(f"{folder} is not an index: it has no {MANIFEST}. `scmmgpt index` makes one.")
    return {"of": OF_TEXTS, **read_json(folder / MANIFEST, dict)}


def read_segments(folder: Path) -> list[dict[str, Any]]:
    """Source, number of cells and path of each segment."""
    paths = sorted(folder.glob("segment-*/segment.json"))
    return [{**read_json(path, dict), "path": path.parent} for path in paths]


def find_text(folder: Path, text: str, pipeline: Any, model: str, top_k: int, where: str | None = None) -> list[Hit]:
    """The cells of an index that are most similar to a text.

    Args:
        pipeline, model: The checkpoint that embeds the text, and its name.
        top_k, where: As for [`search_index`].

    Raises:
        ValueError: If the text denies or compares something, or the index is of another checkpoint.
    """
    if denied := read_query(text).denied:
        raise ValueError(f"An index finds what is similar, and cannot leave out {denied[0]!r}; search FILE for that.")
    for level in Search([text], pipeline.processor.gene_index).queries[0].levels:
        lacks = "cannot compare texts" if level.is_text else "has no counts"
        raise ValueError(f"An index {lacks} for {level.high or level.low!r}; search FILE for that.")
    if (of := read_manifest(folder)["of"]) != OF_TEXTS:
        raise ValueError(
            f"The cells of {folder} are embedded as {of!r}, which texts are not compared with. Embed them with "
            f"`scmmgpt embed --of {OF_TEXTS}` and index these."
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
    """The cells of an index that are most like some cells of a file, which are no hits themselves.

    Args:
        adata, like: The file, and the names of its cells.
        pipeline, model: As for [`find_text`].
        top_k, where: As for [`search_index`].
        reading: For `choose_input`.

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
            f"The embeddings of {folder} have {about['dimensions']} dimensions, those of {model} {len(query)}: they "
            f"are of different checkpoints. The index is of {about['checkpoint']!r}."
        )


def with_called(
    hits: list[Hit], folder: Path, query: np.ndarray, top_k: int, where: str | None, named: list[str]
) -> list[Hit]:
    """Hits behind the cells that `annotate` called a type that has a profile alone.

    The shared space has no place for such a type. As in a search of a file, its cells score up to 1 more.

    Args:
        hits: Of [`search_index`], with these arguments.
        named: The types.
    """
    called = " or ".join(f"{CALLED} == {json.dumps(name)}" for name in named)
    condition = f"({called})" if where is None else f"({where}) and ({called})"
    if not all(CALLED in columns_of_segment(segment["path"]) for segment in read_segments(folder)):
        logger.warning(
            f"The shared space has no place for {named[0]!r}, which has no training cell. Annotate the cells before "
            "`scmmgpt index` to find those that are called so, or search FILE."
        )
        return hits
    try:
        first = search_index(folder, query, top_k, condition)
    except ValueError:  # no cell is called so
        logger.warning(f"No cell of {folder} is called {named[0]!r}, which has no training cell: these are others.")
        return hits
    first = [replace(hit, score=round(hit.score + 1, 6)) for hit in first]
    known = {(hit.file, hit.row) for hit in first}
    rest = [hit for hit in hits if (hit.file, hit.row) not in known]
    return [replace(hit, rank=rank) for rank, hit in enumerate([*first, *rest][:top_k], 1)]


def search_index(folder: Path, query: np.ndarray, top_k: int, where: str | None = None) -> list[Hit]:
    """The cells of an index with the highest cosine similarity, best first.

    Args:
        query: Vector of unit length, of as many dimensions as the embeddings.
        where: A condition on columns of `obs`, as for [`rows_where`]: `tissue == 'lung' and n_genes > 500`.

    Raises:
        ValueError: If the condition cannot be evaluated, or no cell fulfils it.
    """
    found: list[tuple[float, Path, int]] = []
    n_kept = 0
    for segment in read_segments(folder):
        keep = None if where is None else _rows_where(segment["path"], where)
        n_kept += segment["cells"] if keep is None else len(keep)
        found += [(score, segment["path"], i) for score, i in _search_segment(segment, query, top_k, keep)]
    if not n_kept:
        raise ValueError(f"No cell of {folder} fulfils {where!r}." if where else f"The index {folder} has no cells.")
    best = sorted(found, key=lambda hit: (-hit[0], str(hit[1]), hit[2]))[:top_k]
    rows = _rows_of(best)
    return [Hit(rank, *rows[hit[1], hit[2]], round(hit[0], 6)) for rank, hit in enumerate(best, 1)]


def _search_segment(
    segment: dict[str, Any], query: np.ndarray, top_k: int, keep: np.ndarray | None
) -> Iterator[tuple[float, int]]:
    faiss = _faiss()
    index = faiss.read_index(str(segment["path"] / "vectors.faiss"), faiss.IO_FLAG_MMAP)
    if keep is not None and not len(keep):
        return
    # Of the cells that fulfil a condition, as many lists are looked into as hold as many of them.
    share = 1.0 if keep is None else len(keep) / segment["cells"]
    options = {"nprobe": min(index.nlist, int(np.ceil(PROBES / share)))}
    if keep is not None:
        options["sel"] = faiss.IDSelectorBatch(keep)
    scores, rows = index.search(query[None].astype(np.float32), top_k, params=faiss.SearchParametersIVF(**options))
    yield from ((float(score), int(i)) for score, i in zip(scores[0], rows[0], strict=True) if i >= 0)


def columns_of_segment(path: Path) -> list[str]:
    """The columns of the cells of a segment."""
    import pyarrow.parquet as pq

    return list(pq.read_schema(path / "cells.parquet").names)


def _rows_where(path: Path, where: str) -> np.ndarray:
    """Numbers of the cells of a segment that fulfil a condition; only its columns are read."""
    names = columns_of_segment(path)
    table = pd.read_parquet(path / "cells.parquet", columns=columns_of(where, names))
    return np.flatnonzero(rows_where(table.reset_index(drop=True), where, names)).astype(np.int64)


def _rows_of(hits: list[tuple[float, Path, int]]) -> dict[tuple[Path, int], tuple[str, str, int]]:
    """Barcode, file and row of some cells, by segment and number."""
    import pyarrow.parquet as pq

    rows: dict[tuple[Path, int], tuple[str, str, int]] = {}
    for path in {hit[1] for hit in hits}:
        table = pq.read_table(path / "cells.parquet", columns=["barcode", "file", "row"], memory_map=True)
        for number in (hit[2] for hit in hits if hit[1] == path):
            row = table.slice(number, 1).to_pylist()[0]
            rows[path, number] = (str(row["barcode"]), str(row["file"]), int(row["row"]))
    return rows


def render_hits(hits: list[Hit]) -> list[str]:
    """Hits as the lines of a table."""
    head = f"{'rank':>4}  {'score':>7}  cell  (row, file)"
    return [head, *(f"{hit.rank:>4}  {hit.score:>7.4f}  {hit.cell}  ({hit.row}, {hit.file})" for hit in hits)]
