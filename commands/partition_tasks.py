"""The task of a worker: one partition of a source -> one Parquet file, whole or not at all.

A partition is a range of rows with everything that was decided once for its source: how to read it, and the arrays of
`decided.npz` in the folder of its partitions (names of all labels, profiles that a look at the whole file corrected).
What a pass over the cells adds up, such as the expression of groups, is in a file `.npz` beside the Parquet file.
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
_COMPUTING = threading.Lock()  # the model and compiled loops are used by one thread of a worker at a time


@dataclass(frozen=True)
class Job:
    """A command over cells as plain data, for workers.

    Args:
        verb: `annotate`, `explain`, `audit`, `embed` or `search`.
        model, device, batch_size: Those of the pipeline.
        options: Arguments of the pipeline's verb.
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

    def request(self, pipeline: "ScMMGPTPipeline") -> dict[str, Any]:
        """What determines the partitions, beside the sources: options, weights, settings, code and versions.

        Options that apply when partitions are joined are left out, and so is where the checkpoint lies.
        """
        joined = ("top_k",) if self.verb == "explain" else ("cluster_key", "top_k")
        options = {name: value for name, value in self.arguments().items() if name not in joined}
        signed = {k: v for k, v in pipeline.signer.sign(self.verb).items() if k not in ("checkpoint", "device")}
        fields = {"verb": self.verb, "device": self.device, "batch_size": self.batch_size, **options, **signed}
        fields["config"] = digest([pipeline.model.config.to_json_string()])
        return json.loads(json.dumps(fields))  # as a file has it


def default_options(verb: str, label_key: str = "cell_type", text: str = "") -> dict[str, Any]:
    """The options of a verb where the command gives none but the column of an audit, and the text of a search."""
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
    """A range of rows of a source, the decision how to read it, and the file to write.

    `labels` is the partition of the same rows that `annotate` wrote, whose labels `explain` explains.
    """

    job: Job
    source: Source
    choice: "InputChoice"
    start: int
    stop: int
    path: Path
    labels: Path | None = None

    def __str__(self) -> str:
        return f"{self.source.path}, cells {self.start:,} to {self.stop - 1:,}"

    def pieces(self) -> list["Partition"]:
        """The smallest partitions of the same rows; where the partitions of labels bound them, this one."""
        from scmmgpt.passes_scmmgpt import SORTED_CELLS

        if self.labels is not None:
            return [self]
        starts = range(self.start, self.stop, SORTED_CELLS)
        bounds = [(start, min(start + SORTED_CELLS, self.stop)) for start in starts]
        return [replace(self, start=a, stop=b, path=self.path.with_name(file_name(a, b))) for a, b in bounds]


def file_name(start: int, stop: int) -> str:
    """The name of the file of a partition.

    >>> file_name(0, 4096), rows_of(Path(file_name(0, 4096)))
    ('000000000000-000000004096.parquet', (0, 4096))
    """
    return f"{start:012d}-{stop:012d}.parquet"


def rows_of(path: Path) -> tuple[int, int]:
    """First row of a partition, and the row after the last, by the name of its file."""
    start, _, stop = path.stem.partition("-")
    return int(start), int(stop)


@dataclass
class Computed:
    """Results of some cells: columns of `obs`, arrays `(n_cells, n)`, and sums over cells."""

    columns: Arrays = field(default_factory=dict)
    arrays: Arrays = field(default_factory=dict)
    sums: Arrays = field(default_factory=dict)


def prepare(job: Job, source: Source) -> None:
    """Load what partitions of a source need, before the first is there; they tell what is wrong, if it fails."""
    with contextlib.suppress(Exception), _COMPUTING:
        _load(job.model, job.device, job.batch_size)
        source.open_rows(0, 1)


def compute_partition(task: Partition) -> int:
    """Compute the results of a partition and write them, whole, unless they are there; returns the number of cells.

    They are there if a worker was lost after it had written them, and before anybody knew.
    """
    if task.path.is_file():
        return task.stop - task.start
    with _COMPUTING, one_thread():
        pipeline = _load(task.job.model, task.job.device, task.job.batch_size)
        choice = replace(task.choice, report=copy.deepcopy(task.choice.report))  # which grows
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
    """Decisions that need all cells of a source, or all their labels, before the first partition is computed.

    `labels` are those that `explain` explains, and `annotated` is the job that gave them.
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
    """What the cells of a source told, which [`labelling_of`] puts back."""
    found: Arrays = {}
    if (near := labelling.neighbours) is not None:
        found = {"scores": near.scores, "novelty": near.novelty}
        found |= {} if near.types is None else {"types": near.types}
    if (file := labelling.file) is not None:
        found |= {"means": file.means, "n_cells": file.n_cells}
    if labelling.prior is not None:
        found["prior"] = labelling.prior
    return found


def compute_part(
    pipeline: "ScMMGPTPipeline",
    part: Any,
    choice: "InputChoice",
    job: Job,
    decided: Arrays,
    labels: np.ndarray | None = None,
) -> Computed:
    """The results of some cells of the data that `choice` was made for."""
    options = job.options
    if job.verb == "embed":
        return Computed(arrays={"embedding": pipeline.embed_cells(part, choice, options["of"])})
    if job.verb == "search" and "like" in decided:
        return Computed({"search0": pipeline.compare_with_cells(part, choice, decided["like"])[:, 0]})
    if job.verb == "search":
        found = pipeline.search_cells(part, choice, options["text"], options["by"])
        return Computed({f"search{i}": column for i, column in enumerate(found.T)})
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
    """The settings of `annotate` with some options."""
    names = ("labels", "cl_ids", "matching_weight", "tissue")
    return pipeline.annotation_settings(**{name: options.get(name) for name in names})


def labelling_of(
    pipeline: "ScMMGPTPipeline", choice: "InputChoice", options: Mapping[str, Any], decided: Arrays
) -> "Labelling":
    """Decisions of `annotate` or `audit` for all partitions, with what the cells of the whole source told."""
    settings = settings_of(pipeline, options)
    decisions = options.get("min_score"), None, options.get("error_rate")
    labelling = pipeline.labelling(choice, settings, options.get("labels") is None, *decisions)
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
    """The labelling of a source, which is solved for its genes once in a process."""
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
    """Keep the labelling that decisions were taken with, for this process and for joining; returns the decisions."""
    _LABELLING[:] = [(_labelling_key(pipeline, choice, options, decided), labelling)]
    return decided


def _labelling_key(
    pipeline: "ScMMGPTPipeline", choice: "InputChoice", options: Mapping[str, Any], decided: Arrays
) -> Any:
    return pipeline, options, choice.match.ids.tobytes(), {name: array.tobytes() for name, array in decided.items()}


# -- the process ------------------------------------------------------------------------------------------------------

_LOADED: "list[tuple[tuple[str, str | None, int | None], ScMMGPTPipeline]]" = []  # the checkpoint of this process
_LABELLING: "list[tuple[Any, Labelling]]" = []  # the last in this process, and what it was made of


@contextlib.contextmanager
def using(pipeline: "ScMMGPTPipeline", job: Job) -> Iterator[None]:
    """Let this process take the pipeline that is loaded already, and each labelling that it has once, for a job."""
    _LOADED[:] = [((job.model, job.device, job.batch_size), pipeline)]
    try:
        yield
    finally:
        _LOADED.clear()
        _LABELLING.clear()


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


# -- files ------------------------------------------------------------------------------------------------------------


def write_decided(folder: Path, decided: Arrays) -> None:
    """Write the arrays that all partitions of a folder share, such as the names of labels."""
    folder.mkdir(parents=True, exist_ok=True)
    with whole_file(folder / DECIDED) as temporary:
        np.savez(temporary, **cast(dict[str, Any], decided))


def read_decided(folder: Path) -> Arrays:
    """The arrays that [`write_decided`] wrote for the partitions of a folder."""
    with np.load(folder / DECIDED, allow_pickle=False) as arrays:
        return dict(arrays)


def write_partition(path: Path, names: Any, computed: Computed, counted: Mapping[str, Any]) -> None:
    """Write the results of a partition as Parquet: `barcode`, a column each, and lists of a fixed size for arrays.

    Checksums tell whether the disk has all of it, so that no worker waits for the disk.
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
    """Let a function that reads a partition remove one that is damaged, so that it is computed again."""

    @functools.wraps(read)
    def checked(path: Path, *args: Any) -> Any:
        try:
            return read(path, *args)
        except MemoryError:
            raise
        except Exception as error:  # Arrow raises many types
            if isinstance(error, OSError) and error.errno not in (None, errno.ENOENT):
                raise  # the disk or the network failed: this says nothing about the file
            path.unlink(missing_ok=True)
            raise ValueError(
                f"The partition {path} was damaged ({' '.join(str(error).split())[:100]}) and is removed. The same "
                "command computes it again."
            ) from error

    return checked


@dataclass
class Found:
    """What a partition holds beside its arrays.

    Args:
        counted: Numbers counted in its cells.
        totals: Sums over the cells that have numbers, of each array: as many as it has columns.
        columns: Columns of `obs`.
        is_same: Whether its cells have the names that were asked for, in order.
    """

    counted: dict[str, Any]
    totals: dict[str, list[float]]
    columns: Arrays
    is_same: bool


@_whole
def read_found(path: Path, names: "pd.Index") -> Found:
    """What a partition holds beside its arrays, and whether it is of the cells with these names."""
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
    """Columns of a partition, all by default; text is str, arrays are `(n_cells, n)`."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        return _arrays_in(file.read(None if names is None else list(names), use_threads=False))


def _arrays_in(table: Any) -> Arrays:
    """The columns of an Arrow table as arrays."""
    import pyarrow as pa

    found = {}
    for name in table.column_names:
        column = table[name].combine_chunks()
        if pa.types.is_fixed_size_list(column.type):
            values = column.flatten().to_numpy(zero_copy_only=False).reshape(-1, column.type.list_size)
        elif pa.types.is_string(column.type):
            words = column.dictionary_encode()
            values = np.array(words.dictionary.to_pylist(), dtype=str)[words.indices.to_numpy()]
        else:
            values = column.to_numpy(zero_copy_only=False)
        found[name] = values
    return found


def is_whole(path: Path) -> bool:
    """Whether a partition is there and undamaged; one that is damaged is removed."""
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
    """The sums over the cells of a partition."""
    with np.load(path.with_suffix(".npz"), allow_pickle=False) as arrays:
        return dict(arrays)
