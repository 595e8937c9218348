"""Run tasks in this process, in processes of this machine, or on a Dask cluster; a task ends in a result or an error.

Only a few tasks are in flight at a time, so that the memory of the scheduler does not grow with the number of tasks.
Dask reruns the task of a lost worker on another worker. A task that was lost with several workers is cut into smaller
tasks, if possible, and run once more with no other task in flight, because the other tasks of a dying worker look
guilty, too. If its worker dies again, the task has failed.
"""

import contextlib
import functools
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from itertools import islice
from typing import Any, TypeVar


logger = logging.getLogger(__name__)

Task = TypeVar("Task")
Outcome = tuple[Task, Any, Exception | None]  # a task, its result, and its error or None

WAIT_SECONDS = 60  # longest wait for the first worker, because queues of clusters start workers late
PAUSED_SECONDS = 20  # time between two checks; after two checks, paused workers count as stuck
TASKS_PER_WORKER = 2  # tasks in flight: one that runs, and the next
SHOWN = 5  # most tasks of lost workers that are named
LOST = (
    "Several workers were lost while they computed this, the last with nothing else to do: perhaps the system ended "
    "processes that took too much memory. Give the same command again, with fewer workers or on a larger machine."
)

_THREADS = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
_LOCAL = {
    "distributed.worker.multiprocessing-method": "forkserver" if sys.platform == "linux" else "spawn",
    # Dask's own setting makes the C library return all free memory at once, which adds half of the computing time.
    "distributed.nanny.pre-spawn-environ": _THREADS,
    "distributed.worker.profile.enabled": False,
    # By default, Dask measures the event loop of each process 50 times a second, and samples the interpreter's lock.
    "distributed.admin.tick.interval": "1s",
    "distributed.admin.system-monitor.gil.enabled": False,
}


def preload_workers() -> None:
    """Start the fork server, from which workers of this machine are forked on Linux, and let it import libraries.

    The number of threads is set in the environment, because libraries read it on import. The fork server ignores
    Ctrl-C, which a terminal sends to all processes of a command; this process ends the workers.
    """
    if sys.platform != "linux" or threading.current_thread() is not threading.main_thread():
        return
    from multiprocessing import forkserver

    settings = {**_THREADS, "DASK_LOGGING__DISTRIBUTED": "error"}  # this process reports failed tasks itself
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    on_interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        forkserver.set_forkserver_preload(["scmmgpt.commands.worker_start"])
        forkserver.ensure_running()
    finally:
        signal.signal(signal.SIGINT, on_interrupt)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class Workers:
    """Context manager for workers: this process, processes of this machine, or a Dask cluster.

    Processes of this machine start in the background.

    Args:
        workers: Number of processes of this machine; 1 means this process.
        cluster: Address of a Dask scheduler, whose workers replace `workers`.
        prepare: Function and arguments that each worker calls first; the function must be importable.
    """

    def __init__(
        self, workers: int = 1, cluster: str | None = None, prepare: tuple[Callable[..., Any], Any] | None = None
    ) -> None:
        self.workers, self.cluster, self.prepare = workers, cluster, prepare
        self.is_this_process = cluster is None and workers == 1
        self._stack = contextlib.ExitStack()
        self._client: Callable[[], Any] = functools.cache(self._start)

    def __enter__(self) -> "Workers":
        if self.cluster is None and not self.is_this_process:
            with contextlib.suppress(ImportError):  # `_start` reports a missing library
                import distributed  # noqa: F401  two threads that import a module at once can see it half initialised
            self._client = ThreadPoolExecutor(1).submit(self._start).result
        return self

    def __exit__(self, kind: type[BaseException] | None = None, *_: object) -> None:
        # A second Ctrl-C would interrupt the shutdown of the workers, and print a traceback.
        is_stopped = (
            issubclass(kind or Exception, KeyboardInterrupt) and threading.current_thread() is threading.main_thread()
        )
        on_interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN) if is_stopped else None
        try:
            if self.cluster is None and not self.is_this_process:
                with contextlib.suppress(Exception):
                    self._client()  # workers can't be stopped before they have started
            self._stack.close()
        finally:
            if is_stopped:
                signal.signal(signal.SIGINT, on_interrupt)

    def _start(self) -> Any:
        client = self._stack.enter_context(_client(self.workers, self.cluster))
        if self.prepare is not None:
            from distributed import fire_and_forget

            function, arguments = self.prepare
            for worker in client.nthreads():
                where = {"workers": [worker], "allow_other_workers": True, "pure": False}
                fire_and_forget(client.submit(function, *arguments, **where))
        return client

    def run(
        self,
        function: Callable[[Task], Any],
        tasks: Sequence[Task],
        split: Callable[[Task], Sequence[Task]] = lambda task: [task],
    ) -> Iterator[Outcome]:
        """Yield each task with its result, or with the `Exception` that it raised, in the order of completion.

        Args:
            function: Importable function of a task. It may be called again with the same task if a worker is lost
                before its result has arrived.
            tasks: Tasks, as plain data; `str(task)` names the task in messages.
            split: Task -> smaller tasks that replace it if workers keep dying.

        Raises:
            ImportError: If Dask is needed and not installed.
            OSError: If the scheduler cannot be reached, or is lost.
        """
        if self.is_this_process:
            for task in tasks:
                result, failure = None, None
                try:
                    result = function(task)
                except Exception as error:  # a damaged part of a file can raise any type
                    failure = error
                yield task, result, failure
            return
        began, client, submitted = time.time(), self._client(), dict[str, Task]()
        suspects: list[Task] = []
        for task, result, failure in _run_on(client, function, tasks, submitted):
            if _is_lost_worker(failure):
                suspects.append(task)
            else:
                yield task, result, failure
        for task in [piece for suspect in suspects for piece in split(suspect)]:
            for _, result, failure in _run_on(client, function, [task], submitted):
                yield task, result, _why_lost(failure) if _is_lost_worker(failure) else failure
        _warn_of_lost_workers(client, began, submitted)


@contextlib.contextmanager
def _client(workers: int, cluster: str | None) -> Iterator[Any]:
    """Connect to the scheduler `cluster`, or start a local cluster of `workers` processes; yield the client."""
    try:
        import dask
        from distributed import Client, LocalCluster
    except ImportError as error:
        raise ImportError("`--workers` and `--cluster` need Dask. Install `scmmgpt[cluster]`.") from error
    if cluster is not None:
        try:
            client = Client(cluster)
        except (OSError, ValueError) as error:
            why = " ".join(str(error).split())[:160]
            raise OSError(
                f"No Dask scheduler answers at {cluster!r} ({why}). Start one, or correct --cluster."
            ) from None
        with contextlib.closing(client):  # `with client` supports a single thread only
            try:
                client.wait_for_workers(1, timeout=WAIT_SECONDS)
            except TimeoutError:
                raise OSError(
                    f"The Dask scheduler at {cluster!r} has no workers. Start some: `dask worker {cluster}`."
                ) from None
            yield client
        return
    # With a memory limit, Dask would pause workers whose model exceeds it; without, the system ends such workers.
    options = {"threads_per_worker": 1, "processes": True, "dashboard_address": ":0", "memory_limit": 0}
    with (
        dask.config.set(_LOCAL),
        LocalCluster(n_workers=workers, **options) as local,
        contextlib.closing(Client(local)) as client,
    ):
        yield client


def _run_on(
    client: Any, function: Callable[[Task], Any], tasks: Iterable[Task], submitted: dict[str, Task]
) -> Iterator[Outcome]:
    """Run tasks, a few at a time; add Dask's key of each task to `submitted`."""
    from distributed import as_completed

    pending = iter(tasks)

    def submit(task: Task) -> Any:
        future = client.submit(function, task, pure=False)
        submitted[future.key] = task
        return future

    n_threads = sum(client.nthreads().values())
    finished = as_completed([submit(task) for task in islice(pending, max(1, TASKS_PER_WORKER * n_threads))])
    with _watched(client, finished) as stuck:
        for future in finished:
            task = submitted[future.key]
            result, failure = None, None
            try:
                result = future.result()
            except CancelledError:  # Dask also raises this type when the scheduler is gone
                why = stuck[0] if stuck else "The Dask scheduler was lost. What is finished is kept: start it,"
                raise OSError(f"{why} and give the same command again.") from None
            except Exception as error:
                failure = error
            for following in islice(pending, 1):
                finished.add(submit(following))
            yield task, result, failure


@contextlib.contextmanager
def _watched(client: Any, finished: Any) -> Iterator[list[str]]:
    """Cancel the waiting tasks if all workers are paused for lack of memory; yield a list for the reason."""
    stuck: list[str] = []
    done = threading.Event()

    def watch() -> None:
        n_times = 0
        while not done.wait(PAUSED_SECONDS):
            with contextlib.suppress(Exception):  # `_run_on` reports a lost scheduler
                workers = list(client.scheduler_info(n_workers=-1)["workers"].values())
                n_times = n_times + 1 if workers and all(map(_is_stuck, workers)) else 0
                if n_times == 2:
                    most = max(worker["memory_limit"] for worker in workers)
                    stuck.append(
                        f"Dask has paused all {len(workers)} workers, as they have most of the memory that it allows "
                        f"({most / 1e6:,.0f} MB). What is finished is kept: start them with a larger --memory-limit, "
                        "or with 0 for none,"
                    )
                    client.cancel(list(finished.futures))
                    return

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield stuck
    finally:
        done.set()


def _is_stuck(worker: Mapping[str, Any]) -> bool:
    """Whether a worker is paused and runs no task, by the scheduler's record of it."""
    return worker["status"] == "paused" and not worker["metrics"].get("task_counts")


def _warn_of_lost_workers(client: Any, since: float, submitted: Mapping[str, Any]) -> None:
    """Log the number of workers lost since a time, and their tasks."""
    events = [event for when, event in client.get_events("all") if when >= since and isinstance(event, dict)]
    lost = [event for event in events if event.get("action") == "remove-worker" and not event.get("expected")]
    if lost:
        keys = {key for event in lost for name in ("processing-tasks", "lost-computed-tasks") for key in event[name]}
        again = sorted({str(submitted[key]) for key in keys & submitted.keys()})
        names = "; ".join(again[:SHOWN]) + (f"; and {len(again) - SHOWN} more" if len(again) > SHOWN else "")
        logger.warning(
            "Workers were lost %d times; what they had begun was computed again: %s.",
            len(lost),
            names or "nothing yet",
        )


def _why_lost(error: Any) -> OSError:
    """Turn Dask's `KilledWorker` into an error that explains the loss of workers."""
    limit = getattr(error.last_worker, "memory_limit", 0)
    ends = f" Dask ends workers that take most of {limit / 1e6:,.0f} MB: start them with a larger --memory-limit."
    return OSError(LOST + (ends if limit else ""))


def _is_lost_worker(error: Exception | None) -> bool:
    return type(error).__name__ == "KilledWorker"


def device_of_worker() -> str | None:
    """GPU of this worker, if the machine has several GPUs and workers are numbered; None for the default device."""
    import torch

    n_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if n_devices < 2 or os.environ.get("CUDA_VISIBLE_DEVICES", "").isdigit():
        return None
    try:
        from distributed import get_worker

        name = get_worker().name
    except (ImportError, ValueError):  # not a Dask worker
        return None
    return f"cuda:{name % n_devices}" if isinstance(name, int) else None
