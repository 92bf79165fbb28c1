"""Differentiable collectives over the tensor-parallel group, and the stream's gathers and scatters.

All of them work on contiguous copies of their own: megatron-core 0.16.1's `_reduce` all-reduces `x.contiguous()` and
returns `x`, so a slice or an expanded gradient would come back unreduced without a word.

The pair around a bottleneck is Megatron's g and f (Shoeybi et al. 2019, section 3): `reduce_bottleneck` sums forward
and is the identity backward, `copy_to_group` is the identity forward and sums backward. What lies between them is
computed alike by every process, with full values and full gradients.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from model.process_groups import tensor_group, tensor_index, tensor_size


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


class _CopyToGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return all_reduced(gradient)


class _GatherStream(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shard: Tensor) -> Tensor:
        return all_gathered(shard)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return reduce_scattered(gradient)


class _ScatterStream(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, partial: Tensor) -> Tensor:
        return reduce_scattered(partial)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return all_gathered(gradient)


def _parts_needed(dtype: torch.dtype) -> int:
    """How many numbers of `dtype` hold an fp32 statistic to 4e-6 or better: one bf16 alone would err by 0.2 %."""
    return 1 if dtype == torch.float32 else 2


class _ReduceBottleneck(torch.autograd.Function):
    """Partial products, per-process statistics and extra rows in one all-reduce.

    Statistics are not summed on the wire: process i writes its own into column block i, where all others write zero, so
    every process receives all of them exactly, and sums of squares neither overflow in fp16 nor lose digits in bf16.
    Extra rows travel the same way, one block of rows a process.
    """

    @staticmethod
    def forward(ctx: Any, partial: Tensor, statistics: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        tokens, rank = partial.shape
        count, processes, index = statistics.shape[1], tensor_size(), tensor_index()
        parts = _parts_needed(partial.dtype)
        width = count * parts
        buffer = partial.new_zeros(tokens + processes * rows.shape[0], rank + processes * width)
        buffer[:tokens, :rank] = partial
        remainder = statistics
        for part in range(parts):
            column = rank + index * width + part * count
            buffer[:tokens, column : column + count] = remainder
            remainder = remainder - buffer[:tokens, column : column + count].float()
        first_row = tokens + index * rows.shape[0]
        buffer[first_row : first_row + rows.shape[0], :rank] = rows
        dist.all_reduce(buffer, group=tensor_group())
        ctx.index = index
        return (
            buffer[:tokens, :rank].contiguous(),
            buffer[:tokens, rank:].float().view(tokens, processes, parts, count).sum(dim=2),
            buffer[tokens:, :rank].reshape(processes, rows.shape[0], rank),
        )

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        partial, statistics, rows = gradients
        return partial, statistics[:, ctx.index], rows[ctx.index]


def reduce_bottleneck(partial: Tensor, statistics: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One all-reduce for a bottleneck and the norm in front of it.

    Takes `partial (tokens, rank)`, to be summed, this process's `statistics (tokens, k)` in fp32 and `rows (m, rank)`;
    returns `(tokens, rank)`, the statistics of all processes `(tokens, tp, k)` and their rows `(tp, m, rank)`.
    """
    if tensor_size() == 1:
        return partial, statistics.unsqueeze(1), rows.unsqueeze(0)
    return _ReduceBottleneck.apply(partial, statistics, rows)


def copy_to_group(tensor: Tensor) -> Tensor:
    """Identity; the gradient is summed over the tensor-parallel group."""
    return tensor if tensor_size() == 1 else _CopyToGroup.apply(tensor)


def gather_stream(shard: Tensor) -> Tensor:
    """`(seq, batch, hidden/tp)` to `(seq, batch, hidden)`; the gradient is summed and scattered.

    Every process must use the gathered tensor for a different share of the result (a column-parallel layer that does
    not reduce its input gradient itself), or gradients come out tp times too large.
    """
    return shard if tensor_size() == 1 else _GatherStream.apply(shard)


def scatter_stream(partial: Tensor) -> Tensor:
    """Sums `partial (seq, batch, hidden)` over the group and keeps `(seq, batch, hidden/tp)`; the gradient is
    gathered."""
    return partial if tensor_size() == 1 else _ScatterStream.apply(partial)
