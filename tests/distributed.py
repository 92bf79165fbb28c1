"""Runs functions on several gloo processes: one pool of workers for a whole test session.

Importing torch, DeepSpeed and megatron-core takes seconds per process, so the workers start at their first use, are
kept for all later tests, and are made anew only after one of them died or hung. `run(function, processes, *args)`
calls a module-level function on that many workers, each with an initialized default process group of exactly that
size, and returns one result per process:

    from tests.distributed import run

    def sum_of_places() -> int:
        place = torch.tensor(dist.get_rank())
        dist.all_reduce(place)
        return int(place)

    def test_sum() -> None:
        assert run(sum_of_places, 2) == [1, 1]

`run_alone` is for functions that kill their process: fresh workers, exit codes back. Everything stays on the loopback
interface and on the CPU, also on a machine with GPUs.
"""

import faulthandler
import gc
import multiprocessing
import os
import pickle
import random
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch.distributed as dist

POOL_SIZE = 4
"""Most processes one test may ask for."""

START_SECONDS = 300.0
"""A worker that has not imported everything by then is taken for dead; generous, for machines that are busy."""

GRACE_SECONDS = 10.0
"""What the others get to notice, through closed connections, that one process failed."""

WORKER_ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu",
    "HF_HUB_OFFLINE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

_spawn = multiprocessing.get_context("spawn")


class WorkerLostError(AssertionError):
    """A worker died or did not answer in time."""


class WorkerError(AssertionError):
    """Stands for an exception of a worker that cannot be pickled."""


class WorkerTracebackError(Exception):
    """A worker's traceback as text: the `__cause__` of the exception that is raised in the test."""

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True)
class _Task:
    """What one worker is asked to do; `call` is the pickled (function, args, kwargs), read once the path is set."""

    number: int
    place: int
    processes: int
    timeout_seconds: float
    path: list[str]
    call: bytes


@dataclass(frozen=True)
class _Failure:
    """An exception of a worker on its way to the test."""

    error: BaseException
    text: str
    raised_seconds: float
    """On the machine's monotonic clock: the first failure is the cause, the others' lost connections follow from it."""


# The worker's side.


def _set_up_worker(store_port: int) -> "dist.Store":
    """Environment, libraries and the shared store of a fresh worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which then ends the workers
    os.environ.update(WORKER_ENVIRONMENT)
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # ninja lies there
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
    warnings.filterwarnings("ignore", message=".*torch.distributed.all_gather_into_tensor. is deprecated")
    import deepspeed
    import megatron.core.parallel_state  # noqa: F401
    import torch

    torch.set_num_threads(1)
    deepspeed.utils.logging.set_log_level_from_string("warning")
    gc.freeze()  # what the imports made stays anyway; collecting after each task costs a second if it is looked at
    return torch.distributed.TCPStore("127.0.0.1", store_port)


def _enter_group(store: "dist.Store", task: _Task) -> None:
    """The default process group, the variables a launcher would have set, and the same random state for every task."""
    import numpy as np
    import torch

    os.environ.update(RANK=str(task.place), LOCAL_RANK=str(task.place), WORLD_SIZE=str(task.processes))
    torch.distributed.init_process_group(
        "gloo",
        store=torch.distributed.PrefixStore(f"task_{task.number}", store),
        rank=task.place,
        world_size=task.processes,
        timeout=timedelta(seconds=task.timeout_seconds),
    )
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def _leave_group() -> None:
    """Takes down everything that remembers the group, so that the next task may have another number of processes.

    Three libraries keep process groups in module globals. megatron-core and torch have a call that clears them.
    DeepSpeed 0.19.8 keeps its backend in `deepspeed.comm.comm.cdb`, which would go on claiming to be initialized, and
    in `deepspeed.utils.groups` a clone of the world group and the last engine's `mpu`; it drops those by itself only
    when the group is destroyed through `deepspeed.comm`, and never the first.
    """
    import deepspeed.comm.comm
    import deepspeed.utils.groups
    import torch.distributed as dist
    from megatron.core import parallel_state

    gc.collect()  # engines are full of cycles, and their hooks and buffers should not outlive the group
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
    deepspeed.utils.groups._release_process_group_references()
    deepspeed.comm.comm.cdb = None


def _failure(task: _Task, error: BaseException) -> _Failure:
    """The exception itself where it survives pickling, else its text."""
    raised_seconds = time.monotonic()
    text = "".join(traceback.format_exception(error))
    traceback.clear_frames(error.__traceback__)
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever a foreign exception's constructor does not like
        error = WorkerError(f"{type(error).__name__}: {error}")
    return _Failure(error, f"\nprocess {task.place} of {task.processes}:\n{text}", raised_seconds)


def _perform(store: "dist.Store", task: _Task) -> object:
    """One task from joining the group to leaving it: the function's result, or a `_Failure`."""
    environment, folder = dict(os.environ), Path.cwd()
    faulthandler.dump_traceback_later(0.9 * task.timeout_seconds)  # says on stderr where a hung worker stands
    result: object
    try:
        sys.path[:] = task.path
        _enter_group(store, task)
        function, args, kwargs = pickle.loads(task.call)
        result = function(*args, **kwargs)
    except BaseException as error:
        result = _failure(task, error)
    finally:
        _leave_group()
        faulthandler.cancel_dump_traceback_later()
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
    return result


def _serve(store_port: int, connection: Connection) -> None:
    """A worker's life: performs task after task until the parent closes the connection."""
    store = _set_up_worker(store_port)
    connection.send_bytes(pickle.dumps("ready"))
    while True:
        try:
            task = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        # Plain pickle copies tensors; multiprocessing's own would share their memory, which dies with the worker.
        connection.send_bytes(pickle.dumps(_perform(store, task)))


def _serve_once(store_port: int, task: _Task) -> None:
    """The life of a worker of `run_alone`: exceptions end it with exit code 1 and a traceback on stderr."""
    store = _set_up_worker(store_port)
    sys.path[:] = task.path
    _enter_group(store, task)
    function, args, kwargs = pickle.loads(task.call)
    function(*args, **kwargs)
    _leave_group()


# The test's side.


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
) -> list[_Task]:
    if not 1 <= processes <= POOL_SIZE:
        raise ValueError(f"a test may run on 1 to {POOL_SIZE} processes, not on {processes}")
    call = pickle.dumps((function, args, kwargs))
    path = list(sys.path)
    return [_Task(number, place, processes, timeout_seconds, path, call) for place in range(processes)]


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

    def __init__(self) -> None:
        self._store = _start_store()
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
            process = _spawn.Process(target=_serve, args=(self._store.port, theirs), daemon=True)
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
        failures: list[_Failure] = []
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
            failures = [message for message in messages.values() if isinstance(message, _Failure)]
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
        _spawn.Process(target=_serve_once, args=(store.port, task), daemon=True)
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
