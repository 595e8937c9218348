"""Compute a command over cells in partitions, on many processes or machines; a stopped run can be continued.

1. Decisions that need a whole file are made once: the matrix and the genes (from a sample of rows), and the labels.
2. Workers compute partitions, which are ranges of rows (`cluster`, `partition_tasks`). Each partition becomes one
   Parquet file, or none if it fails.
3. The partitions of a source are joined, by row and name, into one `.h5ad` file with all content of the source. Votes
   of clusters, ranks and the summary are computed in this step, from labels and scores alone.

The evidence for labels needs the labels of all cells, and is therefore a second pass of these steps.

Partitions are kept in a folder next to the output until every result is complete. A partition whose file exists is not
computed again, even if the earlier run had another partition size. A partition with which workers keep dying is cut
into the smallest partitions. A partition that fails is reported, and its cells have no results.

Results have the same bits for any number of workers and any partition size: partitions begin at batch boundaries, one
thread computes each partition, and sums over cells are exact.
"""

import contextlib
import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from scmmgpt.commands import partition_tasks as tasks
from scmmgpt.commands.cluster import Workers
from scmmgpt.commands.errors import explain, full_disk, naming
from scmmgpt.commands.files import lock_folder, read_json, write_json
from scmmgpt.commands.partition_tasks import Arrays, Job, Partition, read_columns
from scmmgpt.commands.results import CopiesAhead, RowBlocks, after, can_copy, rehearse, write_cells, write_table
from scmmgpt.commands.sources import Source
from scmmgpt.readers.soma import is_soma
from scmmgpt.records_scmmgpt import clusters_of, need_columns, words_of


if TYPE_CHECKING:
    from scmmgpt.pipeline_scmmgpt import ScMMGPTPipeline
    from scmmgpt.reading_scmmgpt import InputChoice


logger = logging.getLogger(__name__)

SHOWN = 5  # most failed partitions that are named
Rows = tuple[int, int]  # first row, and the row after the last


@dataclass
class Results:
    """The joined results of a source, and its failures."""

    source: Source
    cells: Any  # AnnData or CellFile with the results, or None
    failed: dict[Rows, str] = field(default_factory=dict)  # rows -> error
    why: str = ""  # reason for the lack of any result
    found: Any = None  # return value of the pipeline's verb: Audit, Evidence, hits


class PartitionedRun:
    """Computes a command over sources in partitions.

    Args:
        job: The command.
        outputs: Source -> `.h5ad` file of its result.
        pipeline: The checkpoint, for the decisions that need a whole file.
        folder: Folder of the partitions; workers must see it under the same path.
        cells_per_partition: Most cells of a partition; rounded down to a multiple of the pipeline's chunk, at least
            one chunk.
        needed: Columns that `obs` of every source must have.
        annotated: For `explain`: the run that computed the labels.

    Raises:
        ValueError: If the folder has partitions of another command.
    """

    def __init__(
        self,
        job: Job,
        outputs: Mapping[Source, Path],
        pipeline: "ScMMGPTPipeline",
        folder: Path,
        cells_per_partition: int,
        needed: Sequence[str] = (),
        annotated: "PartitionedRun | None" = None,
    ) -> None:
        from scmmgpt.passes_scmmgpt import SORTED_CELLS

        self.job, self.outputs, self.pipeline, self.folder = job, outputs, pipeline, folder
        self.step = max(1, cells_per_partition // SORTED_CELLS) * SORTED_CELLS
        self.needed, self.annotated = needed, annotated
        self._cells: dict[Source, Any] = {}  # cells of a single source, which is then opened once
        self._choices: dict[Source, InputChoice] = {}
        self._decided: dict[Source, Arrays] = {}
        self._failures: dict[Source, str] = {}  # source that cannot be read -> error
        self._errors: dict[Path, dict[Rows, str]] = {}  # source -> rows -> error
        self._read: dict[Path, tasks.Found] = {}  # contents of finished partitions, read during the computation
        self._check_request()

    def _check_request(self) -> None:
        path, request = self.folder / "request.json", self.job.request(self.pipeline)
        if path.is_file():
            earlier = read_json(path, dict)
            changed = sorted(name for name in {*request, *earlier} if earlier.get(name) != request.get(name))
            if changed:
                raise ValueError(
                    f"{self.folder} has partitions of another command: {', '.join(changed)} differ. Give that command "
                    "again, with the same model and versions, to finish it, or remove the folder."
                )
        else:
            write_json(path, request)

    def compute(self, workers: Workers, copies: CopiesAhead | None = None) -> None:
        """Compute the missing partitions, and start the copies of the outputs; a full disk stops the run."""
        wanted = [task for source in self.outputs for task in self._partitions(source)]
        if copies is not None:
            copies.start()
        missing = [task for task in wanted if not tasks.is_whole(task.path)]
        if len(missing) < len(wanted):
            logger.warning("%d of %d partitions are done; the others follow.", len(wanted) - len(missing), len(wanted))
        if not missing:
            return
        from transformers.utils import logging as progress_logging

        total = sum(task.stop - task.start for task in missing)
        what = f"{self.job.verb} in partitions"
        with progress_logging.tqdm(desc=what, unit="cell", total=total, delay=3) as progress:
            for task, _, error in workers.run(tasks.compute_partition, missing, Partition.pieces):
                if error is not None:
                    if full_disk(error, str(error), [self.folder]):
                        raise error
                    errors = self._errors.setdefault(task.source.path, {})
                    errors[task.start, task.stop] = explain(error, [task.source.path])
                elif task.source in self._cells:
                    names = self._cells[task.source].obs.index[task.start : task.stop]
                    with contextlib.suppress(ValueError, OSError):  # `join` meets the same error and reports it
                        self._read[task.path] = tasks.read_found(task.path, names)
                progress.update(task.stop - task.start)

    def _partitions(self, source: Source) -> list[Partition]:
        """List the partitions of a source; empty if the source cannot be read."""
        try:
            with naming(source.path if len(self.outputs) > 1 else None):
                cells = self._open(source)
                choice = self.pipeline.processor.choose_input(cells, **self.job.reading)
            need_columns(cells.obs, *self.needed)
            if (key := self.job.options.get("cluster_key")) is not None:
                clusters_of(cells.obs, key)
            labels = None if self.annotated is None else self.annotated.labels(source, cells.shape[0])
            annotated = None if self.annotated is None else self.annotated.job
            decided = tasks.decide(self.pipeline, cells, choice, self.job, labels, annotated)
        except Exception as error:  # libraries raise many types for a damaged file
            if len(self.outputs) == 1:
                raise
            self._failures[source] = explain(error, [source.path])
            return []
        self._choices[source], self._decided[source] = choice, decided
        tasks.write_decided(self._folder_of(source), decided)
        # Workers need only the conversion of values; report and names of variables would be sent with each task.
        match = replace(choice.match, how=np.empty(0, dtype=object), report={})
        plain = replace(choice, match=match, report={"cells": {}})
        paths = self.paths(source, cells.shape[0])
        of_labels = {} if self.annotated is None else self.annotated.paths(source, cells.shape[0])
        return [Partition(self.job, source, plain, *rows, path, of_labels.get(rows)) for rows, path in paths.items()]

    def _open(self, source: Source) -> Any:
        """Open the cells of a source, and check that the result can be written."""
        if source in self._cells:
            return self._cells.pop(source)
        cells = source.open()
        rehearse(cells, source.path, self.outputs[source])
        if len(self.outputs) == 1:
            self._cells[source] = cells
        return cells

    def _folder_of(self, source: Source) -> Path:
        """Folder of a source's partitions; its name is hashed from the content of the source and the labels."""
        sets = self._decided[source].get("sets", np.empty(0)).tolist()
        print_of = json.dumps([source.fingerprint(), sets], sort_keys=True).encode()
        return self.folder / f"{source.path.stem}-{hashlib.sha256(print_of).hexdigest()[:12]}"

    def paths(self, source: Source, n_cells: int) -> dict[Rows, Path]:
        """Rows -> file, for each partition of a source.

        Existing partitions are kept, whatever their size, and the rows between them are divided. `explain` has the
        partitions of the existing labels.
        """
        folder = self._folder_of(source)
        if self.annotated is not None:
            bounds = [rows for rows, path in self.annotated.paths(source, n_cells).items() if path.is_file()]
            return {rows: folder / tasks.file_name(*rows) for rows in bounds}
        bounds, end = [], 0
        for start, stop in [*sorted(map(tasks.rows_of, folder.glob("[0-9]*.parquet"))), (n_cells, n_cells)]:
            if start >= end:
                bounds += [(row, min(row + self.step, start)) for row in range(end, start, self.step)]
                bounds += [(start, stop)] if start < stop else []
                end = stop
        return {rows: folder / tasks.file_name(*rows) for rows in bounds}

    def _why(self, source: Source, rows: Rows) -> str:
        """Reason why rows have no result: the error of their partition, or of a smaller partition inside it."""
        errors = self._errors.get(source.path, {})
        within = (why for (start, stop), why in errors.items() if rows[0] <= start and stop <= rows[1])
        return errors.get(rows) or next(within, "not computed")

    def labels(self, source: Source, n_cells: int) -> np.ndarray:
        """Read the labels of all computed cells, in order."""
        if source in self._failures:
            raise ValueError(self._failures[source])
        files = [path for path in self.paths(source, n_cells).values() if path.is_file()]
        return np.concatenate([np.empty(0, dtype=str), *(read_columns(p, ["cell_type"])["cell_type"] for p in files)])

    def join(self, source: Source, cells: Any = None) -> Results:
        """Join the partitions of a source, and compute the results over all cells.

        Args:
            cells: Cells with the results of an earlier run, to which results are added; default: the source.
        """
        from scmmgpt.readers.cell_files import CellFile

        if source in self._failures:
            return Results(source, cells, why=self._failures[source])
        cells, choice = self._open(source) if cells is None else cells, self._choices[source]
        paths = self.paths(source, cells.shape[0])
        joined = Joined.of(paths, cells.obs.index, self._read, in_memory=not isinstance(cells, CellFile))
        lacking = [rows for rows in paths if rows not in joined.paths]
        failed = {rows: joined.damaged.get(rows) or self._why(source, rows) for rows in lacking}
        if not joined.paths:
            return Results(source, cells if self.annotated else None, failed, next(iter(failed.values()), "no labels"))
        choice.report["cells"] |= joined.counted
        rows = joined.rows()
        is_whole = len(rows) == len(cells.obs)
        given = [key for name in ("label_key", "cluster_key") if (key := self.job.options.get(name)) is not None]
        target = cells if is_whole else _Part(cells.obs[given].iloc[rows].copy(), cells.uns)
        found = self._add(target, choice, joined, self._decided[source])
        self._add_receipt(target)
        if not is_whole:
            spread(target, cells, rows, given)
        if self.job.identity is not None:
            cells.uns["scmmgpt"] = {**cells.uns["scmmgpt"], "model": dict(self.job.identity)}
        return Results(source, cells, failed, found=found)

    def _add(self, target: Any, choice: "InputChoice", joined: "Joined", decided: Arrays) -> Any:
        """Add the results of a verb to the computed cells; return the return value of the verb."""
        pipeline, options, columns = self.pipeline, self.job.options, joined.columns
        key = options.get("cluster_key")
        clusters = None if key is None else clusters_of(target.obs, key)
        if self.job.verb == "embed":
            return pipeline.add_embedding(target, choice, joined.blocks("embedding"), options["of"])
        if self.job.verb == "search":
            given: list[Any] = [options.get(name) for name in ("text", "top_k", "by", "key_added", "like")]
            values = np.stack([columns[f"search{i}"] for i in range(len(columns))], axis=1)
            (hits,) = pipeline.add_search(target, choice, values, *given)
            rows = joined.rows()
            return [{**hit, "index": int(rows[hit["index"]])} for hit in hits]
        if self.job.verb == "audit":
            key = options["label_key"]
            return pipeline.add_audit(target, choice, key, words_of(target.obs, key), columns, clusters)
        if self.job.verb == "explain":
            labels = words_of(target.obs, options["label_key"])
            candidates = decided["candidates"].tolist()
            evidence = pipeline.evidence_of(choice, labels, decided["sets"], clusters, candidates=candidates)
            for path in joined.paths.values():
                evidence.add_sums(tasks.read_sums(path))
            evidence.parts = joined.evidence
            return pipeline.add_evidence(target, choice, evidence, columns, options["label_key"])
        labelling = tasks.known_labelling(pipeline, choice, options, decided)
        return pipeline.add_labels(target, labelling, columns, joined.blocks("probabilities"), clusters)

    def _add_receipt(self, target: Any) -> None:
        from scmmgpt.receipt_scmmgpt import add_receipt

        add_receipt(getattr(type(self.pipeline), self.job.verb), target, self.pipeline, target, **self.job.arguments())

    def remove(self) -> None:
        """Remove the folder of the partitions."""
        shutil.rmtree(self.folder, ignore_errors=True)


def compute_outputs(
    job: Job,
    outputs: Mapping[Source, Path],
    load: "Callable[[], ScMMGPTPipeline]",
    output: Path,
    where: tuple[int, str | None, int],
    tables: Mapping[Path, Callable[[Results], pd.DataFrame | Iterable[dict[str, Any]]]],
    found: Callable[[Results], dict[str, Any]],
    needed: Sequence[str] = (),
    with_evidence: bool = False,
) -> tuple[dict[str, Any], list[str]]:
    """Compute a job in partitions and write the result of every source.

    Args:
        job: The command.
        outputs: Source -> `.h5ad` file of its result.
        load: Loads the checkpoint, while workers start.
        output: Output of the command line, a file or a folder; partitions are stored next to it.
        where: Number of workers, address of a scheduler or None, and most cells of a partition.
        tables: Text table to write -> function that returns the rows for the results of a source.
        found: Function that returns the summary of the results of a source.
        needed: Columns of `obs` that each source must have.
        with_evidence: Whether to explain the labels of `annotate`, too.

    Returns:
        The summary, and one sentence for each failure.

    Raises:
        ValueError: If nothing could be computed.
    """
    n_workers, cluster, size = where
    summaries: dict[str, Any] = {}
    done: list[Results] = []
    failures: list[str] = []
    with (
        partitions_beside(output) as folder,
        _folder_of_results(output, len(outputs) > 1),
        _copies(outputs, folder) as copies,
        contextlib.ExitStack() as loaded,
    ):
        with Workers(n_workers, cluster, (tasks.prepare, (job, next(iter(outputs))))) as workers:
            pipeline = load()
            loaded.enter_context(tasks.using(pipeline, job))
            runs = [PartitionedRun(job, outputs, pipeline, folder, size, needed)]
            runs[0].compute(workers, copies)
            if with_evidence:
                options = {"label_key": "scmmgpt_cell_type", "cluster_key": job.options.get("cluster_key")}
                second = replace(job, verb="explain", options=options)
                runs.append(PartitionedRun(second, outputs, pipeline, folder / "evidence", size, (), runs[0]))
                runs[1].compute(workers)
        for source, path in outputs.items():
            with naming(source.path if len(outputs) > 1 else None):
                results = [runs[0].join(source)]
                if with_evidence and results[0].cells is not None:
                    results.append(runs[1].join(source, results[0].cells))
            failures += [line for each in results for line in describe_failures(each)]
            cells, failed = results[-1].cells, {rows: why for each in results for rows, why in each.failed.items()}
            if cells is None:
                continue
            if failed:
                texts = [f"{start}-{stop}: {error}" for (start, stop), error in sorted(failed.items())]
                cells.uns["scmmgpt"] = {**cells.uns["scmmgpt"], "failed": np.array(texts, dtype=object)}
            write_cells(cells, source.path, path, copies)
            n_failed = sum(stop - start for start, stop in failed)
            counts = {"cells": cells.n_obs, **({"failed": n_failed} if n_failed else {})}
            done.append(results[-1])
            summaries[str(path)] = {**counts, **found(done[-1])}
        if not summaries:
            raise ValueError(failures[0])
        with after([outputs[results.source] for results in done]):
            for table, rows_of in tables.items():
                _write_rows(table, done, rows_of, several=len(outputs) > 1)
        if not failures:
            runs[0].remove()
    return summaries[str(output)] if len(outputs) == 1 else {"files": summaries}, failures


def _write_rows(
    path: Path,
    done: Sequence[Results],
    rows_of: Callable[[Results], pd.DataFrame | Iterable[dict[str, Any]]],
    several: bool,
) -> None:
    """Write the rows of all sources as one table; with several sources, a column `file` names the source."""
    parts = [rows_of(results) for results in done]
    frames = [part for part in parts if isinstance(part, pd.DataFrame)]
    if frames:
        for results, frame in zip(done, frames, strict=True):
            if several:
                frame.insert(0, "file", str(results.source.path))
        write_table(path, pd.concat(frames), index_label="barcode")
        return
    named = [{"file": str(results.source.path)} if several else {} for results in done]
    write_table(path, ({**name, **row} for name, part in zip(named, parts, strict=True) for row in part))


@dataclass
class _Part:
    """Some cells of a source: the part of AnnData's interface that the pipeline needs to add results."""

    obs: pd.DataFrame
    uns: Any
    obsm: dict[str, Any] = field(default_factory=dict)


def spread(part: _Part, cells: Any, rows: np.ndarray, given: Sequence[str]) -> None:
    """Move the results of some rows to all cells; other rows get missing values.

    Args:
        part: Cells with results.
        cells: All cells of the source.
        rows: Rows of `part` in `cells`.
        given: Columns of `part` that are inputs, not results.
    """
    for name in part.obs.columns.difference(given, sort=False):
        column = part.obs[name]
        position = np.full(len(cells.obs), -1)
        position[rows] = np.arange(len(rows))
        if column.dtype.name == "category":
            codes = np.where(position >= 0, column.cat.codes.to_numpy()[position], -1)
            cells.obs[name] = pd.Categorical.from_codes(codes, dtype=column.dtype)
        else:
            cells.obs[name] = np.where(position >= 0, column.to_numpy()[position], np.float32(np.nan))
    for name, value in part.obsm.items():
        cells.obsm[name] = value  # `RowBlocks` has the rows of its blocks


@dataclass
class Joined:
    """The existing partitions of a source, in order.

    Args:
        paths: Rows -> file.
        columns: Columns of `obs` for the cells of these partitions.
        counted: Counts of the report, summed over partitions.
        n_cells: Number of cells of the source.
        totals: Array -> column sums of each partition; the arrays themselves stay on disk.
        damaged: Rows of unreadable partitions -> error.
        in_memory: Whether to load arrays; true if the cells are in memory.
    """

    paths: dict[Rows, Path]
    columns: Arrays
    counted: dict[str, Any]
    n_cells: int
    totals: dict[str, list[list[float]]]
    damaged: dict[Rows, str]
    in_memory: bool

    @classmethod
    def of(
        cls, paths: Mapping[Rows, Path], names: pd.Index, read: dict[Path, tasks.Found], in_memory: bool
    ) -> "Joined":
        """Read the existing files of partitions.

        Args:
            paths: Rows -> file, which may be missing.
            names: Names of all cells of the source.
            read: Contents that were already read; they are removed, so that memory holds them once.
            in_memory: See the class.

        Raises:
            ValueError: If a partition has other barcodes than the source.
        """
        joined = cls({}, {}, {}, len(names), {}, {}, in_memory)
        tables: list[Arrays] = []
        for rows, path in paths.items():
            if not path.is_file():
                continue
            try:
                found = read.pop(path, None) or tasks.read_found(path, names[slice(*rows)])
            except ValueError as error:
                joined.damaged[rows] = str(error)
                continue
            if not found.is_same:
                raise ValueError(f"{path} has other cells than rows {rows[0]} to {rows[1]} of the source. Remove it.")
            joined.paths[rows] = path
            tables.append(found.columns)
            for name, total in found.totals.items():
                joined.totals.setdefault(name, []).append(total)
            for name, number in found.counted.items():
                if name == "hash":  # a sum over cells
                    total = (int(joined.counted.get(name, "0"), 16) + int(number, 16)) % 2**64
                    joined.counted[name] = f"{total:016x}"
                else:
                    joined.counted[name] = joined.counted.get(name, 0) + number
        joined.columns = {name: np.concatenate([t[name] for t in tables]) for name in (tables[0] if tables else ())}
        return joined

    def rows(self) -> np.ndarray:
        """Rows of the source with results, int64."""
        return np.concatenate([np.arange(*rows) for rows in self.paths])

    def blocks(self, name: str) -> RowBlocks | np.ndarray:
        """Array `name` of all cells, `(n_cells, n)`: loaded, or as blocks that stay on disk."""

        def read() -> Iterator[tuple[int, np.ndarray]]:
            for (start, _), path in self.paths.items():
                yield start, read_columns(path, [name])[name]

        totals = np.array(self.totals[name], dtype=np.float32)
        blocks = RowBlocks((self.n_cells, totals.shape[1]), read, totals)
        return blocks.to_memory() if self.in_memory else blocks

    def evidence(self) -> Iterator[tuple[int, Any]]:
        """Yield the evidence of each partition, with the position of its first cell among the cells with results."""
        from scmmgpt.evidence_scmmgpt import CellEvidence

        first = 0
        for (start, stop), path in self.paths.items():
            yield first, CellEvidence.of_arrays(read_columns(path, list(self.totals)))
            first += stop - start


@contextlib.contextmanager
def _copies(sources: Iterable[Source], folder: Path) -> Iterator[CopiesAhead]:
    """Prepare copies of the sources that become outputs; remove unused copies at the end."""
    files = [source.path for source in sources if source.path.is_file() and not is_soma(source.path)]
    copies = CopiesAhead({file: folder / f"{i}.h5ad" for i, file in enumerate(files) if can_copy(file)})
    try:
        yield copies
    finally:
        copies.remove()


@contextlib.contextmanager
def _folder_of_results(output: Path, is_folder: bool) -> Iterator[None]:
    """Create the folder of several results, and remove it if no result was written."""
    if is_folder:
        output.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        if is_folder and not any(output.iterdir()):
            output.rmdir()


@contextlib.contextmanager
def partitions_beside(output: Path) -> Iterator[Path]:
    """Lock the folder of the partitions of an output; remove the folder at the end if it has no partition."""
    folder = output.with_name(f"{output.name}.parts")
    with lock_folder(folder):
        try:
            yield folder
        finally:
            if folder.is_dir() and not any(folder.rglob("*.parquet")):
                shutil.rmtree(folder, ignore_errors=True)


def describe_failures(results: Results) -> list[str]:
    """One sentence for each failed partition (at most `SHOWN`), or for the failed source."""
    if results.why:
        return [f"{results.source.path}: {results.why}"]
    lines = [
        f"{results.source.path}, cells {start:,} to {stop - 1:,}: {error}"
        for (start, stop), error in list(results.failed.items())[:SHOWN]
    ]
    more = len(results.failed) - SHOWN
    return lines if more <= 0 else [*lines, f"{results.source.path}: {more} more partitions failed."]
