"""Compare indexes of many embeddings: recall, time of a query, time and bytes of the index.

Only FAISS is left here; `train/LOG.md` has usearch and LanceDB, which lost.

    python tests/benchmarks/vector_indexes.py --cells 200000 --threads 1

The vectors are clusters of low rank with noise, of unit length, as embeddings of cells are: `--clusters` types, each
with `--rank` directions of its own. `--file` takes those of a real file, an `.npy`. Queries are new vectors of the
same clusters, and "far" ones, at a cosine of 0.3 to a cell, as texts are; the truth is exact search in the same run.
Each index is written, and opened again from disk in a process of its own before it is asked, so that the memory is
that of an open index. Writes one JSON object a line.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np


TOP_K, N_QUERIES, DIMENSIONS = 10, 200, 256


def make_vectors(n_cells: int, clusters: int, rank: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Vectors of cells, and queries."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(clusters, DIMENSIONS)).astype(np.float32)
    directions = rng.normal(size=(clusters, rank, DIMENSIONS)).astype(np.float32) / np.sqrt(rank)
    parts = []
    for start in range(0, n_cells + N_QUERIES, 50_000):
        n = min(50_000, n_cells + N_QUERIES - start)
        which = rng.integers(clusters, size=n)
        states = rng.normal(size=(n, rank)).astype(np.float32) * 0.6
        part = 0.2 * rng.normal(size=(n, DIMENSIONS)).astype(np.float32) + centres[which]
        for cluster in range(clusters):
            rows = which == cluster
            part[rows] += states[rows] @ directions[cluster]
        parts.append(part / np.linalg.norm(part, axis=1, keepdims=True))
    vectors = np.concatenate(parts)
    return vectors[:n_cells], vectors[n_cells:]


def exact(vectors: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """The true neighbours, in any order."""
    parts = (queries[i : i + 20] @ vectors.T for i in range(0, len(queries), 20))
    return np.concatenate([np.argpartition(-part, TOP_K, axis=1)[:, :TOP_K] for part in parts])


class Faiss:
    """FAISS; `factory` is the description of the index."""

    def __init__(self, factory: str, probes: int, threads: int) -> None:
        self.factory, self.probes, self.threads = factory, probes, threads

    def build(self, vectors: np.ndarray, path: Path) -> None:
        """Train and fill."""
        import faiss

        faiss.omp_set_num_threads(self.threads)
        index = faiss.index_factory(DIMENSIONS, self.factory, faiss.METRIC_INNER_PRODUCT)
        if not index.is_trained:
            index.train(vectors[:: max(1, len(vectors) // 100_000)])
        index.add(vectors)
        faiss.write_index(index, str(path))

    def open(self, path: Path) -> None:
        """Open, memory-mapped."""
        import faiss

        faiss.omp_set_num_threads(self.threads)
        self.index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
        if "IVF" in self.factory:
            faiss.extract_index_ivf(self.index).nprobe = self.probes
        else:
            self.index.hnsw.efSearch = self.probes

    def search(self, query: np.ndarray) -> np.ndarray:
        """Rows of the nearest cells."""
        return self.index.search(query[None], TOP_K)[1][0]


def _resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _measure(index: object, path: Path, queries: np.ndarray, truth: np.ndarray, answers: object) -> None:
    before = _resident()
    start = time.perf_counter()
    index.open(path)
    opened = time.perf_counter() - start
    index.search(queries[0])
    recall, times = [], []
    for query, true in zip(queries, truth, strict=True):
        start = time.perf_counter()
        found = index.search(query)
        times.append(time.perf_counter() - start)
        recall.append(len(set(found.tolist()) & set(true.tolist())) / TOP_K)
    grown = (_resident() - before) / 2**20
    answers.put(
        {
            "recall@10": round(float(np.mean(recall[:N_QUERIES])), 4),
            "recall@10_far": round(float(np.mean(recall[N_QUERIES:])), 4),
            "ms_median": round(1e3 * float(np.median(times)), 3),
            "ms_95": round(1e3 * float(np.quantile(times, 0.95)), 3),
            "open_ms": round(1e3 * opened, 1),
            "memory_mb": round(grown, 1),
        }
    )


def main() -> None:
    """Measure all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", type=int, default=200_000)
    parser.add_argument("--clusters", type=int, default=100)
    parser.add_argument("--rank", type=int, default=24)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--file")
    parser.add_argument("--only", default="")
    args = parser.parse_args()
    if args.file:
        vectors = np.load(args.file)
        vectors, queries = vectors[:-N_QUERIES], vectors[-N_QUERIES:]
    else:
        vectors, queries = make_vectors(args.cells, args.clusters, args.rank)
    n_lists = int(4 * np.sqrt(len(vectors)))
    start = time.perf_counter()
    truth = exact(vectors, queries)
    seconds = (time.perf_counter() - start) / len(queries)
    noise = np.random.default_rng(1).normal(size=queries.shape).astype(np.float32)
    far = 0.3 * queries + 0.954 * noise / np.linalg.norm(noise, axis=1, keepdims=True)
    queries, truth = np.concatenate([queries, far]), np.concatenate([truth, exact(vectors, far)])
    sys.stdout.write(
        json.dumps({"index": "exact", "cells": len(vectors), "ms_median": round(1e3 * seconds, 3)}) + "\n"
    )
    candidates = {
        f"faiss IVF{n_lists},SQ8 probes 16": Faiss(f"IVF{n_lists},SQ8", 16, args.threads),
        f"faiss IVF{n_lists},SQ8 probes 48": Faiss(f"IVF{n_lists},SQ8", 48, args.threads),
        "faiss HNSW32,SQ8 ef 64": Faiss("HNSW32_SQ8", 64, args.threads),
    }
    for name, index in candidates.items():
        if args.only not in name:
            continue
        folder = Path(tempfile.mkdtemp())
        try:
            start = time.perf_counter()
            index.build(vectors, folder / "index")
            seconds = time.perf_counter() - start
            n_bytes = sum(path.stat().st_size for path in [*folder.rglob("*")] if path.is_file())
            context = multiprocessing.get_context("spawn")
            answers = context.Queue()
            process = context.Process(target=_measure, args=(index, folder / "index", queries, truth, answers))
            process.start()
            measured = answers.get(timeout=300)
            process.join()
            per_million = 1e6 / len(vectors)
            built = {"build_s_per_million": round(seconds * per_million, 1)}
            built["bytes_per_cell"] = round(n_bytes / len(vectors), 1)
            sys.stdout.write(json.dumps({"index": name, "cells": len(vectors), **built, **measured}) + "\n")
        finally:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
