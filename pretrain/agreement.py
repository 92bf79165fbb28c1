"""What all processes agree on once a step, before the optimizer moves: one reduction, one wait for the device.

    (loss, ‖g‖², processes that still write a checkpoint, processes that were told to stop, by signal)

are summed over all processes as one fp64 tensor. Whoever decides anything in a step decides by it: whether the step is
skipped, how far its gradient is clipped, whether the loss is a spike, whether to save and leave. It is the one place of
a plain training step where the host waits for the device; what follows, the optimizer's kernels and those of the next
forward pass, is only launched.
"""

import signal
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from model.process_groups import device, tensor_index

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
"""Those that ask a run to save and leave; the later one counts for more."""


@dataclass(frozen=True)
class Flags:
    """What a process knows of itself, or is true of any."""

    signal: int = 0
    """0: none."""
    writing: bool = False
    """Whether a part of a checkpoint is still being written."""


NO_FLAGS = Flags()


@dataclass(frozen=True)
class Agreement:
    """The same on all processes, to the last bit."""

    loss: float
    """Sum over data-parallel processes."""
    squared_norm: float
    """Squared norm of the gradient, times the squared loss scale."""
    flags: Flags


def agree(loss: Tensor, squared_norm: Tensor, flags: Flags) -> Agreement:
    """A collective, and a wait. `loss ()`: what this process's micro-batches add up to; `squared_norm ()`: this
    process's share."""
    numbers = torch.zeros(3 + len(SIGNALS), dtype=torch.float64, device=device())
    if tensor_index() == 0:  # the other tensor-parallel processes have the same one
        numbers[0].copy_(loss)
    numbers[1].copy_(squared_norm)
    # Filled and not copied from the host: a copy would wait.
    for place, flag in enumerate([flags.writing, *(flags.signal == number for number in SIGNALS)], start=2):
        if flag:
            numbers[place].fill_(1.0)
    dist.all_reduce(numbers)
    dist.broadcast(numbers, src=0)  # to the last bit the same, for whoever decides by it
    total, squares, writing, *received = numbers.tolist()
    stop = max((int(number) for number, count in zip(SIGNALS, received, strict=True) if count), default=0)
    return Agreement(total, squares, Flags(stop, writing > 0))
