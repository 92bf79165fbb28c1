"""Runs functions on several gloo processes: one pool of workers for a whole test session.

Importing torch, DeepSpeed and megatron-core takes seconds per process, so the workers start at their first use, are
kept for all later tests, and are made anew only after one of them died or hung. `run(function, processes, *args)`
calls a module-level function on that many workers, each with an initialized default process group of exactly that
size, and returns one result per process:

    from tests.support.distributed import run

    def sum_of_places() -> int:
        place = torch.tensor(dist.get_rank())
        dist.all_reduce(place)
        return int(place)

    def test_sum() -> None:
        assert run(sum_of_places, 2) == [1, 1]

`run_alone` is for functions that kill their process: fresh workers, exit codes back. A `WorkerPool` of its own is for
workers with other variables in their environment, which libraries read when they are imported (`tests/conftest.py` has
one). Everything stays on the loopback interface and on the CPU, also on a machine with GPUs.
"""

import multiprocessing
import pickle
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any

from tests.support.worker import Failure, Task, serve, serve_once

if TYPE_CHECKING:
    import torch.distributed as dist

POOL_SIZE = 4
"""Most processes one test may ask for."""

START_SECONDS = 300.0
"""A worker that has not imported everything by then is taken for dead; generous, for machines that are busy."""

GRACE_SECONDS = 10.0
"""What the others get to notice, through closed connections, that one process failed."""

_spawn = multiprocessing.get_context("spawn")


class WorkerLostError(AssertionError):
    """A worker died or did not answer in time."""


class WorkerTracebackError(Exception):
    """A worker's traceback as text: the `__cause__` of the exception that is raised in the test."""

    def __str__(self) -> str:
        return str(self.args[0])


def _start_store() -> "dist.TCPStore":
    """A store on a free port of the loopback interface alone (by itself torch would listen on all of them)."""
    from torch.distributed import TCPStore

    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    port = listener.getsockname()[1]
    return TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())


def _tasks(
    number: int, function: Callable[..., object], processes: int, timeout_seconds: float, args: tuple, kwargs: dict
) -> list[Task]:
    if not 1 <= processes <= POOL_SIZE:
        raise ValueError(f"a test may run on 1 to {POOL_SIZE} processes, not on {processes}")
    call = pickle.dumps((function, args, kwargs))
    path = list(sys.path)
    return [Task(number, place, processes, timeout_seconds, path, call) for place in range(processes)]


def _exit_text(process: BaseProcess) -> str:
    process.join(5)
    code = process.exitcode
    if code is not None and code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"exited with code {code}"


@dataclass(frozen=True)
class _Worker:
    process: BaseProcess
    connection: Connection


class WorkerPool:
    """Worker processes that wait for tasks; `run` below keeps one such pool."""

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        """`environment`: variables of the workers, laid over those that all workers have."""
        self._store = _start_store()
        self._environment = dict(environment or {})
        self._workers: list[_Worker] = []
        self._tasks_begun = 0

    @property
    def process_ids(self) -> list[int | None]:
        return [worker.process.pid for worker in self._workers]

    def run(
        self, function: Callable[..., object], processes: int, timeout_seconds: float, args: tuple, kwargs: dict
    ) -> list[Any]:
        """See `run` below. After a `WorkerLostError` the pool is empty, and usable."""
        tasks = _tasks(self._tasks_begun, function, processes, timeout_seconds, args, kwargs)
        self._tasks_begun += 1
        self._grow(processes)
        workers = self._workers[:processes]
        for worker, task in zip(workers, tasks, strict=True):
            worker.connection.send_bytes(pickle.dumps(task))
        return self._collect(workers, timeout_seconds)

    def kill(self) -> None:
        """Ends all workers at once, whatever they are doing."""
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.join()
            worker.connection.close()
        self._workers.clear()

    def _grow(self, processes: int) -> None:
        """Starts what is missing, all at once, and waits until the last has imported everything."""
        fresh = []
        for _ in range(len(self._workers), processes):
            ours, theirs = _spawn.Pipe()
            process = _spawn.Process(target=serve, args=(self._store.port, theirs, self._environment), daemon=True)
            process.start()
            theirs.close()
            fresh.append(_Worker(process, ours))
        self._workers += fresh
        self._collect(fresh, START_SECONDS)

    def _collect(self, workers: Sequence[_Worker], timeout_seconds: float) -> list[Any]:
        """One message of each worker.

        A death is reported first, then the earliest exception, then whoever said nothing in time. After the first
        death or exception the others have `GRACE_SECONDS` left: they may be waiting for the process that failed.
        """
        deadline = time.monotonic() + timeout_seconds
        messages: dict[int, Any] = {}
        died: list[str] = []
        failures: list[Failure] = []
        pending = {worker.connection: place for place, worker in enumerate(workers)}
        while pending:
            ready = wait(list(pending), max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                place = pending.pop(connection)  # type: ignore[call-overload]
                worker = workers[place]
                try:
                    messages[place] = pickle.loads(worker.connection.recv_bytes())
                except (EOFError, ConnectionError):
                    died.append(f"process {place} of {len(workers)} {_exit_text(worker.process)}")
            failures = [message for message in messages.values() if isinstance(message, Failure)]
            if died or failures:
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        hung = [f"process {place} of {len(workers)} hung" for place in pending.values()]
        if died or hung:
            self.kill()
        first = min(failures, key=lambda failure: failure.raised_seconds) if failures else None
        cause = WorkerTracebackError(first.text) if first else None
        if died:
            raise WorkerLostError("; ".join(died)) from cause
        if first:
            raise first.error from cause
        if hung:
            raise WorkerLostError(f"{'; '.join(hung)}: no answer within {timeout_seconds:.0f} s")
        return [messages[place] for place in range(len(workers))]


_pool: WorkerPool | None = None


def run(
    function: Callable[..., object], processes: int, *args: object, timeout_seconds: float = 120.0, **kwargs: object
) -> list[Any]:
    """Results of `function(*args, **kwargs)` on `processes` workers of the pool, in the order of their places.

    An exception of a worker is raised here, of the same type, with the worker's traceback as its cause. A worker that
    dies or does not answer in time raises `WorkerLostError`, and the next call starts new workers.
    """
    global _pool
    if _pool is None:
        _pool = WorkerPool()
    return _pool.run(function, processes, timeout_seconds, args, kwargs)


def close_pool() -> None:
    """Ends the workers; the session's last act (`tests/conftest.py`)."""
    global _pool
    if _pool is not None:
        _pool.kill()
        _pool = None


def run_alone(
    function: Callable[..., object], processes: int, *args: object, timeout_seconds: float = 120.0, **kwargs: object
) -> list[int]:
    """Exit codes of fresh processes that call the function as `run` does and then end: 0, 1 after an exception, that
    of `sys.exit`, or minus the signal's number. For functions that kill their process."""
    store = _start_store()
    workers = [
        _spawn.Process(target=serve_once, args=(store.port, task), daemon=True)
        for task in _tasks(0, function, processes, timeout_seconds, args, kwargs)
    ]
    for worker in workers:
        worker.start()
    deadline = time.monotonic() + START_SECONDS + timeout_seconds
    for worker in workers:
        worker.join(max(0.0, deadline - time.monotonic()))
    hung = [f"process {place} of {processes} hung" for place, worker in enumerate(workers) if worker.is_alive()]
    for worker in workers:
        worker.kill()
        worker.join()
    if hung:
        raise WorkerLostError("; ".join(hung))
    return [worker.exitcode or 0 for worker in workers]
