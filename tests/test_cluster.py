"""Failures of a cluster: workers and schedulers that are killed cost time, and nothing else."""

import contextlib
import os
import socket
import subprocess
import sys
import time

import psutil
import pytest

from scmmgpt import synthetic
from scmmgpt.commands.cluster import Workers
from scmmgpt.tests.cluster_tasks import die, nap
from scmmgpt.tests.test_partitions import assert_same, run


@pytest.mark.slow
def test_the_task_of_a_lost_worker_is_done_again_and_a_poisonous_one_is_reported(tmp_path):
    (tmp_path / "error").touch()
    tasks = [tmp_path / name for name in ("once", "poison", "error")]
    with Workers(2) as workers:
        outcomes = {task.name: (result, error) for task, result, error in workers.run(die, tasks)}
    assert outcomes["once"] == ("once", None)
    assert type(outcomes["poison"][1]).__name__ == "KilledWorker"
    assert str(outcomes["error"][1]) == "no such cell"


@contextlib.contextmanager
def dask_cluster(folder):
    """A scheduler and two workers, as processes of their own; yields them and the scheduler's address."""
    pytest.importorskip("distributed", reason="Dask is not installed (extra `cluster`)")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    log = (folder / "dask.log").open("a")
    dask = [sys.executable, "-c", "import sys; from dask.__main__ import main; sys.exit(main())"]
    quiet = {"stdout": log, "stderr": log, "env": {**os.environ, "OMP_NUM_THREADS": "1"}}
    scheduler = ["scheduler", "--host", address, "--no-dashboard", "--no-show"]
    workers = ["worker", address, "--nworkers", "2", "--nthreads", "1", "--no-dashboard", "--memory-limit", "0"]
    processes = [subprocess.Popen([*dask, *words], **quiet) for words in (scheduler, workers)]
    try:
        from distributed import Client

        with Client(address, timeout=120) as client:
            client.wait_for_workers(2, timeout=240)
        yield processes, address
    finally:
        for process in processes:  # a nanny whose scheduler is gone waits for long
            for child in [*psutil.Process(process.pid).children(recursive=True), process]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
            process.wait(timeout=60)
        log.close()


def kill_a_worker(nanny):
    """Kill the first process that a nanny looks after."""
    for child in psutil.Process(nanny.pid).children(recursive=True):
        if "spawn_main" in str(child.cmdline()):
            child.kill()
            return True
    return False


@pytest.mark.slow
def test_workers_that_are_killed_every_few_seconds_lose_nothing_and_are_reported(tmp_path, caplog):
    tasks = [tmp_path / f"{i:02d}.txt" for i in range(40)]
    with dask_cluster(tmp_path) as ((_, nanny), address), Workers(cluster=address) as workers:
        found, killed, last = [], 0, time.monotonic()
        for outcome in workers.run(nap, tasks):
            found.append(outcome)
            if time.monotonic() - last > 2 and killed < 4:
                killed, last = killed + kill_a_worker(nanny), time.monotonic()
    assert killed >= 2
    assert sorted(task for task, _, _ in found) == tasks
    assert [error for _, _, error in found if error] == []
    assert all(task.read_text() == task.name for task in tasks)
    assert f"Workers were lost {killed} times" in caplog.text


@pytest.mark.slow
def test_a_scheduler_that_is_killed_costs_only_what_was_being_computed(tmp_path):
    cells, out, checkpoint = tmp_path / "cells.h5ad", tmp_path / "out.h5ad", str(tmp_path / "checkpoint")
    synthetic.fitted_pipeline().save_pretrained(checkpoint)
    synthetic.synthetic_adata(30_000).write_h5ad(cells)
    words = [sys.executable, "-m", "scmmgpt", "annotate", cells, "--model", checkpoint, "-o", out, "--quiet"]
    words += ["--cells-per-partition", "1", "--cluster"]
    with dask_cluster(tmp_path) as ((scheduler, nanny), address):
        command = subprocess.Popen([*map(str, words), address], stderr=subprocess.PIPE, text=True)
        while not list(tmp_path.glob("out.h5ad.parts/*/0*.parquet")):
            assert command.poll() is None, command.stderr.read()
            time.sleep(0.05)
        kill_a_worker(nanny)
        scheduler.kill()
        assert command.wait(timeout=300) == 2
        assert "The Dask scheduler was lost. What is finished is kept" in command.stderr.read()
    done = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out.h5ad.parts/*/0*.parquet")}
    assert not out.exists()
    times = {}
    with dask_cluster(tmp_path) as (_, address):
        command = subprocess.Popen([*map(str, words), address], stderr=subprocess.PIPE, text=True)
        while command.poll() is None:
            times |= {p: p.stat().st_mtime_ns for p in tmp_path.glob("out.h5ad.parts/*/0*.parquet") if p.exists()}
            time.sleep(0.02)
        assert command.returncode == 0, command.stderr.read()
    assert {path: times[path] for path in done} == done
    assert len(times) == 8
    run("annotate", cells, "-o", tmp_path / "one.h5ad", "--workers", 1, checkpoint=checkpoint)
    assert_same(out, tmp_path / "one.h5ad")


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
