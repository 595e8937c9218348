"""Annotate or embed cells in partitions, on many processes or machines, so that a run that was stopped can go on.

1. What needs a whole file is decided once: the matrix and the genes to read (from a sample of rows), and the labels.
2. Partitions, ranges of rows, go to workers (`cluster`). Each writes its results into one Parquet file, or nothing.
3. The partitions of a source are joined, by row and name, into one `.h5ad` with everything of the source; votes of
   clusters and the summary are taken here, over labels alone.

The files are in a folder beside the output until every result is whole. A partition whose file exists is not computed
again. A partition that fails is reported and left out. Partitions begin where batches do and each is computed by one
thread, so the results have the same bits for any number of workers and any size of partitions.
"""

import contextlib
import copy
import functools
import hashlib
import json
import logging
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from scmmgpt.commands.cluster import device_of_worker, run_tasks
from scmmgpt.commands.errors import explain, full_disk
from scmmgpt.commands.files import read_json, whole_file, write_json
from scmmgpt.commands.results import RowBlocks, rehearse, table_of, write_cells, write_table
from scmmgpt.commands.sources import Source


if TYPE_CHECKING:
    import pyarrow as pa

    from scmmgpt.pipeline_scmmgpt import ScMMGPTPipeline
    from scmmgpt.reading_scmmgpt import InputChoice


logger = logging.getLogger(__name__)

SHOWN = 5  # most failed partitions that are named
_COMPUTING = threading.Lock()  # the model and compiled loops are used by one thread of a worker at a time


@dataclass(frozen=True)
class Job:
    """A command over cells as plain data, for workers.

    Args:
        verb: `annotate` or `embed`.
        model, device, batch_size: Those of the pipeline.
        options: Of `annotate`: `labels`, `cl_ids`, `min_score`, `matching_weight`, `cluster_key`; of `embed`: `of`.
        reading: Arguments of `choose_input`.
        identity: Name, version and hash of the model of this package, if it is the checkpoint; kept in `uns`.
    """

    verb: str
    model: str
    device: str | None
    batch_size: int | None
    options: Mapping[str, Any]
    reading: Mapping[str, Any]
    identity: Mapping[str, str] | None = None

    def arguments(self) -> dict[str, Any]:
        """The arguments of the pipeline's verb."""
        return {**self.options, **self.reading}

    def request(self) -> dict[str, Any]:
        """What determines the results, beside the sources; the votes of clusters are taken when results are joined."""
        options = {name: value for name, value in self.options.items() if name != "cluster_key"}
        files = sorted(Path(self.model).glob("*")) if Path(self.model).is_dir() else []
        stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]
        fields: dict[str, Any] = {
            "verb": self.verb,
            "model": [str(self.model), stats],
            "device": self.device,
            "options": options,
        }
        fields |= {"batch_size": self.batch_size, "reading": dict(self.reading)}
        return json.loads(json.dumps(fields))  # as a file has it


def default_options(verb: str) -> dict[str, Any]:
    """The options of a verb that is given none."""
    if verb == "embed":
        return {"of": "cell-text"}
    return dict.fromkeys(("labels", "cl_ids", "cluster_key", "min_score", "matching_weight"))


@dataclass(frozen=True)
class Partition:
    """A range of rows of a source, the decision how to read it, and the file to write."""

    job: Job
    source: Source
    choice: "InputChoice"
    start: int
    stop: int
    path: Path


@dataclass
class Results:
    """The joined results of a source, and what failed."""

    source: Source
    cells: Any  # AnnData or CellFile with the results; None if there are none
    failed: dict[tuple[int, int], str] = field(default_factory=dict)  # rows -> error
    why: str = ""  # there are no results


class PartitionedRun:
    """A command over sources, in partitions.

    Args:
        job: What to compute.
        outputs: Sources, and the `.h5ad` file that each becomes.
        pipeline: The checkpoint, for what is decided once.
        folder: Folder of the partitions, which workers see under the same path.
        cells_per_partition: Most cells of a partition; rounded down to whole chunks of the pipeline, at least one.
        needed: Columns that `obs` of every source must have.

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
    ) -> None:
        from scmmgpt.pipeline_scmmgpt import SORTED_CELLS

        self.job, self.outputs, self.pipeline, self.folder = job, outputs, pipeline, folder
        self.step = max(1, cells_per_partition // SORTED_CELLS) * SORTED_CELLS
        self.needed = needed
        self._cells: dict[Source, Any] = {}  # of a single source, which is not opened twice
        self._choices: dict[Source, InputChoice] = {}
        self._failures: dict[Source, str] = {}  # of sources as a whole
        self._errors: dict[Path, str] = {}
        self._check_request()

    def _check_request(self) -> None:
        path, request = self.folder / "request.json", self.job.request()
        if path.is_file():
            found = read_json(path, dict)
            changed = sorted(name for name in request if found.get(name) != request[name])
            if changed:
                raise ValueError(
                    f"{self.folder} has partitions of a command with other options ({', '.join(changed)} differ). "
                    "Give that command again to finish it, or remove the folder."
                )
        else:
            write_json(path, request)

    def compute(self, workers: int = 1, cluster: str | None = None) -> None:
        """Compute the partitions that are missing; a disk that is full stops the run."""
        tasks = [task for source in self.outputs for task in self._partitions(source)]
        missing = [task for task in tasks if not task.path.is_file()]
        if len(missing) < len(tasks):
            logger.warning("%d of %d partitions are done; the others follow.", len(tasks) - len(missing), len(tasks))
        if not missing:
            return
        from transformers.utils import logging as progress_logging

        total = sum(task.stop - task.start for task in missing)
        with (
            progress_logging.tqdm(
                desc=f"{self.job.verb} in partitions", unit="cell", total=total, delay=3
            ) as progress,
            _using(self.pipeline, self.job) if cluster is None and workers == 1 else contextlib.nullcontext(),
        ):
            for task, _, error in run_tasks(compute_partition, missing, workers, cluster):
                if error is not None:
                    if full_disk(error, str(error), [self.folder]):
                        raise error
                    self._errors[task.path] = explain(error, [task.source.path])
                progress.update(task.stop - task.start)

    def _partitions(self, source: Source) -> list[Partition]:
        """The partitions of a source; none if it cannot be read."""
        try:
            cells = self._open(source)
            choice = self.pipeline.processor.choose_input(cells, **self.job.reading)
            if missing := [name for name in self.needed if name not in cells.obs]:
                raise ValueError(f"obs has no columns {missing}; it has {list(cells.obs.columns)}.")
        except Exception as error:  # whatever a damaged file makes of the libraries
            if len(self.outputs) == 1:
                raise
            self._failures[source] = explain(error, [source.path])
            return []
        self._choices[source] = choice
        folder = self._folder_of(source)
        folder.mkdir(parents=True, exist_ok=True)
        # Workers need what converts values, and no more: names of a file's variables would be sent with each task.
        match = replace(choice.match, how=np.empty(0, dtype=object), report={})
        plain = replace(choice, match=match, report={"cells": {}})
        n_cells = cells.shape[0]
        bounds = [(start, min(start + self.step, n_cells)) for start in range(0, n_cells, self.step)]
        return [
            Partition(self.job, source, plain, start, stop, folder / f"{start:012d}-{stop:012d}.parquet")
            for start, stop in bounds
        ]

    def _open(self, source: Source) -> Any:
        """The cells of a source, whose result can be written."""
        if source in self._cells:
            return self._cells.pop(source)
        cells = source.open()
        rehearse(cells, source.path, self.outputs[source])
        if len(self.outputs) == 1:
            self._cells[source] = cells
        return cells

    def _folder_of(self, source: Source) -> Path:
        print_of = json.dumps(source.fingerprint(), sort_keys=True).encode()
        return self.folder / f"{source.path.stem}-{hashlib.sha256(print_of).hexdigest()[:12]}"

    def join(self, source: Source) -> Results:
        """The cells of a source with the results of its partitions, and the votes and numbers over all of them."""
        from scmmgpt.readers.cell_files import CellFile
        from scmmgpt.reading_scmmgpt import finish_report

        if source in self._failures:
            return Results(source, None, why=self._failures[source])
        cells, folder, choice = self._open(source), self._folder_of(source), self._choices[source]
        n_cells = cells.shape[0]
        bounds = [(start, min(start + self.step, n_cells)) for start in range(0, n_cells, self.step)]
        paths = {rows: folder / f"{rows[0]:012d}-{rows[1]:012d}.parquet" for rows in bounds}
        done = {rows: path for rows, path in paths.items() if path.is_file()}
        failed = {rows: self._errors.get(path, "not computed") for rows, path in paths.items() if rows not in done}
        if not done:
            return Results(source, None, why=next(iter(failed.values())))
        columns, arrays, counted = read_partitions(done, n_cells, cells.obs_names)
        if not isinstance(cells, CellFile):
            arrays = {name: array.to_memory() for name, array in arrays.items()}
        choice.report["cells"] |= counted
        finish_report(choice.report)
        rows = np.arange(n_cells) if not failed else np.concatenate([np.arange(*rows) for rows in done])
        target = cells if not failed else _Part(cells.obs[[]].iloc[rows], {}, cells.uns)
        options = self.job.options
        if self.job.verb == "embed":
            self.pipeline.add_embedding(target, choice, arrays["embedding"], options["of"])
        else:
            key = options.get("cluster_key")
            clusters = None if key is None else np.asarray(cells.obs[key], dtype=str)[rows]
            labelling = _labelling(self.pipeline, choice, options)
            self.pipeline.add_labels(target, labelling, columns, arrays["probabilities"], clusters)
        self._add_receipt(target)
        if failed:
            spread(target, cells, rows)
            texts = [f"{start}-{stop}: {error}" for (start, stop), error in failed.items()]
            cells.uns["scmmgpt"] = {**cells.uns["scmmgpt"], "failed": np.array(texts, dtype=object)}
        if self.job.identity is not None:
            cells.uns["scmmgpt"] = {**cells.uns["scmmgpt"], "model": dict(self.job.identity)}
        return Results(source, cells, failed)

    def _add_receipt(self, target: Any) -> None:
        from scmmgpt.receipt_scmmgpt import add_receipt

        add_receipt(getattr(type(self.pipeline), self.job.verb), target, self.pipeline, target, **self.job.arguments())

    def remove(self) -> None:
        """Remove the partitions, once all results are written."""
        shutil.rmtree(self.folder, ignore_errors=True)


def compute_outputs(
    job: Job,
    outputs: Mapping[Source, Path],
    pipeline: "ScMMGPTPipeline",
    output: Path,
    where: tuple[int, str | None, int],
    tables: tuple[Path | None, Sequence[str]],
    found: Callable[[Any], dict[str, Any]],
) -> tuple[dict[str, Any], list[str]]:
    """Compute a job in partitions and write the result of every source.

    Args:
        output: The output of the command line, a file or folder; the partitions are beside it.
        where: Workers, scheduler, and most cells of a partition.
        tables: A text table to write, and the columns of `obs` that it takes from the source.
        found: Cells with results -> the numbers of the summary.

    Returns:
        The summary, and sentences about what could not be computed.

    Raises:
        ValueError: If nothing could be computed.
    """
    workers, cluster, cells_per_partition = where
    table, columns = tables
    needed = [*columns, *filter(None, [job.options.get("cluster_key")])]
    summaries: dict[str, Any] = {}
    rows, failures = [], []
    with partitions_beside(output) as folder, _folder_of_results(output, len(outputs) > 1):
        run = PartitionedRun(job, outputs, pipeline, folder, cells_per_partition, needed)
        run.compute(workers, cluster)
        for source, path in outputs.items():
            results = run.join(source)
            failures += describe_failures(results)
            if results.cells is None:
                continue
            write_cells(results.cells, source.path, path)
            if table is not None:
                rows.append(table_of(results.cells, columns))
                rows[-1].insert(0, "file", str(source.path))
            n_failed = sum(stop - start for start, stop in results.failed)
            counts = {"cells": results.cells.n_obs, **({"failed": n_failed} if n_failed else {})}
            summaries[str(path)] = {**counts, **found(results.cells)}
        if not summaries:
            raise ValueError(failures[0])
        if not failures:
            run.remove()
    if table is not None:
        joined = pd.concat(rows)
        write_table(table, joined.drop(columns="file") if len(outputs) == 1 else joined, index_label="barcode")
    return summaries[str(output)] if len(outputs) == 1 else {"files": summaries}, failures


@dataclass
class _Part:
    """Some cells, as far as the pipeline adds results to them."""

    obs: pd.DataFrame
    obsm: dict[str, Any]
    uns: Any


def spread(part: _Part, cells: Any, rows: np.ndarray) -> None:
    """Move the results of some rows to all cells; those of other rows are missing."""
    for name in part.obs.columns:
        column = part.obs[name]
        position = np.full(len(cells.obs), -1)
        position[rows] = np.arange(len(rows))
        if column.dtype.name == "category":
            codes = np.where(position >= 0, column.cat.codes.to_numpy()[position], -1)
            cells.obs[name] = pd.Categorical.from_codes(codes, dtype=column.dtype)
        else:
            cells.obs[name] = np.where(position >= 0, column.to_numpy()[position], np.float32(np.nan))
    for name, value in part.obsm.items():
        cells.obsm[name] = value  # its blocks know their rows


# -- workers ----------------------------------------------------------------------------------------------------------


def compute_partition(task: Partition) -> int:
    """Compute the results of a partition and write them, whole; returns the number of cells."""
    with _COMPUTING, one_thread():
        pipeline = _load(task.job.model, task.job.device, task.job.batch_size)
        choice = copy.deepcopy(task.choice)
        part = task.source.open_rows(task.start, task.stop)
        columns, arrays = compute_part(pipeline, part, choice, task.job)
        write_partition(task.path, part.obs_names, columns, arrays, choice.report["cells"])
    return task.stop - task.start


def compute_part(
    pipeline: "ScMMGPTPipeline", part: Any, choice: "InputChoice", job: Job
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Columns of `obs` and arrays of some cells of the data that `choice` was made for."""
    if job.verb == "embed":
        return {}, {"embedding": pipeline.embed_cells(part, choice, job.options["of"])}
    columns, probabilities = pipeline.label_cells(part, _labelling(pipeline, choice, job.options))
    return columns, {"probabilities": probabilities}


_LOADED: "list[tuple[tuple[str, str | None, int | None], ScMMGPTPipeline]]" = []  # the checkpoint of this process


@contextlib.contextmanager
def _using(pipeline: "ScMMGPTPipeline", job: Job) -> Iterator[None]:
    """Let partitions that are computed in this process take the pipeline that is loaded already."""
    _LOADED[:] = [((job.model, job.device, job.batch_size), pipeline)]
    try:
        yield
    finally:
        _LOADED.clear()


def _load(model: str, device: str | None, batch_size: int | None) -> "ScMMGPTPipeline":
    """The checkpoint, loaded once in a process."""
    key = (model, device, batch_size)
    if not _LOADED or _LOADED[0][0] != key:
        from transformers.utils import logging as transformers_logging

        from scmmgpt.pipeline_scmmgpt import ScMMGPTPipeline

        transformers_logging.disable_progress_bar()
        found = ScMMGPTPipeline.from_pretrained(model, device=device or device_of_worker(), batch_size=batch_size)
        _LOADED[:] = [(key, found)]
    return _LOADED[0][1]


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Compute by one thread: with several, libraries add the terms of a sum in another order, to other last bits."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _labelling(pipeline: "ScMMGPTPipeline", choice: "InputChoice", options: Mapping[str, Any]) -> Any:
    settings = pipeline.annotation_settings(options["labels"], options["cl_ids"], options["matching_weight"])
    return pipeline.labelling(choice, settings, options["labels"] is None, options["min_score"])


# -- files ------------------------------------------------------------------------------------------------------------


def write_partition(
    path: Path,
    names: Any,
    columns: Mapping[str, np.ndarray],
    arrays: Mapping[str, np.ndarray],
    counted: Mapping[str, Any],
) -> None:
    """Write the results of a partition as Parquet: `barcode`, a column each, and lists of a fixed size for arrays."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = {"barcode": pa.array([str(name) for name in names])}
    table |= {name: pa.array(values) for name, values in columns.items()}
    for name, values in arrays.items():
        flat = pa.array(np.ascontiguousarray(values, dtype=np.float32).ravel())
        table[name] = pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
    with whole_file(path) as temporary:
        pq.write_table(pa.table(table).replace_schema_metadata({"cells": json.dumps(counted)}), temporary)


def read_partitions(
    paths: Mapping[tuple[int, int], Path], n_cells: int, names: Any
) -> tuple[dict[str, np.ndarray], dict[str, Any], dict[str, Any]]:
    """Columns of all partitions, in order; arrays of all cells, which stay on disk; and sums of what was counted.

    Raises:
        ValueError: If a partition has other barcodes than the source.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    tables, counted, widths = [], dict[str, Any](), dict[str, int]()
    for (start, stop), path in paths.items():
        schema = pq.read_schema(path)
        for name, number in json.loads(schema.metadata[b"cells"]).items():
            if name == "hash":  # a sum over cells
                counted[name] = f"{(int(counted.get(name, '0'), 16) + int(number, 16)) % 2**64:016x}"
            else:
                counted[name] = counted.get(name, 0) + number
        widths = {f.name: f.type.list_size for f in schema if pa.types.is_fixed_size_list(f.type)}
        table = pq.read_table(path, columns=[name for name in schema.names if name not in widths], partitioning=None)
        barcodes = table["barcode"].to_pylist()
        if barcodes != [str(name) for name in names[start:stop]]:
            raise ValueError(f"{path} has other cells than rows {start} to {stop} of the source. Remove the file.")
        tables.append(table.drop_columns("barcode").replace_schema_metadata(None))
    joined = pa.concat_tables(tables)
    columns = {name: _column(joined[name]) for name in joined.column_names}

    def blocks(name: str, width: int) -> Iterator[tuple[int, np.ndarray]]:
        for (start, _), path in paths.items():
            array = pq.read_table(path, columns=[name], partitioning=None)[name].combine_chunks()
            yield start, array.flatten().to_numpy(zero_copy_only=False).reshape(-1, width)

    arrays = {
        name: RowBlocks((n_cells, width), functools.partial(blocks, name, width)) for name, width in widths.items()
    }
    return columns, arrays, counted


def _column(column: "pa.ChunkedArray") -> np.ndarray:
    values = column.to_numpy()
    return values.astype(str) if values.dtype == object else values


@contextlib.contextmanager
def _folder_of_results(output: Path, is_folder: bool) -> Iterator[None]:
    """Make the folder of several results, and remove it if none was written."""
    if is_folder:
        output.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        if is_folder and not any(output.iterdir()):
            output.rmdir()


@contextlib.contextmanager
def partitions_beside(output: Path) -> Iterator[Path]:
    """The folder of the partitions of an output; removed if nothing was computed in it."""
    folder = output.with_name(f"{output.name}.parts")
    try:
        yield folder
    finally:
        if folder.is_dir() and not any(folder.rglob("*.parquet")):
            shutil.rmtree(folder, ignore_errors=True)


def describe_failures(results: Results) -> list[str]:
    """Sentences about what could not be computed; none if all was."""
    if results.cells is None:
        return [f"{results.source.path}: {results.why}"]
    lines = [
        f"{results.source.path}, cells {start:,} to {stop - 1:,}: {error}"
        for (start, stop), error in list(results.failed.items())[:SHOWN]
    ]
    more = len(results.failed) - SHOWN
    return lines if more <= 0 else [*lines, f"{results.source.path}: {more} more partitions failed."]
