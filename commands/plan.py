"""Estimate time, memory and storage of a command for many cells, from costs measured on this machine.

A sample of the cells of a file is computed as a worker computes a partition: by one CPU thread, or by one GPU. On a
CPU, the CPU time is measured, not the wall time, so that other programs do not matter. Costs that grow with the number
of cells are divided by the number of sampled cells. One process copies the input (during the computation) and joins
the results (after it), whatever the number of workers. These two steps limit the number of useful workers.
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


SAMPLE, LARGEST_SAMPLE = 256, 8192  # initial and largest number of cells of a sample
SAMPLES = 64  # most samples
PATIENCE = 3  # the measurement ends after this multiple of the requested seconds by the clock
GROWTH = 4  # a sample grows by this factor if the larger sample still fits the requested seconds
BUSY = 1.25  # ratio of wall time to CPU time from which the machine is reported as busy
WRITTEN = 2**25  # bytes written to measure the disk
INDEX_OVERHEAD = 12  # bytes per cell of an index, plus one per dimension (tests/benchmarks/vector_indexes.py)


@dataclass
class Costs:
    """Costs of a cell, and of a process, on this machine."""

    seconds: float  # per cell: CPU time of one thread, or time of one GPU
    clock_seconds: float  # per cell: wall time, with waits for the disk and for other programs
    load_seconds: float  # to load the checkpoint
    input_bytes: float  # per cell
    result_bytes: float  # per cell: new columns and arrays
    partition_bytes: float  # per cell: new columns and arrays in Parquet
    worker_bytes: int  # peak memory of a process that has computed the sample
    disk_rate: float  # bytes per second, written and synced
    dimensions: int  # of an embedding; 0 for other results
    n_cells: int  # cells of the source
    n_sampled: int  # timed cells
    device: str


def measure(job: Job, pipeline: ScMMGPTPipeline, source: Source, load_seconds: float, seconds: float) -> Costs:
    """Measure the costs on cells spread over a source.

    The first sample warms up the process and is not timed.

    Args:
        load_seconds: Measured time to load the checkpoint.
        seconds: Time to measure.

    Raises:
        ValueError: If `obs` lacks the label column of an audit.
    """
    cells = source.open()
    choice = pipeline.processor.choose_input(cells, **job.reading)
    if job.verb == "audit" and job.options["label_key"] not in cells.obs:
        raise ValueError(f"obs has no column {job.options['label_key']!r}; --label-key names one.")
    n_cells, decided = cells.shape[0], decide(pipeline, cells, choice, job)
    kernels_pay(WARM_UP_CELLS)  # load the compiled loops, as a worker does
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
            if GROWTH * cost <= seconds and size < min(LARGEST_SAMPLE, n_cells):  # overhead dominates small samples
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
    """Peak memory of this process in bytes."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if os.uname().sysname == "Darwin" else peak * 1024


def plan(costs: Costs, n_cells: int, workers: int) -> dict[str, Any]:
    """Estimate the resources for a number of cells and workers.

    Times assume that workers do not slow each other down, and that the storage delivers `read_rate_mb_s`.
    `useful_workers` is the number of workers at which computing takes as long as copying or joining.
    """
    copied = n_cells * costs.input_bytes / costs.disk_rate  # seconds, during the computation
    joined = n_cells * 2 * costs.result_bytes / costs.disk_rate  # seconds; results are read and written once more
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


# Entry of a plan -> title of its line, and unit.
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
    """Format the measured costs, and a plan for each number of workers.

    Args:
        n_cells: Number of cells; None: the cells of the source.

    Returns:
        JSON-able dict of `measured` and `plans`, and lines of text.
    """
    plans = [plan(costs, n_cells or costs.n_cells, number) for number in workers]
    measured = {
        name: value if isinstance(value, int | str) else float(f"{value:.4g}") for name, value in asdict(costs).items()
    }
    busy = f"by the clock {1e3 * costs.clock_seconds:.3g} ms a cell: the machine was busy, or its disk slow"
    one, device = plans[0], "GPU" if "cuda" in costs.device else "thread"
    useful = one["useful_workers"]
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
        f"More than {useful:,} worker{'' if useful == 1 else 's'} "
        f"{'does' if useful == 1 else 'do'} not help: one process copies the input and joins results.",
        f"A partition of {CELLS_PER_PARTITION:,} cells takes {_with_unit(one['partition_seconds'] / 3600, 'h')}, the "
        "most that a worker loses if the run stops. `--cells-per-partition` changes it.",
    ]
    return {"measured": measured, "plans": plans}, lines


def _with_unit(number: float, unit: str) -> str:
    """Format a number with its unit; short times in hours become minutes or seconds.

    >>> _with_unit(0.072, "h"), _with_unit(12.7, "h"), _with_unit(1e7, ""), _with_unit(20.88, " GB")
    ('4.3 min', '12.7 h', '10,000,000', '20.9 GB')
    """
    if unit != "h":
        return f"{number:,.0f}{unit}" if number == int(number) else f"{number:,.1f}{unit}"
    for size, name in ((1, "h"), (1 / 60, "min")):
        if number >= size:
            return f"{number / size:,.1f} {name}"
    return f"{3600 * number:.0f} s"
