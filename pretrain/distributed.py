"""How the processes of a run join, agree and leave."""

import ctypes
import gc
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from pretrain.config.run import GuardConfig, RunConfig
from pretrain.device_check import check_device, meet
from pretrain.device_settings import collective_timeout, settle_device
from pretrain.devices import processes_of_machine
from pretrain.errors import ConfigError, EspalierError

Result = TypeVar("Result")

_PR_SET_PDEATHSIG = 1  # of linux/prctl.h


@contextmanager
def imports_out_of_collection() -> Iterator[None]:
    """Inside, the garbage collector leaves alone what is there already.

    Imports leave a million objects behind; walking them makes a full collection, of which every growth event needs one,
    take 0.3 s instead of 0.02.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def joined_processes(config: RunConfig | None = None) -> Iterator[int]:
    """Joins the processes that the launcher started (without a launcher: alone) and leaves them in order; yields their
    number.

    `config` decides how they compute and how long they wait for each other; without it, the defaults do. Groups are
    destroyed at the end: a process that exits with live gloo threads prints errors and has a wrong exit code.
    """
    if sys.prefix != sys.base_prefix:
        # The default folder is shared by all environments of a user, and each would compile DeepSpeed's operator anew.
        os.environ.setdefault("TORCH_EXTENSIONS_DIR", f"{sys.prefix}/torch_extensions")
    _take_place_from_mpi()
    if "RANK" in os.environ:
        _end_with_the_launcher()
    else:
        os.environ.update(
            RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port())
        )
    import deepspeed  # not at the top: it takes seconds, and most importers of this module do not need it

    settle_device(config)
    precision, guard = ("fp32", GuardConfig()) if config is None else (config.train.precision, config.guard)
    check_device(precision, max(processes_of_machine(1), int(os.environ["LOCAL_RANK"]) + 1))
    check_precision(precision)
    timeout = collective_timeout(guard.hang_seconds)
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "nccl"
    deepspeed.init_distributed(dist_backend=backend, verbose=False, timeout=timeout)
    try:
        if backend == "nccl":
            meet(torch.device("cuda", torch.cuda.current_device()))
        with imports_out_of_collection():
            yield dist.get_world_size()
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def _take_place_from_mpi() -> None:
    """Translates the variables in which OpenMPI's mpirun says which process this is."""
    for ours, theirs in (("RANK", "RANK"), ("WORLD_SIZE", "SIZE"), ("LOCAL_RANK", "LOCAL_RANK")):
        if f"OMPI_COMM_WORLD_{theirs}" in os.environ:
            os.environ.setdefault(ours, os.environ[f"OMPI_COMM_WORLD_{theirs}"])


def _end_with_the_launcher() -> None:
    """Asks the kernel for SIGTERM when the process that started this one ends, even if by SIGKILL (Linux)."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def check_precision(precision: str) -> None:
    """ConfigError if this machine's device cannot train in `precision`."""
    from deepspeed.accelerator import get_accelerator

    if precision == "fp16" and not get_accelerator().is_fp16_supported():
        raise ConfigError(
            f"DeepSpeed has no fp16 on this machine's {get_accelerator().device_name()} device: set train.precision to "
            "bf16 or fp32"
        )


def is_first_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def process_number() -> int:
    """Number of this process in the default group; 0 without one."""
    return dist.get_rank() if dist.is_initialized() else 0


def gather(value: Any) -> list[Any]:
    """The values of all processes, on all of them; a collective."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def gather_to_first(value: Any) -> list[Any]:
    """The values of all processes on process 0, an empty list elsewhere; a collective."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size() if process_number() == 0 else None
    dist.gather_object(value, values)
    return values or []


@contextmanager
def vote(explained: Callable[[Exception], EspalierError]) -> Iterator[None]:
    """Runs its body on all processes. If it failed on any, all raise what `explained` makes of the error of the first
    that failed."""
    cause = None
    try:
        yield
    except Exception as error:
        cause = error
    _raise_first(None if cause is None else explained(cause), cause)


def together(action: Callable[[], Result]) -> Result:
    """Runs `action` on every process. If it fails on any, all raise the error of the first that failed.

    A file that only one node misses then ends the run with one sentence, instead of leaving the others waiting.
    """
    result, error = None, None
    try:
        result = action()
    except EspalierError as raised:
        error = raised
    _raise_first(error)
    return result  # type: ignore[return-value]


def _raise_first(error: EspalierError | None, cause: Exception | None = None) -> None:
    """Raises the error of the first process that has one, on all of them."""
    failed: EspalierError | None = next((one for one in gather(error) if one is not None), None)
    if failed is not None:
        failed.agreed = True
        raise failed from cause
