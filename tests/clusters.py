"""A Dask cluster of processes on this machine, for tests and benchmarks that lose parts of it or watch its memory."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass
class DaskCluster:
    """A scheduler and the nanny of its workers, which starts a worker again that is lost."""

    address: str
    scheduler: subprocess.Popen
    nanny: subprocess.Popen

    def workers(self) -> list[psutil.Process]:
        """The processes that compute."""
        with contextlib.suppress(psutil.NoSuchProcess):
            children = psutil.Process(self.nanny.pid).children(recursive=True)
            return [child for child in children if "spawn_main" in _words(child)]
        return []

    def kill_a_worker(self) -> int:
        """Kill a process that computes, if there is one; returns how many."""
        for worker in self.workers()[:1]:
            worker.kill()
            return 1
        return 0


def _words(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
        return " ".join(process.cmdline())
    return ""


def free_address() -> str:
    """An address of this machine at which nothing listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{free.getsockname()[1]}"


@contextlib.contextmanager
def dask_cluster(log: Path, workers: int = 2, address: str | None = None) -> Iterator[DaskCluster]:
    """Start a scheduler and workers, as processes of their own; `log` takes what they say."""
    from distributed import Client

    address = address or free_address()
    dask = [sys.executable, "-c", "import sys; from dask.__main__ import main; sys.exit(main())"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["DASK_DISTRIBUTED__NANNY__PRE_SPAWN_ENVIRON"] = "{'MALLOC_TRIM_THRESHOLD_': None}"
    one = ["scheduler", "--host", address, "--no-dashboard", "--no-show"]
    many = ["worker", address, "--nworkers", str(workers), "--nthreads", "1", "--no-dashboard", "--memory-limit", "0"]
    with log.open("a") as file:
        processes = [
            subprocess.Popen([*dask, *words], stdout=file, stderr=file, env=environment) for words in (one, many)
        ]
        try:
            deadline = time.monotonic() + 300
            with Client(address, timeout=240) as client:
                client.wait_for_workers(workers, timeout=max(1, deadline - time.monotonic()))
            yield DaskCluster(address, *processes)
        finally:
            for process in processes:  # a nanny whose scheduler is gone waits for long
                with contextlib.suppress(psutil.NoSuchProcess):
                    for child in [*psutil.Process(process.pid).children(recursive=True), process]:
                        with contextlib.suppress(psutil.NoSuchProcess):
                            child.kill()
                process.wait(timeout=60)
