"""Differentiable collectives over the tensor-parallel group, and the stream's gathers and scatters.

All of them work on contiguous copies of their own: megatron-core 0.16.1's `_reduce` all-reduces `x.contiguous()` and
returns `x`, so a slice or an expanded gradient would come back unreduced without a word.

`copy_to_group` is Megatron's f (Shoeybi et al. 2019, section 3): the identity forward, and a sum backward. The
collectives of a bottleneck are in `model/layers/bottleneck.py`.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from model.process_groups import tensor_group, tensor_size

Collective = Callable[[Tensor], Tensor]


def all_reduced(tensor: Tensor) -> Tensor:
    """Sum over the tensor-parallel group, in a tensor of its own."""
    total = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=tensor_group())
    return total


def all_gathered(tensor: Tensor) -> Tensor:
    """Shards joined along the last dimension: `(..., width/tp)` to `(..., width)`."""
    shards = tensor.new_empty(tensor_size(), *tensor.shape)
    dist.all_gather_into_tensor(shards.view(-1, *tensor.shape[1:]), tensor.contiguous(), group=tensor_group())
    return torch.cat(shards.unbind(), dim=-1)


def reduce_scattered(tensor: Tensor) -> Tensor:
    """Sum over the group, each process keeping its slice of the last dimension: `(..., width)` to `(..., width/tp)`."""
    pieces = torch.stack(tensor.chunk(tensor_size(), dim=-1))
    piece = torch.empty_like(pieces[0])
    dist.reduce_scatter_tensor(piece, pieces.view(-1, *pieces.shape[2:]), group=tensor_group())
    return piece


class _Paired(torch.autograd.Function):
    """One function forward, and another one for the gradient."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, forward: Collective, backward: Collective) -> Tensor:
        ctx.collective = backward
        return forward(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.collective(gradient), None, None


def _same(tensor: Tensor) -> Tensor:
    return tensor.view_as(tensor)


def copy_to_group(tensor: Tensor) -> Tensor:
    """Identity; the gradient is summed over the tensor-parallel group."""
    return tensor if tensor_size() == 1 else _Paired.apply(tensor, _same, all_reduced)


def gather_stream(shard: Tensor) -> Tensor:
    """`(seq, batch, hidden/tp)` to `(seq, batch, hidden)`; the gradient is summed and scattered.

    Every process must use the gathered tensor for a different share of the result (a column-parallel layer that does
    not reduce its input gradient itself), or gradients come out tp times too large.
    """
    return shard if tensor_size() == 1 else _Paired.apply(shard, all_gathered, reduce_scattered)


def scatter_stream(partial: Tensor) -> Tensor:
    """Sums `partial (seq, batch, hidden)` over the group and keeps `(seq, batch, hidden/tp)`; the gradient is
    gathered."""
    return partial if tensor_size() == 1 else _Paired.apply(partial, reduce_scattered, all_gathered)
