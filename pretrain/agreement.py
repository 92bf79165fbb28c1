"""Agrees on a few numbers over all processes, once a step, before the optimizer moves: one reduction, one wait.

    (loss, ‖g‖², processes that still write a checkpoint, processes that received a signal to stop, by signal)

are summed over all processes as one fp64 tensor. Every decision of a step follows from it: whether the step is skipped,
how far its gradient is clipped, whether the loss is a spike, whether to save and leave. A plain training step waits for
the device only here. The kernels that follow, the optimizer's and those of the next forward pass, are only launched.
"""

import signal
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from model.process_groups import device, tensor_index

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
"""Signals that ask a run to save and leave; of two that were received the later in this list counts."""


@dataclass(frozen=True)
class Flags:
    """What one process reports about itself; or what is true of at least one process."""

    signal: int = 0
    """Number of the signal that was received; 0: none."""
    writing: bool = False
    """Whether a part of a checkpoint is still being written."""


NO_FLAGS = Flags()


@dataclass(frozen=True)
class Agreement:
    """The numbers of one step that are the same on all processes, to the last bit."""

    loss: float
    """Sum of the losses of all data-parallel processes."""
    squared_norm: float
    """Squared norm of the gradient, times the squared loss scale."""
    flags: Flags


def agree(loss: Tensor, squared_norm: Tensor, flags: Flags) -> Agreement:
    """Sums this process's numbers over all processes: a collective that waits for the device.

    `loss ()`: sum over this process's micro-batches; `squared_norm ()`: this process's share of ‖g‖².
    """
    numbers = torch.zeros(3 + len(SIGNALS), dtype=torch.float64, device=device())
    if tensor_index() == 0:  # the other tensor-parallel processes have the same loss
        numbers[0].copy_(loss)
    numbers[1].copy_(squared_norm)
    # Filled, not copied from the host: a copy would wait.
    for place, flag in enumerate([flags.writing, *(flags.signal == number for number in SIGNALS)], start=2):
        if flag:
            numbers[place].fill_(1.0)
    dist.all_reduce(numbers)
    dist.broadcast(numbers, src=0)  # the same to the last bit, so that all decide alike
    total, squares, writing, *received = numbers.tolist()
    stop = max((int(number) for number, count in zip(SIGNALS, received, strict=True) if count), default=0)
    return Agreement(total, squares, Flags(stop, writing > 0))
