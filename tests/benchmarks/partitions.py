"""Cost a cell, gain of workers and memory of `embed` and `annotate` in partitions, for numbers of cells and workers.

    python tests/benchmarks/partitions.py --source cells.h5ad --model . --folder TILES --verb embed annotate \
        --cells 10000 100000 1000000 --workers 1 2

Cells of the source are repeated; `--source synthetic` draws them over the forty genes of the tiny model. The model is
the tiny one with random weights unless `--model` names a checkpoint, so that the time is mostly that of reading,
partitions, workers and joining. Files of cells stay in `--folder`, if one is given, for the next call; with no
`--workers` they are made and nothing is measured. `--cluster` starts a Dask scheduler and workers as processes of
their own, where `--workers` alone has the scheduler in the command. With `--repeats`, the run of median cost a cell
stands for all runs of a size.

Writes one JSON object for each run, and a table at the end:

- `seconds`, `first`, `last`: of the whole command, and until the first and the last partition are there.
- `cost_ms`: processor time of all processes between the first and the last partition, for each cell between.
- `command_mb`, `worker_mb`, `scheduler_mb`: peaks of resident memory, of a worker that of the largest.
- `worker_quarters_mb`, ...: means of the resident memory over the first and the last quarter of that time.

The table adds the gain of more workers over the fewest (of the whole command, and of computing alone), and the spread
of `cost_ms` over numbers of cells: largest less smallest, over the smallest, for each number of workers.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import psutil

from scmmgpt import synthetic
from scmmgpt.tests.clusters import DaskCluster, dask_cluster


POLL_SECONDS = 0.05
Series = dict[tuple[str, int], list[tuple[float, float, int]]]  # kind, process -> time, CPU seconds, bytes


def tile(source: Path, n_cells: int, path: Path) -> None:
    """Repeat the cells of a file until there are `n_cells`, on disk, with little in memory."""
    adata = anndata.read_h5ad(source)
    matrix, copies = adata.X.tocsr(), -(-n_cells // adata.n_obs)
    names = np.concatenate([np.char.add(adata.obs_names.to_numpy(str), f"-{i}") for i in range(copies)])[:n_cells]
    temporary = path.with_suffix(".partial")
    with h5py.File(temporary, "w") as file:
        anndata.io.write_elem(file, "/", anndata.AnnData(obs=pd.DataFrame(index=names), var=adata.var[[]]))
        anndata.io.write_elem(file, "X", matrix[:0])
        group, lengths = file["X"], np.resize(np.diff(matrix.indptr), n_cells)
        group.attrs["shape"] = (n_cells, adata.n_vars)
        del group["data"], group["indices"], group["indptr"]
        group["indptr"] = np.concatenate([[0], lengths.cumsum(dtype=np.int64)])
        for name, values in (("data", matrix.data), ("indices", matrix.indices)):
            stored = group.create_dataset(name, (int(lengths.sum(dtype=np.int64)),), values.dtype)
            for start in range(0, len(stored), len(values)):
                part = values[: len(stored) - start]
                stored[start : start + len(part)] = part
    temporary.replace(path)


class Watch:
    """Time, processor time and memory of a command, its workers and a scheduler, polled.

    Args:
        process: The command.
        parts: The folder of its partitions.
        cluster: Where it computes, if it starts no workers itself.
    """

    def __init__(self, process: subprocess.Popen, parts: Path, cluster: DaskCluster | None) -> None:
        self.process, self.parts, self.cluster = process, parts, cluster
        self.series: Series = defaultdict(list)
        self.written: dict[str, tuple[float, int]] = {}  # partition -> time, cells
        self.began = time.time()
        while process.poll() is None:
            self._poll()
            time.sleep(POLL_SECONDS)
        self.seconds = time.time() - self.began

    def _poll(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            self._add("command", command := psutil.Process(self.process.pid))
            if self.cluster is None:
                for child in command.children(recursive=True):
                    self._add("worker", child)
            else:
                self._add("scheduler", psutil.Process(self.cluster.scheduler.pid))
                for worker in self.cluster.workers():
                    self._add("worker", worker)
        for path in self.parts.glob("*/[0-9]*.parquet"):
            with contextlib.suppress(FileNotFoundError):
                if path.name not in self.written:
                    start, stop = map(int, path.stem.split("-"))
                    self.written[path.name] = path.stat().st_mtime - self.began, stop - start

    def _add(self, kind: str, process: psutil.Process) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            now, spent, held = time.time() - self.began, process.cpu_times(), process.memory_info().rss
            self.series[kind, process.pid].append((now, spent.user + spent.system, held))

    def found(self) -> dict[str, Any]:
        """The numbers."""
        times = sorted(self.written.values()) or [(0.0, 0)]
        (first, n_first), last = times[0], times[-1][0]
        between = sum(n for _, n in times) - n_first
        cpu = 0.0
        for polls in self.series.values():
            when, spent, _ = zip(*polls, strict=True)
            cpu += float(np.diff(np.interp([first, last], when, spent))[0])
        found: dict[str, Any] = {"seconds": self.seconds, "first": first, "last": last}
        found = {name: round(value, 2) for name, value in found.items()}
        found["cost_ms"] = round(1e3 * cpu / between, 4) if between else None
        for kind in ("command", "worker", "scheduler"):
            polls = [(when, held) for (name, _), each in self.series.items() if name == kind for when, _, held in each]
            if polls:
                found[f"{kind}_mb"] = round(max(held for _, held in polls) / 2**20)
                found[f"{kind}_quarters_mb"] = _quarters(self.series, kind, first, last)
        return found


def _quarters(series: Series, kind: str, first: float, last: float) -> list[int | None]:
    """Mean memory of the largest process of a kind in the first and the last quarter of a time, in MB."""
    quarter, found = (last - first) / 4, []
    for start, stop in ((first, first + quarter), (last - quarter, last)):
        means = [
            np.mean([held for when, _, held in polls if start <= when <= stop])
            for (name, _), polls in series.items()
            if name == kind and any(start <= when <= stop for when, _, _ in polls)
        ]
        found.append(round(float(max(means)) / 2**20) if means else None)
    return found


def table(runs: list[dict[str, Any]]) -> list[str]:
    """Lines of a table of all runs, and of the spread of costs."""
    head = ["verb", "cells", "workers", "seconds", "cells/s", "gain", "gain computing", "CPU ms a cell"]
    head += ["command MB", "worker MB, first and last quarter", "scheduler MB, first and last quarter"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for run in runs:
        same = [other for other in runs if (other["verb"], other["cells"]) == (run["verb"], run["cells"])]
        fewest = min(same, key=lambda other: other["workers"])
        computing, least = run["last"] - run["first"], fewest["last"] - fewest["first"]
        gains = ["", ""] if run is fewest else [_ratio(fewest["seconds"], run["seconds"]), _ratio(least, computing)]
        quarters = [
            f"{run[f'{kind}_mb']}: {' '.join(map(str, run[f'{kind}_quarters_mb']))}" if f"{kind}_mb" in run else ""
            for kind in ("worker", "scheduler")
        ]
        cells = [
            run["verb"],
            f"{run['cells']:,}",
            run["workers"],
            run["seconds"],
            f"{run['cells'] / run['seconds']:,.0f}",
        ]
        cells += [*gains, run["cost_ms"], run["command_mb"], *quarters]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    for verb, workers in dict.fromkeys((run["verb"], run["workers"]) for run in runs):
        costs = [r["cost_ms"] for r in runs if (r["verb"], r["workers"]) == (verb, workers) and r["cost_ms"]]
        if len(costs) > 1:
            spread = max(costs) / min(costs) - 1
            lines.append(
                f"{verb}, workers {workers}: {min(costs)} to {max(costs)} ms a cell, a spread of {spread:.1%}"
            )
    return lines


def _ratio(one: float, other: float) -> str:
    return f"{one / other:.2f}" if other > 0 else ""


def median_run(words: list[str], out: Path, cluster: DaskCluster | None, repeats: int) -> dict[str, Any]:
    """The run of median cost a cell among `repeats` runs: 10,000 cells are computed in less than a second."""
    runs = [measure(words, out, cluster) for _ in range(repeats)]
    return sorted(runs, key=lambda run: run["cost_ms"] or 0.0)[repeats // 2]


def measure(words: list[str], out: Path, cluster: DaskCluster | None) -> dict[str, Any]:
    """Run a command of `scmmgpt` that writes `out`, which is removed."""
    where = [] if cluster is None else ["--cluster", cluster.address]
    command = [sys.executable, "-m", "scmmgpt", *words, "-o", str(out), "--quiet", "--force", *where]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # an installation does not compile its modules at each start
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)
    found = Watch(process, Path(f"{out}.parts"), cluster).found()
    out.unlink(missing_ok=True)
    return {**found, "exit": process.returncode}


def main() -> None:
    """Measure all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--cells", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--cluster", action="store_true")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--cells-per-partition", default="4096")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--model")
    parser.add_argument("--verb", choices=("embed", "annotate"), nargs="+", default=["embed"])
    args = parser.parse_args()
    runs = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.model is None:
            synthetic.fitted_pipeline().save_pretrained(folder / "checkpoint")
            args.model = str(folder / "checkpoint")
        (args.folder or folder).mkdir(parents=True, exist_ok=True)
        paths = {n: (args.folder or folder) / f"{args.source.stem}-{n}.h5ad" for n in args.cells}
        for n_cells, path in paths.items():
            if not path.is_file() and args.source.name == "synthetic":
                synthetic.synthetic_adata(n_cells).write_h5ad(path)
            elif not path.is_file():
                tile(args.source, n_cells, path)
        for workers in args.workers:
            with contextlib.ExitStack() as stack:
                cluster = stack.enter_context(dask_cluster(folder / "dask.log", workers)) if args.cluster else None
                for verb in args.verb:
                    for n_cells, path in paths.items():
                        words = [verb, str(path), "--model", args.model]
                        words += ["--cells-per-partition", args.cells_per_partition]
                        words += [] if cluster else ["--workers", str(workers)]
                        found = median_run(words, path.with_suffix(".out.h5ad"), cluster, args.repeats)
                        runs.append({"verb": verb, "cells": n_cells, "workers": workers, **found})
                        sys.stdout.write(json.dumps(runs[-1]) + "\n")
                        sys.stdout.flush()
    runs.sort(key=lambda run: (args.verb.index(run["verb"]), run["cells"], run["workers"]))
    sys.stdout.write("\n".join(table(runs) if runs else []) + "\n")


if __name__ == "__main__":
    main()
