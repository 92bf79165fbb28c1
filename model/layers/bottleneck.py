"""The two products of a factored layer, each with its one collective.

    down:  h = Σ_i A_i x_i      forward: one all-reduce, in which the norm's statistics ride    backward: none
    up:    y_i = B_i h          forward: none    backward: one all-reduce of the gradient of h

All of it works on contiguous buffers of its own (see `model/collectives.py`). The backward pass of `up` computes the
gradients of B and of the bias while the gradient of h is on its way, as megatron-core's
`LinearWithGradAccumulationAndAsyncCommunication` does. What lies between the two is computed alike by every process,
with full values and full gradients.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from model.costs.arithmetic import statistic_parts
from model.layers.recomputation import kept
from model.process_groups import tensor_group, tensor_index, tensor_size


class _Down(torch.autograd.Function):
    """A product on one process."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, A: Tensor, weight: Tensor | None) -> Tensor:
        ctx.save_for_backward(tokens, A, weight)
        return kept(lambda: tokens @ _weighted(A, weight).t())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        return _gradients(gradient, *ctx.saved_tensors)


class _ReducedDown(torch.autograd.Function):
    """A sum over the group of partial products, with statistics and extra rows of every process beside it.

    Statistics are not summed on the wire: process i writes its own into block i, where all others write zero, so every
    process receives all of them exactly, and sums of squares neither overflow in fp16 nor lose digits in bf16. Extra
    rows travel the same way.
    """

    @staticmethod
    def forward(
        ctx: Any, tokens: Tensor, A: Tensor, weight: Tensor | None, statistics: Tensor, rows: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(tokens, A, weight)
        ctx.index = tensor_index()
        buffer = kept(lambda: _reduced(tokens, _weighted(A, weight), statistics, rows))
        product, everyone, every_rows = _regions(buffer, tokens, A, statistics, rows)
        # Rows of their own, or they would keep the whole buffer alive.
        return product, everyone.float().sum(dim=2), every_rows.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
        product, statistics, rows = gradients
        return *_gradients(product, *ctx.saved_tensors), statistics[:, ctx.index], rows[ctx.index]


def _weighted(A: Tensor, weight: Tensor | None) -> Tensor:
    """A ⊙ g. Made twice and never saved: ZeRO 3 takes parameters back between the passes, and could not take it."""
    return A if weight is None else A * weight


def _gradients(
    gradient: Tensor, tokens: Tensor, A: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of `tokens (tokens, in/tp)`, `A (rank, in/tp)` and `weight (in/tp)`, from that of the product."""
    of_weighted = gradient.t() @ tokens
    if weight is None:
        return gradient @ A, of_weighted, None
    return gradient @ _weighted(A, weight), of_weighted * weight, (of_weighted * A).sum(dim=0)


def _reduced(tokens: Tensor, A: Tensor, statistics: Tensor, rows: Tensor) -> Tensor:
    """The flat buffer of one all-reduce: `(tokens + tp·m) · (rank + tp·k·parts)` numbers."""
    processes, index = tensor_size(), tensor_index()
    width = statistics.shape[1] * statistic_parts(tokens.element_size())
    size = (tokens.shape[0] + processes * rows.shape[0]) * (A.shape[0] + processes * width)
    buffer = tokens.new_empty(size)
    product, everyone, every_rows = _regions(buffer, tokens, A, statistics, rows)
    buffer[product.numel() :].zero_()
    torch.mm(tokens, A.t(), out=product)
    remainder = statistics
    for part in range(everyone.shape[2]):
        everyone[:, index, part] = remainder
        remainder = remainder - everyone[:, index, part].float()
    every_rows[index] = rows
    dist.all_reduce(buffer, group=tensor_group())
    return buffer


def _regions(
    buffer: Tensor, tokens: Tensor, A: Tensor, statistics: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Views of the buffer: the product `(tokens, rank)`, statistics `(tokens, tp, parts, k)`, rows `(tp, m, rank)`."""
    count, rank, processes = tokens.shape[0], A.shape[0], tensor_size()
    parts = statistic_parts(buffer.element_size())
    sizes = [count * rank, count * processes * parts * statistics.shape[1], processes * rows.shape[0] * rank]
    product, everyone, every_rows = buffer[: sum(sizes)].split(sizes)
    return (
        product.view(count, rank),
        everyone.view(count, processes, parts, statistics.shape[1]),
        every_rows.view(processes, rows.shape[0], rank),
    )


def down(
    tokens: Tensor, A: Tensor, weight: Tensor | None, statistics: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`tokens (tokens, in/tp)` times `A (rank, in/tp)`, its columns scaled by a norm's `weight (in/tp)` if there is
    one, summed over the group in one all-reduce.

    This process's `statistics (tokens, k)` in fp32 and `rows (m, rank)` ride along; returns `(tokens, rank)`, the
    statistics of all processes `(tokens, tp, k)` and their rows `(tp, m, rank)`.
    """
    if tensor_size() == 1:
        return _Down.apply(tokens, A, weight), statistics.unsqueeze(1), rows.unsqueeze(0)
    return _ReducedDown.apply(tokens, A, weight, statistics, rows)


class _Up(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, bottleneck: Tensor, B: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(bottleneck, B)
        return torch.nn.functional.linear(bottleneck, B, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        bottleneck, B = ctx.saved_tensors
        gradient_of_bottleneck = gradient @ B
        on_its_way = dist.all_reduce(gradient_of_bottleneck, group=tensor_group(), async_op=True)
        gradient_of_B = gradient.t() @ bottleneck
        gradient_of_bias = gradient.sum(dim=0) if ctx.needs_input_grad[2] else None
        on_its_way.wait()
        return gradient_of_bottleneck, gradient_of_B, gradient_of_bias


def up(bottleneck: Tensor, B: Tensor, bias: Tensor | None) -> Tensor:
    """`bottleneck (tokens, rank)`, the same on all processes, to `(tokens, out/tp)` with `B (out/tp, rank)` and
    `bias (out/tp)`."""
    if tensor_size() == 1:
        return torch.nn.functional.linear(bottleneck, B, bias)
    return _Up.apply(bottleneck, B, bias)
