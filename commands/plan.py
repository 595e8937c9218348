"""Time, memory and storage that a command over cells takes for many of them, from costs measured on this machine.

A sample of the cells of a file is computed as a worker computes a partition: by one thread of a CPU, or by one GPU.
The time of a CPU is counted, not that of the clock, so that other programs of the machine do not matter.
Everything that grows with the cells is divided by the cells of the sample. What is one process's work whatever the
number of workers, copying the input (while results are computed) and joining the results, bounds the use of more.
"""

import os
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scmmgpt.commands.options import CELLS_PER_PARTITION
from scmmgpt.commands.partition_tasks import Computed, Job, compute_part, decide, one_thread, write_partition
from scmmgpt.commands.sources import Source
from scmmgpt.kernels_scmmgpt import WARM_UP_CELLS, kernels_pay
from scmmgpt.pipeline_scmmgpt import ScMMGPTPipeline


SAMPLE, LARGEST_SAMPLE = 256, 8192  # cells that are computed at a time: more where that is a moment
SAMPLES = 64  # at most
PATIENCE = 3  # times the seconds that are asked for, on a machine that others use
GROWTH = 4  # of a sample, where that many times its seconds are at most those that are asked for
BUSY = 1.25  # the time by the clock over that of the CPU, from which on it is said
WRITTEN = 2**25  # bytes that are written to measure the disk
INDEX_OVERHEAD = 12  # bytes a cell of an index, beside one for each dimension (tests/benchmarks/vector_indexes.py)


@dataclass
class Costs:
    """Costs of a cell, and of a process, on this machine."""

    seconds: float  # of one thread of a CPU, waits left out, or of one GPU
    clock_seconds: float  # the same by the clock, with waits for the disk and for other programs
    load_seconds: float  # of a checkpoint
    input_bytes: float
    result_bytes: float  # of the columns and arrays that a cell gets
    partition_bytes: float  # of the same in Parquet
    worker_bytes: int  # memory of a process that has computed the sample
    disk_rate: float  # bytes a second, written and synced
    dimensions: int  # of an embedding; 0 for annotations
    n_cells: int  # of the source
    n_sampled: int
    device: str


def measure(job: Job, pipeline: ScMMGPTPipeline, source: Source, load_seconds: float, seconds: float) -> Costs:
    """Compute cells from all over a source for some seconds; the first sample warms up, and is not timed."""
    cells = source.open()
    choice = pipeline.processor.choose_input(cells, **job.reading)
    if job.verb == "audit" and job.options["label_key"] not in cells.obs:
        raise ValueError(f"obs has no column {job.options['label_key']!r}; --label-key names one.")
    n_cells, decided = cells.shape[0], decide(pipeline, cells, choice, job)
    kernels_pay(WARM_UP_CELLS)  # as in a worker: the first sample loads the compiled loops
    size, n_sampled, n_written = min(SAMPLE, n_cells), 0, 0
    computed, spent, elapsed, began = Computed(), 0.0, 0.0, time.perf_counter()
    with one_thread(), tempfile.TemporaryDirectory() as folder:
        for i in range(SAMPLES):
            start = int((n_cells - size) * i / SAMPLES)
            clock, cpu = time.perf_counter(), time.process_time()
            part = source.open_rows(start, start + size)
            computed = compute_part(pipeline, part, choice, job, decided)
            path = Path(folder) / f"{i}.parquet"
            write_partition(path, part.obs_names, computed, {})
            n_written, rows = path.stat().st_size, part.shape[0]
            clock, cpu = time.perf_counter() - clock, time.process_time() - cpu
            cost = cpu if pipeline.device.type == "cpu" else clock
            if i:
                spent, elapsed, n_sampled = spent + cost, elapsed + clock, n_sampled + rows
            if i and (spent > seconds or time.perf_counter() - began > PATIENCE * seconds):
                break
            if GROWTH * cost <= seconds and size < min(LARGEST_SAMPLE, n_cells):  # a start costs the small ones most
                size, n_sampled, spent, elapsed = min(GROWTH * size, LARGEST_SAMPLE, n_cells), 0, 0.0, 0.0
        rate = _disk_rate(Path(folder))
    columns, arrays = computed.columns, computed.arrays
    sizes = [values.nbytes for values in arrays.values()]
    sizes += [4 * rows if values.dtype.kind == "U" else values.nbytes for values in columns.values()]  # categories
    return Costs(
        seconds=spent / n_sampled,
        clock_seconds=elapsed / n_sampled,
        load_seconds=load_seconds,
        input_bytes=source.fingerprint()["bytes"] / n_cells,
        result_bytes=sum(sizes) / rows,
        partition_bytes=n_written / rows,
        worker_bytes=_resident(),
        disk_rate=rate,
        dimensions=arrays["embedding"].shape[1] if "embedding" in arrays else 0,
        n_cells=n_cells,
        n_sampled=n_sampled,
        device=str(pipeline.device),
    )


def _disk_rate(folder: Path) -> float:
    block, began = os.urandom(WRITTEN), time.perf_counter()
    with (folder / "block").open("wb") as file:
        file.write(block)
        os.fsync(file.fileno())
    return WRITTEN / (time.perf_counter() - began)


def _resident() -> int:
    """Bytes of memory of this process, at most so far."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if os.uname().sysname == "Darwin" else peak * 1024


def plan(costs: Costs, n_cells: int, workers: int) -> dict[str, Any]:
    """What a number of cells takes with a number of workers.

    Times take workers that do not disturb each other, and a store that keeps up with all of them: `read_rate` says
    how fast it must be. `useful_workers` is the number at which computing takes as long as copying or joining.
    """
    copied = n_cells * costs.input_bytes / costs.disk_rate  # while results are computed
    joined = n_cells * 2 * costs.result_bytes / costs.disk_rate  # read and written once more
    computed = costs.load_seconds + n_cells * costs.seconds / workers
    stored = {
        "input_gb": n_cells * costs.input_bytes,
        "partitions_gb": n_cells * costs.partition_bytes,
        "output_gb": n_cells * (costs.input_bytes + costs.result_bytes),
        "index_gb": n_cells * (costs.dimensions + INDEX_OVERHEAD) if costs.dimensions else 0,
    }
    return {
        "cells": n_cells,
        "workers": workers,
        "compute_hours": round(computed / 3600, 5),
        "copy_hours": round(copied / 3600, 5),
        "join_hours": round(joined / 3600, 5),
        "partition_seconds": round(CELLS_PER_PARTITION * costs.seconds, 1),
        "hours": round((max(computed, copied) + joined) / 3600, 5),
        "worker_hours": round(workers * computed / 3600, 2),
        "useful_workers": max(1, int(n_cells * costs.seconds / max(copied, joined, 1e-9))),
        "memory_gb": round(workers * costs.worker_bytes / 1e9, 1),
        "read_rate_mb_s": round(workers * costs.input_bytes / costs.seconds / 1e6, 1),
        **{name: round(size / 1e9, 2) for name, size in stored.items()},
    }


# Entry of a plan -> its line, and the unit of its number.
_LINES = {
    "cells": ("cells", ""),
    "workers": ("workers", ""),
    "hours": ("time in all", "h"),
    "compute_hours": ("  computing", "h"),
    "copy_hours": ("  copying the input, meanwhile", "h"),
    "join_hours": ("  joining the results, afterwards", "h"),
    "worker_hours": ("time of all workers", "h"),
    "memory_gb": ("memory of all workers", " GB"),
    "read_rate_mb_s": ("read by all workers, a second", " MB"),
    "input_gb": ("input on disk", " GB"),
    "partitions_gb": ("partitions on disk, until the end", " GB"),
    "output_gb": ("output on disk", " GB"),
    "index_gb": ("index of the embeddings, if built", " GB"),
}


def describe_plan(costs: Costs, n_cells: int | None, workers: list[int]) -> tuple[dict[str, Any], list[str]]:
    """The measured costs and a plan for each number of workers, as data and as lines."""
    plans = [plan(costs, n_cells or costs.n_cells, number) for number in workers]
    measured = {
        name: value if isinstance(value, int | str) else float(f"{value:.4g}") for name, value in asdict(costs).items()
    }
    busy = f"by the clock {1e3 * costs.clock_seconds:.3g} ms a cell: the machine was busy, or its disk slow"
    one, device = plans[0], "GPU" if "cuda" in costs.device else "thread"
    lines = [
        f"measured on {costs.n_sampled:,} cells by one {device}: "
        f"{1e3 * costs.seconds:.3g} ms a cell; {costs.load_seconds:.1f} s to load the checkpoint; "
        f"{costs.worker_bytes / 1e9:.1f} GB of memory a worker; {costs.disk_rate / 1e6:,.0f} MB/s to disk",
        *([] if costs.clock_seconds < BUSY * costs.seconds else [busy]),
        *(
            f"{line:<36}" + "".join(f"{_with_unit(entry[name], unit):>14}" for entry in plans)
            for name, (line, unit) in _LINES.items()
            if one[name]
        ),
        f"More than {one['useful_workers']:,} workers do not help: one process copies the input and joins results.",
        f"A partition of {CELLS_PER_PARTITION:,} cells takes {_with_unit(one['partition_seconds'] / 3600, 'h')}: what "
        "a stop or a lost worker costs each worker at most. `--cells-per-partition` makes it shorter.",
    ]
    return {"measured": measured, "plans": plans}, lines


def _with_unit(number: float, unit: str) -> str:
    """A number as a person reads it; hours as seconds or minutes, if they are few.

    >>> _with_unit(0.072, "h"), _with_unit(12.7, "h"), _with_unit(1e7, ""), _with_unit(20.88, " GB")
    ('4.3 min', '12.7 h', '10,000,000', '20.9 GB')
    """
    if unit != "h":
        return f"{number:,.0f}{unit}" if number == int(number) else f"{number:,.1f}{unit}"
    for size, name in ((1, "h"), (1 / 60, "min")):
        if number >= size:
            return f"{number / size:,.1f} {name}"
    return f"{3600 * number:.0f} s"
