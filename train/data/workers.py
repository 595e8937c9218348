"""Run the tasks of a build in this process, in processes of this machine, or on a Dask cluster."""

import contextlib
import logging
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Executor, ProcessPoolExecutor, as_completed
from typing import Any

from tqdm import tqdm

from scmmgpt.commands.progress import SECONDS


logger = logging.getLogger(__name__)

Tasks = Sequence[Callable[[], Any]]


@contextlib.contextmanager
def start_workers(workers: int, cluster: str | None = None) -> Iterator[Callable[[Tasks, str], list[Any]]]:
    """Yield `run(tasks, what)`, which calls the tasks and returns their results in order; `what` is for the log.

    A single worker is this process. A `cluster`, the address of a Dask scheduler, takes the place of `workers`.
    """
    with contextlib.ExitStack() as stack:
        executor: Executor | None = None
        if cluster is not None:
            try:
                from distributed import Client
            except ImportError as error:
                raise ImportError("`--cluster` needs Dask. Install `scmmgpt[cluster]`.") from error
            executor = stack.enter_context(stack.enter_context(Client(cluster)).get_executor())
        elif workers > 1:
            method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
            executor = ProcessPoolExecutor(workers, multiprocessing.get_context(method), initializer=_end_with_parent)
            stack.callback(executor.shutdown, cancel_futures=True)

        def run(tasks: Tasks, what: str) -> list[Any]:
            began = time.monotonic()

            def tell(n: int) -> None:
                left = (time.monotonic() - began) * (len(tasks) - n) / n
                logger.info("%d of %d %s, %s left", n, len(tasks), what, tqdm.format_interval(left))

            if executor is None:
                results, told = [], began
                for n, task in enumerate(tasks, 1):
                    results.append(task())
                    if time.monotonic() - told > SECONDS:
                        tell(n)
                        told = time.monotonic()
                return results
            futures = [executor.submit(task) for task in tasks]
            try:
                for n, future in enumerate(as_completed(futures), 1):
                    future.result()
                    tell(n)
            except BrokenExecutor as error:
                raise ValueError(
                    "The system ended a worker process, most likely for want of memory. Give the command again with "
                    "fewer `--workers` or a smaller `--cells-per-partition`; finished files are kept."
                ) from error
            return [future.result() for future in futures]

        yield run


def _end_with_parent() -> None:
    """End this worker process when its builder ends, even if the builder is killed."""

    def watch() -> None:
        if (parent := multiprocessing.parent_process()) is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
