"""Bytes that a training process holds: counted in an engine, predicted from ranks, and at the peak of some code.

With N numbers on a process, d data-parallel processes and e bytes a number,

| ZeRO | weights | gradients before the optimizer's step   | masters and moments                            |
|------|---------|-----------------------------------------|------------------------------------------------|
| 0    | e N     | e N                                     | 8 N: weights are masters                       |
| 1, 2 | e N     | e N / d, reduced in the last micro-step | 12 N / d                                       |
| 3    | e N / d | e N / d, a buffer that always stands    | 12 N / d                                       |

and no gradients after it, but for the buffer. Parameters that ZeRO 3 has gathered are not counted.
"""

import ctypes
import gc
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor

from model.config import ModelConfig
from model.costs.arithmetic import total_parameters, trained_parameters
from pretrain.engine.optimizer_state import optimizer_state
from pretrain.engine.zero3 import held

_SAMPLE_SECONDS = 0.002
_M_MMAP_THRESHOLD = -3  # of malloc.h


@dataclass(frozen=True)
class ResidentBytes:
    """What one process holds of the model."""

    weights: int
    gradients: int
    state: int
    """Masters and moments, without masters that are the weights themselves."""

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.state


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes by address, each storage once."""
    found = (tensor.untyped_storage() for tensor in tensors)
    return {storage.data_ptr(): storage.nbytes() for storage in found if storage.nbytes()}


def engine_bytes(engine: DeepSpeedEngine) -> ResidentBytes:
    """Storages of the engine's weights, gradients, masters and moments, whole buffers where they are flat."""
    parameters = list(engine.module.parameters())
    weights = _storages(held(parameter)[1] for parameter in parameters)
    gradients = _storages(_gradients(engine, parameters))
    state = _storages(_masters_and_moments(engine))
    return ResidentBytes(
        sum(weights.values()),
        sum(nbytes for place, nbytes in gradients.items() if place not in weights),
        sum(nbytes for place, nbytes in state.items() if place not in weights),
    )


def _gradients(engine: DeepSpeedEngine, parameters: Iterable[Tensor]) -> list[Tensor]:
    """Whole ones, and the partitions that DeepSpeed 0.19.8 keeps in `averaged_gradients` (ZeRO 1 and 2) or in a buffer
    (ZeRO 3)."""
    if engine.zero_optimization_stage() == 3:
        return [engine.optimizer.grad_partitions_flat_buffer]
    found = [parameter.grad for parameter in parameters if parameter.grad is not None]
    for partitions in getattr(engine.optimizer, "averaged_gradients", {}).values():
        found += [partition for partition in partitions or () if partition is not None]
    return found


def _masters_and_moments(engine: DeepSpeedEngine) -> list[Tensor]:
    """What AdamW steps, and its state, which exists before the first step because `optimizer_state` makes it."""
    state = optimizer_state(engine)
    if engine.zero_optimization_stage() == 3:
        return [fragment.values for fragment in state.fragments()]
    adam: torch.optim.AdamW = engine.basic_optimizer
    masters = [master for group in adam.param_groups for master in group["params"]]
    return masters + [state for master in masters for state in adam.state[master].values()]


def predicted_bytes(
    config: ModelConfig, ranks: Mapping[str, int], *, stage: int, precision: str, tensor: int, data: int
) -> ResidentBytes:
    """What the ranks predict just before the optimizer's step, for a model that tensor parallelism splits evenly."""
    numbers, trained = (count(config, ranks) // tensor for count in (total_parameters, trained_parameters))
    element = 4 if precision == "fp32" else 2
    return ResidentBytes(
        element * numbers // (data if stage == 3 else 1),
        element * trained // (data if stage else 1),
        8 * trained if stage == 0 else 12 * trained // data,
    )


def tensor_bytes() -> int:
    """Storages of all tensors that Python can reach in this process, whoever owns them."""
    gc.collect()
    return sum(_storages(thing for thing in gc.get_objects() if isinstance(thing, Tensor)).values())


def process_bytes() -> int:
    """Device memory that torch has allocated; without a device, what the system has given the process."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    return int(psutil.Process(os.getpid()).memory_info().rss)


class PeakBytes:
    """The largest `process_bytes` inside a `with`: counted by torch on a device, else sampled by a thread."""

    bytes = 0

    def __enter__(self) -> "PeakBytes":
        self.bytes = process_bytes()
        self._ended = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        else:
            self._sampler.start()
        return self

    def _sample(self) -> None:
        while not self._ended.wait(_SAMPLE_SECONDS):
            self.bytes = max(self.bytes, process_bytes())

    def __exit__(self, *raised: object) -> None:
        if torch.cuda.is_available():
            self.bytes = torch.cuda.max_memory_allocated()
        else:
            self._ended.set()
            self._sampler.join()


@contextmanager
def freed_memory_returned() -> Iterator[None]:
    """Inside it glibc gives every freed tensor back to the system, so that what the system counts is what is in use.

    By itself glibc keeps blocks of up to 32 MB for later, the more of them the larger those it has seen.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", lambda option, value: None)  # glibc alone has it
    set_option(_M_MMAP_THRESHOLD, 2**16)
    try:
        yield
    finally:
        set_option(_M_MMAP_THRESHOLD, 2**25)
