"""Bias, dropout and residual add in one kernel of a GPU, which keeps no mask.

    out = residual + drop(x + bias)        drop(y) = y / (1 - p) where u(seed, place) >= p, else 0

u are Philox's uniform numbers (Salmon et al. 2011), four of them from one place in the sequence of a seed. The backward
pass draws them again: ∂x = drop(∂out), ∂bias = Σ ∂x over tokens, ∂residual = ∂out. Everything is summed in fp32 and
rounded once. `model/layers/dropout.py` says the same in elementary operations, with masks of another generator.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

_MOST_COLUMNS = 1024
"""Columns of one program: eight numbers for each of its 128 threads."""


@triton.jit(do_not_specialize=["seed"])
def _kernel(  # type: ignore[no-untyped-def]  # Triton knows the types
    x,
    bias,
    residual,
    out,
    columns,
    seed,
    probability,
    scale,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    DROPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    place = row.to(tl.int64) * columns + column
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        value += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    if DROPS:
        block = row * tl.num_programs(1) + tl.program_id(1)
        a, b, c, d = tl.rand4x(seed, block * (BLOCK // 4) + tl.arange(0, BLOCK // 4))
        uniform = tl.reshape(tl.join(tl.join(a, b), tl.join(c, d)), (BLOCK,))
        value = tl.where(uniform >= probability, value * scale, 0.0)
    if HAS_RESIDUAL:
        value += tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, value, mask=inside)


def _launched(x: Tensor, bias: Tensor | None, residual: Tensor | None, probability: float, seed: int) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    columns = x.shape[-1]
    block = min(_MOST_COLUMNS, max(4, triton.next_power_of_2(columns)))
    _kernel[(x.numel() // columns, triton.cdiv(columns, block))](
        x,
        bias,
        None if residual is None else residual.contiguous(),
        out,
        columns,
        seed,
        probability,
        1.0 / (1.0 - probability),
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        DROPS=probability > 0.0,
        BLOCK=block,
    )
    return out


class _BiasDropoutAdd(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, residual: Tensor | None, probability: float, seed: int
    ) -> Tensor:
        ctx.probability, ctx.seed = probability, seed
        return _launched(x, bias, residual, probability, seed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None, None]:
        inner = gradient if ctx.probability == 0.0 else _launched(gradient, None, None, ctx.probability, ctx.seed)
        of_bias = inner.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        return inner, of_bias, gradient if ctx.needs_input_grad[2] else None, None, None


def bias_dropout_add(x: Tensor, bias: Tensor | None, residual: Tensor | None, probability: float, seed: int) -> Tensor:
    """`residual + drop(x + bias)` of `x` and `residual (..., columns)` and `bias (columns,)`, of one type; without what
    is None, or with a probability of 0 without dropping."""
    return _BiasDropoutAdd.apply(x, bias, residual, probability, seed)
