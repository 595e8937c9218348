"""The task of a worker: compute one partition of a source, and write one Parquet file, whole or not at all.

A partition is a range of rows, with the decisions that were made once for its source: the choice of matrix and genes,
and the arrays of `decided.npz` in the folder of the partitions (such as names of all labels, and profiles corrected by
the whole file). Sums over cells, such as the expression of groups, are in a `.npz` file next to the Parquet file.
"""

import contextlib
import copy
import errno
import functools
import json
import logging
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from scmmgpt.commands.cluster import device_of_worker
from scmmgpt.commands.files import whole_file
from scmmgpt.commands.sources import Source
from scmmgpt.crossfit_scmmgpt import FileRegression
from scmmgpt.novelty_scmmgpt import Neighbours
from scmmgpt.receipt_scmmgpt import digest
from scmmgpt.records_scmmgpt import words_of
from scmmgpt.refinement_scmmgpt import FileMeans


if TYPE_CHECKING:
    import pandas as pd

    from scmmgpt.labelling_scmmgpt import Labelling
    from scmmgpt.pipeline_scmmgpt import ScMMGPTPipeline
    from scmmgpt.reading_scmmgpt import InputChoice

Arrays = dict[str, np.ndarray]

logger = logging.getLogger(__name__)

DECIDED = "decided.npz"
_COMPUTING = threading.Lock()  # one thread of a worker at a time uses the model and the compiled loops


@dataclass(frozen=True)
class Job:
    """A command over cells as plain data, for workers.

    Args:
        verb: `annotate`, `explain`, `audit`, `embed` or `search`.
        model, device, batch_size: Arguments of the pipeline.
        options: Arguments of the pipeline's verb.
        reading: Arguments of `choose_input`.
        identity: Name, version and hash of the checkpoint, if it is the one of this package; stored in `uns`.
    """

    verb: str
    model: str
    device: str | None
    batch_size: int | None
    options: Mapping[str, Any]
    reading: Mapping[str, Any]
    identity: Mapping[str, str] | None = None

    def arguments(self) -> dict[str, Any]:
        """Arguments of the pipeline's verb, with those of reading."""
        return {**self.options, **self.reading}

    def request(self, pipeline: "ScMMGPTPipeline") -> dict[str, Any]:
        """Collect what determines the partitions of a source: options, weights, settings, code and versions.

        Options that only affect the joining are left out, and so is the path of the checkpoint.
        """
        joined = ("top_k",) if self.verb == "explain" else ("cluster_key", "top_k")
        options = {name: value for name, value in self.arguments().items() if name not in joined}
        signed = {k: v for k, v in pipeline.signer.sign(self.verb).items() if k not in ("checkpoint", "device")}
        fields = {"verb": self.verb, "device": self.device, "batch_size": self.batch_size, **options, **signed}
        fields["config"] = digest([pipeline.model.config.to_json_string()])
        return json.loads(json.dumps(fields))  # convert to JSON types, for the comparison with a stored request


def default_options(verb: str, label_key: str = "cell_type", text: str = "") -> dict[str, Any]:
    """Default options of a verb, with the column of an audit and the text of a search."""
    if verb == "embed":
        return {"of": None}
    if verb == "audit":
        return {"label_key": label_key, "cluster_key": None}
    if verb == "search":
        return {"text": text, "top_k": 10, "by": "similarity", "key_added": "scmmgpt_search"}
    names = ("labels", "tissue", "cl_ids", "cluster_key", "min_score", "error_rate", "matching_weight")
    return dict.fromkeys(names)


@dataclass(frozen=True)
class Partition:
    """A range of rows of a source, the choice of matrix and genes, and the file to write."""

    job: Job
    source: Source
    choice: "InputChoice"
    start: int
    stop: int
    path: Path  # file to write
    labels: Path | None = None  # for `explain`: the partition of the same rows that `annotate` wrote

    def __str__(self) -> str:
        return f"{self.source.path}, cells {self.start:,} to {self.stop - 1:,}"

    def pieces(self) -> list["Partition"]:
        """Divide the rows into the smallest partitions; `explain` must keep the partitions of the labels."""
        from scmmgpt.passes_scmmgpt import SORTED_CELLS

        if self.labels is not None:
            return [self]
        starts = range(self.start, self.stop, SORTED_CELLS)
        bounds = [(start, min(start + SORTED_CELLS, self.stop)) for start in starts]
        return [replace(self, start=a, stop=b, path=self.path.with_name(file_name(a, b))) for a, b in bounds]


def file_name(start: int, stop: int) -> str:
    """Name of the file of a partition.

    >>> file_name(0, 4096), rows_of(Path(file_name(0, 4096)))
    ('000000000000-000000004096.parquet', (0, 4096))
    """
    return f"{start:012d}-{stop:012d}.parquet"


def rows_of(path: Path) -> tuple[int, int]:
    """First row of a partition and the row after the last, from the name of its file."""
    start, _, stop = path.stem.partition("-")
    return int(start), int(stop)


@dataclass
class Computed:
    """Results of some cells."""

    columns: Arrays = field(default_factory=dict)  # columns of `obs`, `(n_cells,)`
    arrays: Arrays = field(default_factory=dict)  # `(n_cells, n)`
    sums: Arrays = field(default_factory=dict)  # sums over the cells


def prepare(job: Job, source: Source) -> None:
    """Load checkpoint and source, and compute one cell, before the first partition arrives.

    The readout is thereby solved for the genes of the source while the command makes its decisions. Errors and
    warnings are left to the command and the partitions.
    """
    with contextlib.suppress(Exception), _COMPUTING, one_thread():
        pipeline = _load(job.model, job.device, job.batch_size)
        first = source.open_rows(0, 1)
        logging.disable(logging.WARNING)
        try:
            choice = pipeline.processor.choose_input(source.open_whole(), **job.reading)
            compute_part(pipeline, first, choice, job, {})
        finally:
            logging.disable(logging.NOTSET)


def compute_partition(task: Partition) -> int:
    """Compute a partition and write its file, unless the file exists; return the number of cells.

    The file exists if a worker was lost after writing it, but before the scheduler had the result.
    """
    if task.path.is_file():
        return task.stop - task.start
    with _COMPUTING, one_thread():
        pipeline = _load(task.job.model, task.job.device, task.job.batch_size)
        choice = replace(task.choice, report=copy.deepcopy(task.choice.report))  # the computation extends the report
        part = task.source.open_rows(task.start, task.stop)
        labels = None if task.labels is None else read_columns(task.labels, ["cell_type"])["cell_type"]
        computed = compute_part(pipeline, part, choice, task.job, read_decided(task.path.parent), labels)
        write_partition(task.path, part.obs_names, computed, choice.report["cells"])
    return task.stop - task.start


def decide(
    pipeline: "ScMMGPTPipeline",
    cells: Any,
    choice: "InputChoice",
    job: Job,
    labels: np.ndarray | None = None,
    annotated: Job | None = None,
) -> Arrays:
    """Make the decisions that need all cells of a source, or all their labels, before the first partition.

    Args:
        labels: For `explain`: labels of the cells.
        annotated: For `explain`: the job that computed the labels.

    Returns:
        Arrays for all partitions of the source.
    """
    if job.verb == "audit":
        given = words_of(cells.obs, job.options["label_key"])
        sets = np.unique(given)
        with one_thread():
            labelling = pipeline.read_batch(cells, labelling_of(pipeline, choice, job.options, {}))
            file = pipeline.read_labels(cells, labelling, given, sets)
        decided = {"sets": sets, **_arrays_of(labelling), **({} if file is None else file.as_arrays())}
        return _remember(pipeline, choice, job.options, decided, labelling)
    if job.verb == "search" and (like := job.options.get("like")) is not None:
        with one_thread():
            return {"like": pipeline.places_named(cells, choice, like)}
    if job.verb == "explain" and labels is not None and annotated is not None:
        return {
            "sets": np.unique(labels),
            "candidates": np.array(list(settings_of(pipeline, annotated.options)["labels"])),
        }
    if job.verb == "annotate":
        read_batch = job.options.get("read_batch")
        with one_thread():
            labelling = pipeline.read_batch(cells, labelling_of(pipeline, choice, job.options, {}), read_batch)
        readout = labelling.readout if labelling.batch_read else None
        decided = _arrays_of(labelling) if readout is None else {"predicted": readout.predicted}
        return _remember(pipeline, choice, job.options, decided, labelling)
    return {}


def _arrays_of(labelling: "Labelling") -> Arrays:
    """Extract the statistics of a source's cells from a labelling; [`labelling_of`] restores them."""
    arrays: Arrays = {}
    if (near := labelling.neighbours) is not None:
        arrays = {"scores": near.scores, "novelty": near.novelty}
        arrays |= {} if near.types is None else {"types": near.types}
    if (file := labelling.file) is not None:
        arrays |= {"means": file.means, "n_cells": file.n_cells}
    if labelling.prior is not None:
        arrays["prior"] = labelling.prior
    return arrays


def compute_part(
    pipeline: "ScMMGPTPipeline",
    part: Any,
    choice: "InputChoice",
    job: Job,
    decided: Arrays,
    labels: np.ndarray | None = None,
) -> Computed:
    """Compute the results of some cells of a source.

    Args:
        part: Cells of the source.
        choice: Matrix and genes of the source.
        decided: Result of [`decide`].
        labels: For `explain`: labels of the cells.
    """
    options = job.options
    if job.verb == "embed":
        return Computed(arrays={"embedding": pipeline.embed_cells(part, choice, options["of"])})
    if job.verb == "search" and "like" in decided:
        return Computed({"search0": pipeline.compare_with_cells(part, choice, decided["like"])[:, 0]})
    if job.verb == "search":
        scores = pipeline.search_cells(part, choice, options["text"], options["by"])
        return Computed({f"search{i}": column for i, column in enumerate(scores.T)})
    if job.verb == "audit":
        given = words_of(part.obs, options["label_key"])
        labelling = known_labelling(pipeline, choice, options, decided)
        file = FileRegression.of_arrays(decided)
        return Computed(pipeline.audit_cells(part, labelling, given, decided["sets"], file=file))
    if job.verb == "explain" and labels is not None:
        key = options.get("cluster_key")
        clusters = None if key is None else words_of(part.obs, key)
        candidates = decided["candidates"].tolist()
        evidence = pipeline.explain_cells(part, choice, labels, decided["sets"], clusters, candidates=candidates)
        return Computed(evidence.columns(), evidence.of_cells.as_arrays(), evidence.sums())
    columns, probabilities = pipeline.label_cells(part, known_labelling(pipeline, choice, options, decided))
    return Computed(columns, {"probabilities": probabilities})


def settings_of(pipeline: "ScMMGPTPipeline", options: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of `annotate` for the options of a job."""
    names = ("labels", "cl_ids", "matching_weight", "tissue")
    return pipeline.annotation_settings(**{name: options.get(name) for name in names})


def labelling_of(
    pipeline: "ScMMGPTPipeline", choice: "InputChoice", options: Mapping[str, Any], decided: Arrays
) -> "Labelling":
    """Make the labelling of `annotate` or `audit` for all partitions, with the statistics of the whole source."""
    key = _labelling_key(pipeline, choice, options, {})
    if not _SOLVED or _SOLVED[0][0] != key:
        settings = settings_of(pipeline, options)
        decisions = options.get("min_score"), None, options.get("error_rate")
        _SOLVED[:] = [(key, pipeline.labelling(choice, settings, options.get("labels") is None, *decisions))]
    labelling = replace(_SOLVED[0][1], choice=choice)
    if "predicted" in decided and labelling.readout is not None:
        readout = labelling.readout.after_batch(decided["predicted"])
        labelling = replace(labelling, readout=readout, batch_read=True)
    if "novelty" in decided:
        near = Neighbours(decided["scores"], decided["novelty"], decided.get("types"))
        labelling = replace(labelling, neighbours=near)
    if "means" in decided:
        labelling = pipeline.with_file(labelling, FileMeans(decided["means"], decided["n_cells"]))
    return replace(labelling, prior=decided.get("prior"))


def known_labelling(
    pipeline: "ScMMGPTPipeline", choice: "InputChoice", options: Mapping[str, Any], decided: Arrays
) -> "Labelling":
    """Labelling of a source, cached, so that a process solves it for the genes once."""
    key = _labelling_key(pipeline, choice, options, decided)
    if not _LABELLING or _LABELLING[0][0] != key:
        with one_thread():
            _LABELLING[:] = [(key, labelling_of(pipeline, choice, options, decided))]
    return replace(_LABELLING[0][1], choice=choice)


def _remember(
    pipeline: "ScMMGPTPipeline",
    choice: "InputChoice",
    options: Mapping[str, Any],
    decided: Arrays,
    labelling: "Labelling",
) -> Arrays:
    """Cache the labelling of the decisions, for this process and for joining; return the decisions."""
    _LABELLING[:] = [(_labelling_key(pipeline, choice, options, decided), labelling)]
    return decided


def _labelling_key(
    pipeline: "ScMMGPTPipeline", choice: "InputChoice", options: Mapping[str, Any], decided: Arrays
) -> Any:
    return pipeline, options, choice.match.ids.tobytes(), {name: array.tobytes() for name, array in decided.items()}


# -- the process ------------------------------------------------------------------------------------------------------

_LOADED: "list[tuple[tuple[str, str | None, int | None], ScMMGPTPipeline]]" = []  # the checkpoint of this process
_SOLVED: "list[tuple[Any, Labelling]]" = []  # key and labelling of this process, without statistics of the source
_LABELLING: "list[tuple[Any, Labelling]]" = []  # the same with statistics of the source


@contextlib.contextmanager
def using(pipeline: "ScMMGPTPipeline", job: Job) -> Iterator[None]:
    """Cache the loaded pipeline for a job within the context; at the end, clear the caches of this process."""
    _LOADED[:] = [((job.model, job.device, job.batch_size), pipeline)]
    try:
        yield
    finally:
        _LOADED.clear()
        _SOLVED.clear()
        _LABELLING.clear()


def _load(model: str, device: str | None, batch_size: int | None) -> "ScMMGPTPipeline":
    """Load a checkpoint, cached in the process."""
    key = (model, device, batch_size)
    if not _LOADED or _LOADED[0][0] != key:
        from transformers.utils import logging as transformers_logging

        from scmmgpt.pipeline_scmmgpt import ScMMGPTPipeline

        transformers_logging.disable_progress_bar()
        loaded = ScMMGPTPipeline.from_pretrained(model, device=device or device_of_worker(), batch_size=batch_size)
        _LOADED[:] = [(key, loaded)]
    return _LOADED[0][1]


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread: with several, the order of additions, and so the last bits of sums, would vary."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# -- files ------------------------------------------------------------------------------------------------------------


def write_decided(folder: Path, decided: Arrays) -> None:
    """Write the arrays that all partitions of a folder share, such as the names of labels."""
    folder.mkdir(parents=True, exist_ok=True)
    with whole_file(folder / DECIDED) as temporary:
        np.savez(temporary, **cast(dict[str, Any], decided))


def read_decided(folder: Path) -> Arrays:
    """Read the arrays that [`write_decided`] wrote."""
    with np.load(folder / DECIDED, allow_pickle=False) as arrays:
        return dict(arrays)


def write_partition(path: Path, names: Any, computed: Computed, counted: Mapping[str, Any]) -> None:
    """Write the results of a partition as Parquet: `barcode`, columns, and arrays as lists of a fixed size.

    The file is not synced, so that no worker waits for the disk; checksums detect an incomplete file later.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = {"barcode": pa.array([str(name) for name in names])}
    table |= {name: pa.array(values) for name, values in computed.columns.items()}
    for name, values in computed.arrays.items():
        flat = pa.array(np.ascontiguousarray(values).ravel())
        table[name] = pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
    if computed.sums:
        with whole_file(path.with_suffix(".npz"), synced=False) as temporary:
            np.savez_compressed(temporary, **cast(dict[str, Any], computed.sums))
    with whole_file(path, synced=False) as temporary:
        totals = {name: np.nansum(values, axis=0).tolist() for name, values in computed.arrays.items()}
        schema = {"cells": json.dumps(counted), "totals": json.dumps(totals)}
        words = [name for name, values in computed.columns.items() if values.dtype.kind in "UO"]
        options = {"compression": "lz4", "use_dictionary": words, "write_page_checksum": True}
        pq.write_table(pa.table(table).replace_schema_metadata(schema), temporary, **options)


def _whole(read: Any) -> Any:
    """Decorate a function that reads a partition: a damaged file is removed, so that it is computed again."""

    @functools.wraps(read)
    def checked(path: Path, *args: Any) -> Any:
        try:
            return read(path, *args)
        except MemoryError:
            raise
        except Exception as error:  # Arrow raises many types
            if isinstance(error, OSError) and error.errno not in (None, errno.ENOENT):
                raise  # the disk or the network failed; the file itself may be intact
            path.unlink(missing_ok=True)
            raise ValueError(
                f"The partition {path} was damaged ({' '.join(str(error).split())[:100]}) and is removed. The same "
                "command computes it again."
            ) from error

    return checked


@dataclass
class Found:
    """Content of a partition without its arrays.

    Args:
        counted: Counts of the report for its cells.
        totals: Array -> sums of its columns over cells, without NaN.
        columns: Columns of `obs`.
        is_same: Whether its cells have the expected names, in order.
    """

    counted: dict[str, Any]
    totals: dict[str, list[float]]
    columns: Arrays
    is_same: bool


@_whole
def read_found(path: Path, names: "pd.Index") -> Found:
    """Read a partition without its arrays, and compare its barcodes with `names`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        schema = file.schema_arrow
        counted, totals = (json.loads(schema.metadata[name]) for name in (b"cells", b"totals"))
        table = file.read([name for name in schema.names if name not in totals], use_threads=False)
    is_same = table["barcode"].combine_chunks().equals(pa.array(names.astype(str), pa.string()))
    return Found(counted, totals, _arrays_in(table.drop_columns(["barcode"])), is_same)


@_whole
def read_columns(path: Path, names: Iterable[str] | None = None) -> Arrays:
    """Read columns of a partition (default: all); text is str, arrays are `(n_cells, n)`."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        return _arrays_in(file.read(None if names is None else list(names), use_threads=False))


def _arrays_in(table: Any) -> Arrays:
    """Convert the columns of an Arrow table to arrays."""
    import pyarrow as pa

    arrays = {}
    for name in table.column_names:
        column = table[name].combine_chunks()
        if pa.types.is_fixed_size_list(column.type):
            values = column.flatten().to_numpy(zero_copy_only=False).reshape(-1, column.type.list_size)
        elif pa.types.is_string(column.type):
            words = column.dictionary_encode()
            values = np.array(words.dictionary.to_pylist(), dtype=str)[words.indices.to_numpy()]
        else:
            values = column.to_numpy(zero_copy_only=False)
        arrays[name] = values
    return arrays


def is_whole(path: Path) -> bool:
    """Whether a partition exists and is undamaged; a damaged partition is removed."""
    if not path.is_file():
        return False
    try:
        read_columns(path)
        if path.with_suffix(".npz").is_file():
            read_sums(path)
    except ValueError as error:
        logger.warning(str(error))
    return path.is_file()


@_whole
def read_sums(path: Path) -> Arrays:
    """Read the sums over the cells of a partition."""
    with np.load(path.with_suffix(".npz"), allow_pickle=False) as arrays:
        return dict(arrays)
