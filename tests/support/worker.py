"""The worker's side of `tests/support/distributed.py`: joins a process group, performs a task, and leaves no trace of
it."""

import faulthandler
import gc
import os
import pickle
import random
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch.distributed as dist

WORKER_ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu",
    "HF_HUB_OFFLINE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


class WorkerError(AssertionError):
    """Stands for an exception of a worker that cannot be pickled."""


@dataclass(frozen=True)
class Task:
    """What one worker is asked to do; `call` is the pickled (function, args, kwargs), read once the path is set."""

    number: int
    place: int
    processes: int
    timeout_seconds: float
    path: list[str]
    call: bytes


@dataclass(frozen=True)
class Failure:
    """An exception of a worker on its way to the test."""

    error: BaseException
    text: str
    raised_seconds: float
    """On the machine's monotonic clock: the first failure is the cause, the others' lost connections follow from it."""


def _set_up_worker(store_port: int, environment: Mapping[str, str]) -> "dist.Store":
    """Environment, libraries and the shared store of a fresh worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which then ends the workers
    os.environ.update({**WORKER_ENVIRONMENT, **environment})
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


def _enter_group(store: "dist.Store", task: Task) -> None:
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
    when the group is destroyed through `deepspeed.comm`, and never the first. An engine that a test leaves behind would
    live on, held by its own hooks, and with it some twenty groups and their gloo threads.

    ZeRO 3 numbers parameters and modules (these in a default argument) and compares the numbers between processes, of
    which some have done other tasks.
    """
    import deepspeed.comm.comm
    import deepspeed.utils.groups
    import torch.distributed as dist
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero import Init
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from megatron.core import parallel_state

    from pretrain.engine.build import tear_down

    # By its own type: a dead proxy (torch.compile leaves some behind) raises when it is asked for its class.
    for engine in [thing for thing in gc.get_objects() if issubclass(type(thing), DeepSpeedEngine) and thing.module]:
        tear_down(engine)
    gc.collect()
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
    deepspeed.utils.groups._release_process_group_references()
    deepspeed.comm.comm.cdb = None
    Init.param_id = DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][0] = 0


def _failure(task: Task, error: BaseException) -> Failure:
    """The exception itself where it survives pickling, else its text."""
    raised_seconds = time.monotonic()
    text = "".join(traceback.format_exception(error))
    traceback.clear_frames(error.__traceback__)
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever a foreign exception's constructor does not like
        error = WorkerError(f"{type(error).__name__}: {error}")
    return Failure(error, f"\nprocess {task.place} of {task.processes}:\n{text}", raised_seconds)


def _perform(store: "dist.Store", task: Task) -> object:
    """One task from joining the group to leaving it: the function's result, or a `Failure`."""
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


def serve(store_port: int, connection: Connection, environment: Mapping[str, str]) -> None:
    """A worker's life: performs task after task until the parent closes the connection."""
    store = _set_up_worker(store_port, environment)
    connection.send_bytes(pickle.dumps("ready"))
    while True:
        try:
            task = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        # Plain pickle copies tensors; multiprocessing's own would share their memory, which dies with the worker.
        connection.send_bytes(pickle.dumps(_perform(store, task)))


def serve_once(store_port: int, task: Task) -> None:
    """The life of a worker of `run_alone`: exceptions end it with exit code 1 and a traceback on stderr."""
    store = _set_up_worker(store_port, {})
    sys.path[:] = task.path
    _enter_group(store, task)
    function, args, kwargs = pickle.loads(task.call)
    function(*args, **kwargs)
    _leave_group()
