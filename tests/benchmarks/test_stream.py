"""Speed of loading tokenised cells from disk, beside loaders of other projects. Run alone: `make benchmark`.

The data are synthetic: 100,000 cells of 30,000 genes, about 1,500 of them expressed in a cell, 60 % of counts are 1.
They are written once, to `SCMMGPT_BENCHMARK_DIR` or a folder in the system's temporary one. Each loader runs in a
process of its own, for a second at a time while the others are stopped, so that other work on the machine affects all
loaders alike. `results/benchmarks/stream.json` has the table. Loaders whose requirements (`stream_loaders.py`) are
missing are left out.

Unless named otherwise, bars hold for the copy in Arrow files (`train/data/cache.py`). The published Parquet without
a copy was 31 times as fast as the reference on a quiet machine, and 18 times on one with ten times more work than
cores.
"""

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest


logger = logging.getLogger(__name__)

REPOSITORY = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("stream_loaders.py")
N_CELLS = int(os.environ.get("SCMMGPT_BENCHMARK_CELLS", 100_000))
N_GENES = 30_000
ROUNDS = 12
SLICE = 1.0  # seconds that a loader runs before the next has its turn

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
    """Folder with the data in every layout that can be measured here; layouts that exist are not built again."""
    from scmmgpt.train.data.cache import write_cache
    from scmmgpt.train.data.corpus import open_corpus

    default = Path(tempfile.gettempdir()) / f"scmmgpt-benchmark-{N_CELLS}"
    folder = Path(os.environ.get("SCMMGPT_BENCHMARK_DIR", default))
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "corpus" / "manifest.json").exists():
        build_corpus(folder)
    link_corpus(folder, "corpus_published")
    link_corpus(folder, "corpus_10x", times=10)
    for name in ("corpus", "corpus_10x"):
        write_cache(open_corpus(folder / name, verify=False))
    if "SCMMGPT_BENCHMARK_REFERENCE" in os.environ and not (folder / "reference").exists():
        build_arrow(folder)
    if "SCMMGPT_BENCHMARK_ANNBATCH" in os.environ and not (folder / "annbatch.zarr").exists():
        build_h5ad(folder)
        run("build_annbatch", folder)
    return folder


def build_corpus(folder):
    from scmmgpt.cells_scmmgpt import Cells
    from scmmgpt.tests.corpora import write_corpus

    indptr, gene_ids, counts = synthetic_cells(N_CELLS, N_GENES)
    cells = Cells(indptr, gene_ids, counts, np.arange(N_CELLS, dtype=np.uint64))
    vocabulary = {"<pad>": 0, "<cls>": 1, "<eoc>": 2, **{f"G{i}": i for i in range(3, N_GENES + 3)}}
    rng = np.random.default_rng(0)
    obs = {
        "cell_type": [f"cell type {i}" for i in rng.integers(0, 100, N_CELLS)],
        "dataset_id": [f"dataset {i}" for i in rng.integers(0, 50, N_CELLS)],
    }
    write_corpus(folder / "corpus", vocabulary, {"train": (cells, obs)}, cells_per_shard=25_000)


def link_corpus(folder, name, times=1):
    """A corpus of `times` as many cells, whose shards are links to those of `corpus`."""
    import dataclasses

    from scmmgpt.train.data.corpus import Manifest

    other = folder / name
    if (other / "manifest.json").exists():
        return
    (other / "data").mkdir(parents=True, exist_ok=True)
    manifest = Manifest.read(folder / "corpus" / "manifest.json")
    n_shards, shards = times * len(manifest.shards), []
    for index in range(n_shards):
        shard = manifest.shards[index % len(manifest.shards)]
        path = f"data/train-{index:05d}-of-{n_shards:05d}.parquet"
        (other / path).unlink(missing_ok=True)
        os.link(folder / "corpus" / shard.path, other / path)
        shards.append(dataclasses.replace(shard, path=path))
    for copied in ("vocab.json", "splits.json"):
        (other / copied).write_bytes((folder / "corpus" / copied).read_bytes())
    dataclasses.replace(manifest, shards=shards).write(other / "manifest.json")


def build_arrow(folder):
    """The data set of the published scMMGPT: Arrow lists, the 2,047 largest values of each cell, its annotations."""
    import datasets

    from scmmgpt.train.data.corpus import OBS_COLUMNS

    columns = [name for name in OBS_COLUMNS if name != "barcode"]

    def examples():
        from scmmgpt.train.data.corpus import open_corpus  # `datasets` hashes all that a closure refers to

        corpus = open_corpus(folder / "corpus", verify=False)
        for cells, obs in corpus.row_groups("train", columns):
            annotations = obs.to_pylist()
            for row in range(len(cells)):
                cell = slice(cells.indptr[row], cells.indptr[row + 1])
                genes, values = cells.gene_ids[cell].astype(np.int64), cells.counts[cell].astype(np.float32)
                if len(genes) > 2047:
                    largest = np.argpartition(values, -2047)[-2047:]
                    genes, values = genes[largest], values[largest]
                yield {"id": row, "genes": genes, "expressions": values, **annotations[row]}

    features = datasets.Features(
        {
            "id": datasets.Value("int64"),
            "genes": datasets.List(datasets.Value("int64")),
            "expressions": datasets.List(datasets.Value("float32")),
            **{name: datasets.Value("string") for name in columns},
        }
    )
    built = datasets.Dataset.from_generator(examples, features=features, cache_dir=str(folder / "hf"))
    built.save_to_disk(folder / "reference")


def build_h5ad(folder):
    import anndata
    import scipy.sparse

    from scmmgpt.train.data.corpus import open_corpus

    cells, _ = open_corpus(folder / "corpus", verify=False).load("train", [])
    matrix = scipy.sparse.csr_matrix(
        (cells.counts, cells.gene_ids.astype(np.int32), cells.indptr), shape=(len(cells), N_GENES + 3)
    )
    anndata.AnnData(matrix).write_h5ad(folder / "cells.h5ad")


def command(name, folder):
    """Command and environment of one loader in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if "annbatch" in name:
        environment.pop("PYTHONPATH", None)
        return [os.environ["SCMMGPT_BENCHMARK_ANNBATCH"], SCRIPT, name, folder], environment
    paths = [str(REPOSITORY.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return [sys.executable, SCRIPT, name, folder], {**environment, "PYTHONPATH": os.pathsep.join(paths)}


def run(name, folder):
    """Run a task of `stream_loaders.py` to its end."""
    arguments, environment = command(name, folder)
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


class Runner:
    """A loader in a process of its own, which runs in turns with others."""

    def __init__(self, name, folder, scratch, **environment):
        scores = scratch / f"{len(list(scratch.iterdir()))}-{name}"
        np.zeros(3, np.int64).tofile(scores)
        self.name, self.scores = name, np.memmap(scores, np.int64, "r")
        self.cells = self.seconds = self.cpu_seconds = 0.0
        arguments, own = command(name, folder)
        self.log = open(scores.with_suffix(".log"), "w+")
        self.process = subprocess.Popen(
            [*arguments, "--scores", scores], env={**own, **environment}, stdout=self.log, stderr=self.log
        )

    def wait_until_warm(self):
        while not self.scores[1]:
            if self.process.poll() is not None:
                self.log.seek(0)
                raise RuntimeError(f"{self.name} failed:\n{self.log.read()[-4000:]}")
            time.sleep(0.05)

    def cpu_clock(self):
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def result(self):
        return {
            "cells_per_second": self.cells / self.seconds,
            "cpu_us_per_cell": self.cpu_seconds / self.cells * 1e6,
            "peak_mb": int(self.scores[2]),
        }


def race(teams):
    """Let teams of runners run in turns, the members of a team together, and return a result for each runner."""
    runners = [runner for team in teams for runner in team]
    try:
        for runner in runners:
            runner.wait_until_warm()
        for _ in range(ROUNDS):
            for team in teams:
                before = [(int(runner.scores[0]), runner.cpu_clock()) for runner in team]
                start = time.perf_counter()
                for runner in team:
                    runner.process.send_signal(signal.SIGCONT)
                time.sleep(SLICE)
                for runner in team:
                    runner.process.send_signal(signal.SIGSTOP)
                seconds = time.perf_counter() - start
                for runner, (cells, cpu) in zip(team, before, strict=True):
                    runner.cells += int(runner.scores[0]) - cells
                    runner.cpu_seconds += runner.cpu_clock() - cpu
                    runner.seconds += seconds
        return [[runner.result() for runner in team] for team in teams]
    finally:
        for runner in runners:
            runner.process.kill()
            runner.process.wait()
            runner.log.close()


def available_loaders():
    names = [
        "ours_tokens",
        "ours_raw",
        "ours_dataset_tokens",
        "ours_streamed_tokens",
        "ours_published_raw",
        "ours_published_tokens",
        "datasets_numpy_tokens",
    ]
    for variable, own in (
        ("SCMMGPT_BENCHMARK_ANNBATCH", ["annbatch_raw", "annbatch_tokens"]),
        ("SCMMGPT_BENCHMARK_REFERENCE", ["reference_tokens"]),
    ):
        if variable in os.environ:
            names += own
    return names


@pytest.fixture(scope="module")
def results(data, tmp_path_factory):
    """Speed, CPU time and memory of each loader, by name."""
    scratch, names = tmp_path_factory.mktemp("race"), available_loaders()
    found = race([[Runner(name, data, scratch)] for name in names])
    found = {name: result for name, (result,) in zip(names, found, strict=True)}
    write_results(loaders=found)
    return found


def write_results(**sections):
    path = REPOSITORY / "results" / "benchmarks" / "stream.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**known, "n_cells": N_CELLS, **sections}, indent=1) + "\n")


def speed_ratio(results, ours, theirs):
    if theirs not in results:
        pytest.skip(f"{theirs} was not measured; see stream_loaders.py for what it needs")
    return results[ours]["cells_per_second"] / results[theirs]["cells_per_second"]


def test_tokens_come_forty_times_as_fast_as_in_the_reference(results):
    assert speed_ratio(results, "ours_tokens", "reference_tokens") >= 40


def test_tokens_come_faster_than_from_annbatch_with_the_same_kernel(results):
    assert speed_ratio(results, "ours_tokens", "annbatch_tokens") >= 1.7


def test_raw_batches_come_faster_than_from_annbatch(results):
    assert speed_ratio(results, "ours_raw", "annbatch_raw") >= 1.3


def test_finished_batches_come_thirty_times_as_fast_as_in_the_reference(results):
    assert speed_ratio(results, "ours_dataset_tokens", "reference_tokens") >= 30


def test_what_trainers_read_comes_nearly_as_fast_as_the_stream_alone(results):
    assert speed_ratio(results, "ours_dataset_tokens", "ours_tokens") >= 0.7


def test_a_streamed_dataset_comes_to_trainers_faster_than_from_datasets_alone(results):
    assert speed_ratio(results, "ours_streamed_tokens", "datasets_numpy_tokens") >= 1.5


def test_the_published_layout_alone_comes_twelve_times_as_fast_as_in_the_reference(results):
    assert speed_ratio(results, "ours_published_tokens", "reference_tokens") >= 12


def test_a_cell_costs_little_cpu_and_memory(results):
    assert results["ours_tokens"]["cpu_us_per_cell"] <= 30
    assert results["ours_tokens"]["peak_mb"] < 1000


def test_ten_times_the_cells_cost_nothing_more_per_cell(data, tmp_path):
    corpora = ["corpus", "corpus_10x"]
    found = race([[Runner("ours_tokens", data, tmp_path, SCMMGPT_BENCHMARK_CORPUS=name)] for name in corpora])
    (small,), (large,) = found
    write_results(growth=dict(zip(corpora, (small, large), strict=True)))
    assert large["cpu_us_per_cell"] < 1.25 * small["cpu_us_per_cell"]
    assert large["peak_mb"] < small["peak_mb"] + 100


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="there is one core")
def test_ranks_add_up_until_the_cores_are_used(data, tmp_path):
    teams = [
        [
            Runner("ours_tokens_one_thread", data, tmp_path, SCMMGPT_BENCHMARK_RANK=f"{rank}/{world_size}")
            for rank in range(world_size)
        ]
        for world_size in (1, 2)
    ]
    one, two = (sum(result["cells_per_second"] for result in team) for team in race(teams))
    write_results(ranks={"1": one, "2": two})
    assert two > 1.5 * one


def test_the_stages_are_accounted_for(data):
    stages = run("ours_by_stage", data)
    write_results(stages=stages)
    logger.info("CPU microseconds per cell by stage: %s", stages)
    assert sum(stages.values()) <= 30


def test_the_copy_takes_less_than_three_times_the_space(data):
    copy, published = (
        sum(file.stat().st_size for file in (data / "corpus" / folder).iterdir()) for folder in ("cache", "data")
    )
    write_results(bytes_per_cell={"published": published / N_CELLS, "copy": copy / N_CELLS})
    assert copy < 3 * published
