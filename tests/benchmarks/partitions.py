"""Cost a cell and memory of `embed` or `annotate` in partitions, for numbers of cells and workers.

    python tests/benchmarks/partitions.py --source cells.h5ad --cells 10000 100000 --workers 1 2

Cells of the source are repeated; `--source synthetic` draws them over the forty genes of the tiny model. The model is
the tiny one with random weights unless `--model` names a checkpoint, so that the time is mostly that of reading,
partitions, workers and joining. Memory is the peak of the resident memory of the command and of its largest worker,
polled; the scheduler of workers runs in the command. Files of cells stay in `--folder`, if one is given, for the next
call; with no `--workers` they are made and nothing is measured. Writes one JSON object a line.
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
    """Repeat the cells of a file until there are `n_cells`, on disk."""
    adata = anndata.read_h5ad(source)
    adata = anndata.AnnData(adata.X, obs=adata.obs[[]], var=adata.var[[]])
    whole, rest = path.with_suffix(".whole.h5ad"), path.with_suffix(".rest.h5ad")
    adata.write_h5ad(whole)
    adata[: n_cells % adata.n_obs].copy().write_h5ad(rest)
    tiles = [whole] * (n_cells // adata.n_obs) + [rest] * (n_cells % adata.n_obs > 0)
    anndata.experimental.concat_on_disk(tiles, path, index_unique="-")
    whole.unlink(), rest.unlink()


def watch(process: subprocess.Popen, parts: Path) -> dict[str, float]:
    """Seconds, CPU seconds and peak memory of a command and its workers.

    `first` and `last` are the seconds at which the first and the last of the partitions in `parts` are there;
    `half_mb` is the peak of the largest worker until half of the time between them.
    """
    start, cpu, seen = time.perf_counter(), {}, [(0.0, 0)]
    peaks: dict[str, list[tuple[float, int]]] = {"command": [(0.0, 0)], "worker": [(0.0, 0)]}
    while process.poll() is None:
        now = time.perf_counter() - start
        try:
            main = psutil.Process(process.pid)
            for member in [main, *main.children(recursive=True)]:
                kind = "command" if member.pid == process.pid else "worker"
                peaks[kind].append((now, member.memory_info().rss))
                cpu[member.pid] = sum(member.cpu_times()[:2])
        except psutil.NoSuchProcess:
            pass
        if (n := len(list(parts.glob("*/*.parquet")))) > seen[-1][1]:
            seen.append((now, n))
        time.sleep(0.4)
    seconds = time.perf_counter() - start
    first, last = seen[min(1, len(seen) - 1)][0], seen[-1][0]
    memory = {f"{kind}_mb": round(max(rss for _, rss in found) / 2**20) for kind, found in peaks.items()}
    half = max(rss for when, rss in peaks["worker"] if when <= (first + last) / 2)
    times = {"seconds": seconds, "first": first, "last": last, "cpu_seconds": sum(cpu.values())}
    return {name: round(value, 1) for name, value in times.items()} | memory | {"half_mb": round(half / 2**20)}


def main() -> None:
    """Measure all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--cells", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--cells-per-partition", default="8192")
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
            path = (args.folder or folder) / f"{args.source.stem}-{n_cells}.h5ad"
            if path.is_file():
                pass
            elif args.source.name == "synthetic":
                synthetic.synthetic_adata(n_cells).write_h5ad(path)
            else:
                tile(args.source, n_cells, path)
            for workers in args.workers:
                out = str(path.with_suffix(".out.h5ad"))
                words = [args.verb, str(path), "--model", args.model, "-o", out, "--quiet"]
                words += ["--workers", str(workers), "--cells-per-partition", args.cells_per_partition, "--force"]
                command = [sys.executable, "-m", "scmmgpt", *words]
                process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                found = watch(process, Path(f"{out}.parts"))
                found["exit"] = process.returncode
                Path(out).unlink(missing_ok=True)
                sys.stdout.write(json.dumps({"cells": n_cells, "workers": workers, **found}) + "\n")
                sys.stdout.flush()


if __name__ == "__main__":
    main()
