"""Failures of a cluster: workers and schedulers that are killed cost time, and nothing else."""

import os
import re
import signal
import subprocess
import sys
import time

import anndata
import h5py
import psutil
import pytest

from scmmgpt import synthetic
from scmmgpt.commands.cluster import LOST, Workers
from scmmgpt.tests.cluster_tasks import die, fill, nap, overfill
from scmmgpt.tests.clusters import dask_cluster, free_address
from scmmgpt.tests.test_partitions import assert_same, run


@pytest.fixture
def log(tmp_path):
    """Where a Dask cluster writes."""
    pytest.importorskip("distributed", reason="Dask is not installed (extra `cluster`)")
    return tmp_path / "dask.log"


@pytest.mark.slow
def test_the_task_of_a_lost_worker_is_done_again_and_a_poisonous_one_is_cut_and_reported(tmp_path):
    (tmp_path / "error").touch()
    tasks = [tmp_path / name for name in ("once", "poison", "error")]

    def split(task):
        return [task, task.with_name("the rest")]

    with Workers(2) as workers:
        outcomes = {task.name: (result, error) for task, result, error in workers.run(die, tasks, split)}
    assert outcomes["once"] == ("once", None)
    assert outcomes["the rest"] == ("the rest", None)
    assert str(outcomes["poison"][1]) == LOST
    assert str(outcomes["error"][1]) == "no such cell"


@pytest.mark.slow
def test_workers_that_are_killed_every_few_seconds_lose_nothing_and_are_reported(tmp_path, log, caplog):
    tasks = [tmp_path / f"{i:02d}.txt" for i in range(40)]
    with dask_cluster(log) as cluster, Workers(cluster=cluster.address) as workers:
        found, killed, last = [], 0, time.monotonic()
        for outcome in workers.run(nap, tasks):
            found.append(outcome)
            if time.monotonic() - last > 2 and killed < 4:
                killed, last = killed + cluster.kill_a_worker(), time.monotonic()
    assert killed >= 2
    assert sorted(task for task, _, _ in found) == tasks
    assert [error for _, _, error in found if error] == []
    assert all(task.read_text() == task.name for task in tasks)
    said = re.search(rf"Workers were lost {killed} times; what they had begun was computed again: (.*)\.", caplog.text)
    assert set(said[1].split("; ")[:5]) <= set(map(str, tasks))


N_PARTITIONS, DAMAGED = 12, 5  # of 4,096 cells; the partition whose counts cannot be read


def damage(path, row):
    """Put zeros over the compressed values of a row, and let the file look as old as before."""
    with h5py.File(path) as file:
        data, entry = file["X/data"], file["X/indptr"][row]
        chunk = data.id.get_chunk_info(int(entry) // data.chunks[0])
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    with path.open("r+b") as file:
        file.seek(chunk.byte_offset)
        file.write(bytes(chunk.size))
    os.utime(path, ns=times)


def written(out):
    """The partitions of an output, with the times at which they were written."""
    paths = out.parent.glob(f"{out.name}.parts/*/0*.parquet")
    return {(path.name, path.stat().st_mtime_ns) for path in paths if path.exists()}


@pytest.mark.slow
def test_workers_that_dask_pauses_for_want_of_memory_end_the_command_with_the_limit(tmp_path, log, monkeypatch):
    distributed = pytest.importorskip("distributed")
    monkeypatch.setattr("scmmgpt.commands.cluster.PAUSED_SECONDS", 1)
    options = {"n_workers": 1, "threads_per_worker": 1, "dashboard_address": ":0", "memory_limit": "500MB"}
    with distributed.LocalCluster(**options) as local, Workers(cluster=local.scheduler_address) as workers:
        outcomes = [error for _, _, error in workers.run(fill, [440e6])]
        assert outcomes == [None]
        with pytest.raises(OSError, match=r"paused all 1 workers, .*\(500 MB\).* --memory-limit"):
            list(workers.run(nap, [tmp_path / "never.txt"]))


@pytest.mark.slow
def test_a_task_for_which_dask_ends_each_worker_is_reported_with_the_limit(log):
    dask, distributed = pytest.importorskip("dask"), pytest.importorskip("distributed")
    options = {"n_workers": 1, "threads_per_worker": 1, "dashboard_address": ":0", "memory_limit": "500MB"}
    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 0}),
        distributed.LocalCluster(**options) as local,
        Workers(cluster=local.scheduler_address) as workers,
    ):
        found = {task: str(error) for task, _, error in workers.run(overfill, [496e6])}
    assert found == {
        496e6: f"{LOST} Dask ends workers that take most of 500 MB: start them with a larger --memory-limit."
    }


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["annotate", "embed", "audit"])
def test_lost_workers_a_new_scheduler_and_a_damaged_part_lose_nothing_do_nothing_twice_and_are_told(
    tmp_path, log, verb, caplog
):
    cells, out, checkpoint = tmp_path / "cells.h5ad", tmp_path / "out.h5ad", str(tmp_path / "checkpoint")
    synthetic.fitted_pipeline().save_pretrained(checkpoint)
    synthetic.synthetic_adata(4096 * N_PARTITIONS).write_h5ad(cells, compression="gzip")
    whole = cells.read_bytes()
    damage(cells, 4096 * DAMAGED + 2000)
    words, address = [sys.executable, "-m", "scmmgpt", verb, cells, "--model", checkpoint, "-o", out], free_address()
    words = [*map(str, words), "--quiet", "--cells-per-partition", "1", "--cluster", address]

    def start(said):
        return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=said.open("w"))

    # The scheduler is lost, once something is done.
    with dask_cluster(log, address=address) as cluster:
        command = start(tmp_path / "said")
        while not written(out):
            assert command.poll() is None, (tmp_path / "said").read_text()
            time.sleep(0.05)
        cluster.scheduler.kill()
        assert command.wait(timeout=300) == 2
    assert "The Dask scheduler was lost. What is finished is kept" in (tmp_path / "said").read_text()
    assert not out.exists()
    done = written(out)

    # Another takes the address. Workers are lost, each time after one more partition is done.
    seen, killed, at_kill = set(done), 0, len(done)
    with dask_cluster(log, address=address) as cluster:
        command = start(tmp_path / "said")
        while command.poll() is None:
            seen |= written(out)
            if len(seen) > at_kill and killed < 2:
                killed, at_kill = killed + cluster.kill_a_worker(), len(seen)
            time.sleep(0.02)
    said, first = (tmp_path / "said").read_text(), 4096 * DAMAGED
    assert command.returncode == 3, said
    assert killed
    assert done <= seen, "what was done was computed again"
    assert len(seen) == N_PARTITIONS - 1
    assert f"{len(done)} of {N_PARTITIONS} partitions are done; the others follow." in said
    assert f"Workers were lost {killed} times; what they had begun was computed again: {cells}, cells " in said
    assert f"scmmgpt {verb}: {cells}, cells {first:,} to {first + 4095:,}: /X/data of {cells} cannot be read" in said

    # The file is mended, and only what is missing is computed.
    times = cells.stat().st_atime_ns, cells.stat().st_mtime_ns
    cells.write_bytes(whole)
    os.utime(cells, ns=times)
    run(verb, cells, "-o", out, "--workers", 1, "--cells-per-partition", 1, checkpoint=checkpoint)
    assert f"{N_PARTITIONS - 1} of {N_PARTITIONS} partitions are done" in caplog.text
    run(verb, cells, "-o", tmp_path / "one.h5ad", "--workers", 1, checkpoint=checkpoint)
    if verb != "audit":
        assert_same(out, tmp_path / "one.h5ad")
        return
    # The regression of the labels, which is kept with what was done, was fitted without the cells that were damaged.
    verdicts = [anndata.read_h5ad(path).obs["scmmgpt_audit"] for path in (out, tmp_path / "one.h5ad")]
    assert verdicts[0].index.equals(verdicts[1].index)
    assert (verdicts[0].astype(str) == verdicts[1].astype(str)).mean() > 0.99


@pytest.mark.slow
@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_stops_a_command_and_its_workers_without_tracebacks_and_keeps_what_is_done(tmp_path, times):
    cells, out, checkpoint = tmp_path / "cells.h5ad", tmp_path / "out.h5ad", str(tmp_path / "checkpoint")
    synthetic.fitted_pipeline().save_pretrained(checkpoint)
    synthetic.synthetic_adata(4096 * 20).write_h5ad(cells)
    words = [sys.executable, "-m", "scmmgpt", "embed", cells, "--model", checkpoint, "-o", out, "--quiet"]
    words += ["--workers", "2", "--cells-per-partition", "1"]
    with (tmp_path / "said").open("w") as said:
        command = subprocess.Popen([*map(str, words)], stderr=said, start_new_session=True)
    while not written(out):
        assert command.poll() is None, (tmp_path / "said").read_text()
        time.sleep(0.05)
    members = psutil.Process(command.pid).children(recursive=True)
    for _ in range(times):  # as a terminal does it, to all
        os.killpg(command.pid, signal.SIGINT)
        time.sleep(0.5)
    assert command.wait(timeout=300) == 130
    psutil.wait_procs(members, timeout=60)
    assert not [member for member in members if member.is_running()]
    said = (tmp_path / "said").read_text()
    assert "scmmgpt embed: stopped." in said
    assert "Traceback" not in said
    assert written(out)
    assert not out.exists()


def test_a_scheduler_that_does_not_answer_is_named(monkeypatch):
    dask = pytest.importorskip("dask", reason="Dask is not installed (extra `cluster`)")
    # Imported first: where `set` makes the key "distributed", its end takes away all settings below that key.
    pytest.importorskip("distributed", reason="Dask is not installed (extra `cluster`)")

    with (
        dask.config.set({"distributed.comm.timeouts.connect": "0.2s"}),
        Workers(cluster="tcp://127.0.0.1:9") as workers,
    ):
        with pytest.raises(OSError, match="No Dask scheduler answers at 'tcp://127.0.0.1:9'"):
            list(workers.run(die, []))
