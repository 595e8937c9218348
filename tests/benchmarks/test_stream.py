"""How fast cells come from disk as tensors, against the loaders that others use. Run alone: `make benchmark`.

Synthetic data, written once to `SCMMGPT_BENCHMARK_DIR` (by default a folder in the system's temporary one): 100,000
cells of 30,000 genes, about 1,500 expressed per cell, 60 % of counts are 1. The loaders run in turns, in processes of
their own, so that other work on the machine touches all of them; ratios are medians over the rounds.
The table goes to `results/benchmarks/stream.json`. See `stream_loaders.py` for what each loader needs; what is not
there is left out.
"""

import importlib.util
import json
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest


logger = logging.getLogger(__name__)

REPOSITORY = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("stream_loaders.py")
N_CELLS = int(os.environ.get("SCMMGPT_BENCHMARK_CELLS", 100_000))
N_GENES = 30_000
ROUNDS = 3

pytestmark = pytest.mark.benchmark


def synthetic_cells(n_cells, n_genes, seed=0):
    """Cells of log-normal size over genes of Zipf-like frequency: `indptr`, `gene_ids` from 3 on, `counts`."""
    from numba import njit

    @njit
    def draw(rng, lengths, cumulated, order, indptr, gene_ids, counts):
        drawn = np.zeros(n_genes, np.uint8)
        for cell in range(len(lengths)):
            n = 0
            while n < lengths[cell]:
                gene = order[min(np.searchsorted(cumulated, rng.random()), n_genes - 1)]
                n += 1 - drawn[gene]
                drawn[gene] = 1
            i = indptr[cell]
            for gene in range(n_genes):
                if drawn[gene]:
                    count = 1
                    while rng.random() > 0.6 and count < 60_000:
                        count += 1 + count // 3
                    gene_ids[i], counts[i], drawn[gene] = gene + 3, count, 0
                    i += 1

    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.lognormal(np.log(1347), 0.502, n_cells), 50, 8000).astype(np.int64)
    indptr = np.append(0, np.cumsum(lengths))
    gene_ids, counts = np.empty(indptr[-1], np.uint16), np.empty(indptr[-1], np.uint16)
    frequency = 1 / np.arange(1, n_genes + 1) ** 0.8
    cumulated = np.cumsum(frequency / frequency.sum())
    draw(rng, lengths, cumulated, rng.permutation(n_genes), indptr, gene_ids, counts)
    return indptr, gene_ids, counts


@pytest.fixture(scope="module")
def data():
    """Folder with the data in every layout that can be measured here; what is there is not built again."""
    default = Path(tempfile.gettempdir()) / f"scmmgpt-benchmark-{N_CELLS}"
    folder = Path(os.environ.get("SCMMGPT_BENCHMARK_DIR", default))
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "corpus" / "manifest.json").exists():
        build_corpus(folder)
    build_larger_corpus(folder)
    if not (folder / "reference").exists():
        build_arrow(folder)
    if not (folder / "cells.h5ad").exists():
        build_h5ad(folder)
    if "SCMMGPT_BENCHMARK_ANNBATCH" in os.environ and not (folder / "annbatch.zarr").exists():
        run("build_annbatch", folder)
    return folder


def build_corpus(folder):
    from scmmgpt.feature_extraction_scmmgpt import Cells
    from scmmgpt.train.corpus import open_corpus, write_corpus
    from scmmgpt.train.stream import build_cache

    indptr, gene_ids, counts = synthetic_cells(N_CELLS, N_GENES)
    cells = Cells(indptr, gene_ids, counts, np.arange(N_CELLS, dtype=np.uint64))
    vocabulary = {"<pad>": 0, "<cls>": 1, "<eoc>": 2, **{f"G{i}": i for i in range(3, N_GENES + 3)}}
    rng = np.random.default_rng(0)
    obs = {
        "cell_type": [f"cell type {i}" for i in rng.integers(0, 100, N_CELLS)],
        "dataset_id": [f"dataset {i}" for i in rng.integers(0, 50, N_CELLS)],
    }
    write_corpus(folder / "corpus", vocabulary, {"train": (cells, obs)}, cells_per_shard=25_000)
    corpus = open_corpus(folder / "corpus")
    build_cache(corpus)
    build_cache(corpus, folder / "cache_zstd", compression="zstd")


def build_larger_corpus(folder):
    """A corpus of ten times the cells, whose shards are links to those of the smaller one."""
    import dataclasses

    from scmmgpt.train.corpus import Manifest, open_corpus
    from scmmgpt.train.stream import build_cache

    larger = folder / "corpus_10x"
    if (larger / "cache").exists():
        return
    (larger / "data").mkdir(parents=True, exist_ok=True)
    manifest = Manifest.read(folder / "corpus" / "manifest.json")
    n_shards, shards = 10 * len(manifest.shards), []
    for index in range(n_shards):
        shard = manifest.shards[index % len(manifest.shards)]
        path = f"data/train-{index:05d}-of-{n_shards:05d}.parquet"
        (larger / path).unlink(missing_ok=True)
        os.link(folder / "corpus" / shard.path, larger / path)
        shards.append(dataclasses.replace(shard, path=path))
    for name in ("vocab.json", "splits.json"):
        (larger / name).write_bytes((folder / "corpus" / name).read_bytes())
    dataclasses.replace(manifest, shards=shards).write(larger / "manifest.json")
    build_cache(open_corpus(larger, verify=False))


def build_arrow(folder):
    """The data set of the published scMMGPT: Arrow lists, the 2,047 largest values of each cell."""
    import datasets

    from scmmgpt.train.corpus import open_corpus

    def examples():
        corpus = open_corpus(folder / "corpus", verify=False)
        for cells, obs in corpus.iter_cells("train", ["cell_type"]):
            types = obs["cell_type"].to_pylist()
            for row in range(len(cells)):
                cell = slice(cells.indptr[row], cells.indptr[row + 1])
                genes, values = cells.gene_ids[cell].astype(np.int64), cells.counts[cell].astype(np.float32)
                if len(genes) > 2047:
                    largest = np.argpartition(values, -2047)[-2047:]
                    genes, values = genes[largest], values[largest]
                yield {"id": row, "genes": genes, "expressions": values, "cell_type": types[row]}

    kinds = {"id": "int64", "genes": ["int64"], "expressions": ["float32"], "cell_type": "string"}
    features = datasets.Features(
        {
            name: datasets.List(datasets.Value(kind[0])) if isinstance(kind, list) else datasets.Value(kind)
            for name, kind in kinds.items()
        }
    )
    built = datasets.Dataset.from_generator(examples, features=features, cache_dir=str(folder / "hf"))
    built.save_to_disk(folder / "reference")


def build_h5ad(folder):
    import anndata
    import scipy.sparse

    from scmmgpt.train.corpus import open_corpus

    cells, _ = open_corpus(folder / "corpus", verify=False).read_cells("train", [])
    matrix = scipy.sparse.csr_matrix(
        (cells.counts, cells.gene_ids.astype(np.int32), cells.indptr), shape=(len(cells), N_GENES + 3)
    )
    anndata.AnnData(matrix).write_h5ad(folder / "cells.h5ad")


def run(name, folder, **environment):
    """Measure one loader in a process of its own."""
    annbatch = "annbatch" in name
    python = os.environ["SCMMGPT_BENCHMARK_ANNBATCH"] if annbatch else sys.executable
    paths = [str(REPOSITORY.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths), **environment}
    if annbatch:
        del environment["PYTHONPATH"]
    done = subprocess.run([python, SCRIPT, name, folder], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def start(name, folder, **environment):
    return subprocess.Popen(
        [sys.executable, SCRIPT, name, folder],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY.parent), **environment},
        stdout=subprocess.PIPE,
        text=True,
    )


def available_loaders():
    names = [
        "ours_tokens",
        "ours_raw",
        "ours_raw_annotated",
        "ours_zstd_tokens",
        "ours_published_tokens",
        "annloader_raw",
        "datasets_python_tokens",
        "datasets_numpy_tokens",
    ]
    if importlib.util.find_spec("scdataset"):
        names.append("scdataset_raw")
    for variable, own in (
        ("SCMMGPT_BENCHMARK_ANNBATCH", ["annbatch_raw", "annbatch_tokens"]),
        ("SCMMGPT_BENCHMARK_REFERENCE", ["reference_tokens"]),
        ("SCMMGPT_BENCHMARK_SCGPT", ["scgpt_tokens"]),
    ):
        if variable in os.environ:
            names += own
    return names


@pytest.fixture(scope="module")
def rounds(data):
    """Measurements of every loader in every round."""
    names = available_loaders()
    found = {name: [] for name in names}
    for _ in range(ROUNDS):
        for name in names:
            found[name].append(run(name, data))
    write_results(loaders=found)
    return found


def write_results(**sections):
    path = REPOSITORY / "results" / "benchmarks" / "stream.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**known, "n_cells": N_CELLS, **sections}, indent=1) + "\n")


def median(found, name, quantity):
    return float(np.median([result[quantity] for result in found[name]]))


def ratio(found, ours, theirs):
    """Median over the rounds of how many times faster ours was in the same round."""
    if theirs not in found:
        pytest.skip(f"{theirs} was not measured; see stream_loaders.py for what it needs")
    pairs = zip(found[ours], found[theirs], strict=True)
    return float(np.median([own["cells_per_second"] / other["cells_per_second"] for own, other in pairs]))


def test_tokens_come_forty_times_as_fast_as_in_the_reference(rounds):
    assert ratio(rounds, "ours_tokens", "reference_tokens") >= 40


def test_tokens_come_faster_than_from_annbatch_with_the_same_kernel(rounds):
    assert ratio(rounds, "ours_tokens", "annbatch_tokens") >= 1.7


def test_raw_batches_come_faster_than_from_annbatch(rounds):
    assert ratio(rounds, "ours_raw", "annbatch_raw") >= 1.3


def test_a_cell_costs_little_cpu_and_memory(rounds):
    assert median(rounds, "ours_tokens", "cpu_us_per_cell") <= 30
    assert median(rounds, "ours_tokens", "peak_mb") < 1000


def test_ten_times_the_cells_cost_nothing_more_per_cell(data):
    pairs = [
        [run("ours_tokens", data, SCMMGPT_BENCHMARK_CORPUS=name) for name in ("corpus", "corpus_10x")]
        for _ in range(ROUNDS)
    ]
    write_results(growth=pairs)
    cpu = np.median([large["cpu_us_per_cell"] / small["cpu_us_per_cell"] for small, large in pairs])
    memory = np.median([large["peak_mb"] - small["peak_mb"] for small, large in pairs])
    assert cpu < 1.25
    assert memory < 100


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="there is one core")
def test_ranks_add_up_until_the_cores_are_used(data):
    totals = {1: [], 2: []}
    for _ in range(ROUNDS):
        for world_size, found in totals.items():
            ranks = [
                start("ours_tokens_one_thread", data, SCMMGPT_BENCHMARK_RANK=f"{rank}/{world_size}")
                for rank in range(world_size)
            ]
            lines = [rank.communicate()[0].strip().splitlines()[-1] for rank in ranks]
            found.append(sum(json.loads(line)["cells_per_second"] for line in lines))
    write_results(ranks=totals)
    assert np.median(totals[2]) > 1.5 * np.median(totals[1])


def test_the_stages_are_accounted_for(data):
    stages = run("ours_by_stage", data)
    write_results(stages=stages)
    logger.info("CPU microseconds per cell by stage: %s", stages)
    assert sum(stages.values()) <= 30


def test_the_cache_is_half_the_size_of_plain_counts(data):
    found = run("layouts", data)
    write_results(layouts=found)
    assert found["lz4"]["bytes"] < 0.6 * found["lz4"]["plain_bytes"]
    assert found["zstd"]["bytes"] < 0.7 * found["lz4"]["bytes"]
