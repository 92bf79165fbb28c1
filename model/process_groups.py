"""Process groups of megatron-core, the adapter through which DeepSpeed asks for them, and the CPU device shim."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state


def device() -> torch.device:
    """The device this process computes on."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _answer_cpu_as_current_device() -> None:
    """Lets megatron-core allocate on a machine without a GPU.

    megatron-core 0.16.1 calls `torch.cuda.current_device()` directly in its mappings, its rotary embedding and others,
    which raises without CUDA. Nothing else in the process asks for a CUDA device there, so it may answer the CPU.
    """
    if not torch.cuda.is_available():
        torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]


def initialize_process_groups(tensor_parallel: int, timeout: timedelta = timedelta(minutes=30)) -> None:
    """Builds tensor- and data-parallel groups over the already initialized default group; a collective of theirs that
    takes longer than `timeout` ends the process.

    Raises `ValueError` when the number of processes is not a multiple of `tensor_parallel`.
    """
    processes = dist.get_world_size()
    if processes % tensor_parallel:
        raise ValueError(f"{processes} processes do not divide into tensor-parallel groups of {tensor_parallel}")
    _answer_cpu_as_current_device()
    minutes = timeout / timedelta(minutes=1)
    parallel_state.initialize_model_parallel(
        tensor_parallel, create_gloo_process_groups=False, distributed_timeout_minutes=minutes
    )


@contextmanager
def single_process() -> Iterator[None]:
    """Process groups of one process, in memory: lets a tool build the training model without a launcher or a
    network."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        initialize_process_groups(1)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def tensor_group() -> dist.ProcessGroup:
    """The processes that hold the shards of one model."""
    return parallel_state.get_tensor_model_parallel_group()


def tensor_size() -> int:
    """Processes in this process's tensor-parallel group."""
    return parallel_state.get_tensor_model_parallel_world_size()


def tensor_index() -> int:
    """This process's place in its tensor-parallel group."""
    return parallel_state.get_tensor_model_parallel_rank()


def data_group() -> dist.ProcessGroup:
    """The processes that hold the same shard and see different data."""
    return parallel_state.get_data_parallel_group()


def data_size() -> int:
    """Processes in this process's data-parallel group."""
    return parallel_state.get_data_parallel_world_size()


def data_index() -> int:
    """This process's place in its data-parallel group."""
    return parallel_state.get_data_parallel_rank()


class DeepSpeedProcessGroups:
    """The `mpu` DeepSpeed asks for groups, answered by megatron-core.

    `parallel_state` itself will not do: DeepSpeed 0.19.8 calls `get_model_parallel_rank` and
    `get_model_parallel_world_size`, which megatron-core 0.16.1 no longer has. There is deliberately no
    `initialize_sequence_parallel`: DeepSpeed would take its presence for Ulysses and ignore tensor parallelism.
    """

    get_model_parallel_rank = staticmethod(tensor_index)
    get_model_parallel_world_size = staticmethod(tensor_size)
    get_model_parallel_group = staticmethod(tensor_group)
    get_tensor_model_parallel_rank = staticmethod(tensor_index)
    get_tensor_model_parallel_world_size = staticmethod(tensor_size)
    get_tensor_model_parallel_group = staticmethod(tensor_group)
    get_data_parallel_rank = staticmethod(data_index)
    get_data_parallel_world_size = staticmethod(data_size)
    get_data_parallel_group = staticmethod(data_group)
