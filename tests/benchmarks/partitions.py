"""Cost a cell and memory of `embed` or `annotate` in partitions, for numbers of cells and workers.

    python tests/benchmarks/partitions.py --source cells.h5ad --cells 10000 100000 --workers 1 2

Cells of the source are repeated; `--source synthetic` draws them over the forty genes of the tiny model. The model is
the tiny one with random weights unless `--model` names a checkpoint, so that the time is mostly that of reading,
partitions, workers and joining. Memory is the peak of the resident memory of the command and of its largest worker,
polled. Writes one JSON object a line.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import anndata
import psutil

from scmmgpt import synthetic


def tile(source: Path, n_cells: int, path: Path) -> None:
    """Repeat the cells of a file until there are `n_cells`."""
    adata = anndata.read_h5ad(source)
    adata = anndata.AnnData(adata.X, obs=adata.obs[[]], var=adata.var[[]])
    tiled = anndata.concat([adata] * -(-n_cells // adata.n_obs), index_unique="-")[:n_cells].copy()
    tiled.write_h5ad(path)


def watch(process: subprocess.Popen) -> dict[str, float]:
    """Seconds, CPU seconds and peak memory of a command and its workers."""
    start, peaks, cpu = time.perf_counter(), {"command": 0, "worker": 0}, {}
    while process.poll() is None:
        try:
            main = psutil.Process(process.pid)
            for member in [main, *main.children(recursive=True)]:
                kind = "command" if member.pid == process.pid else "worker"
                peaks[kind] = max(peaks[kind], member.memory_info().rss)
                cpu[member.pid] = sum(member.cpu_times()[:2])
        except psutil.NoSuchProcess:
            pass
        time.sleep(0.2)
    seconds = time.perf_counter() - start
    memory = {f"{kind}_mb": round(peak / 2**20) for kind, peak in peaks.items()}
    return {"seconds": round(seconds, 1), "cpu_seconds": round(sum(cpu.values()), 1), **memory}


def main() -> None:
    """Measure all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--cells", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--model")
    parser.add_argument("--verb", choices=("embed", "annotate"), default="embed")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.model is None:
            made = synthetic.tiny_pipeline() if args.verb == "embed" else synthetic.fitted_pipeline()
            made.save_pretrained(folder / "checkpoint")
            args.model = str(folder / "checkpoint")
        for n_cells in args.cells:
            if args.source.name == "synthetic":
                synthetic.synthetic_adata(n_cells).write_h5ad(folder / "cells.h5ad")
            else:
                tile(args.source, n_cells, folder / "cells.h5ad")
            for workers in args.workers:
                out = str(folder / "out.h5ad")
                words = [args.verb, str(folder / "cells.h5ad"), "--model", args.model, "-o", out, "--quiet"]
                words += ["--workers", str(workers), "--cells-per-partition", "8192", "--force"]
                command = [sys.executable, "-m", "scmmgpt", *words]
                process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                found = watch(process)
                found["exit"] = process.returncode
                sys.stdout.write(json.dumps({"cells": n_cells, "workers": workers, **found}) + "\n")
                sys.stdout.flush()


if __name__ == "__main__":
    main()
