"""LayerNorm of a whole row by torch's fused kernel, alone and in front of a product.

    LN(x) = γ ⊙ (x − μ) / σ + β,      h = A LN(x),      A (rank, in)

For one process, which has all of a row; `model/layers/sharded_norm.py` is for rows that are split. The product keeps
its input for the backward pass and not LN(x): one kernel makes it again there, and its statistics with it.
"""

from typing import Any

import torch
from torch import Tensor

from model.layers.recomputation import kept


def _normalized(rows: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    """LN of `rows (..., width)`, and `(..., 1)` in fp32 each row's mean and 1/σ."""
    values, weight, bias = (_exact(tensor) for tensor in (rows, weight, bias))
    normalized, mean, inverse = torch.ops.aten.native_layer_norm(values, [rows.shape[-1]], weight, bias, epsilon)
    return normalized.to(rows.dtype), mean, inverse


def _exact(tensor: Tensor) -> Tensor:
    """What the kernel computes in fp32 with: on CUDA it does so by itself. On a CPU torch 2.13 gives the statistics of
    16-bit rows in 16 bits, and adds up the gradients of the parameters in them, with 3 % error over 512 tokens."""
    return tensor if tensor.is_cuda or tensor.element_size() > 2 else tensor.float()


def _gradients(
    gradient: Tensor, rows: Tensor, mean: Tensor, inverse: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `rows (..., width)`, `weight` and `bias (width)`, from LN's and the forward pass's statistics."""
    exact = (_exact(tensor) for tensor in (weight, bias))
    of_rows, of_weight, of_bias = torch.ops.aten.native_layer_norm_backward(
        _exact(gradient), _exact(rows), [rows.shape[-1]], mean, inverse, *exact, [True, True, True]
    )
    return of_rows.to(rows.dtype), of_weight.to(weight.dtype), of_bias.to(bias.dtype)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
        normalized, mean, inverse = _normalized(rows, weight, bias, epsilon)
        ctx.save_for_backward(rows, mean, inverse, weight, bias)
        return normalized

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        return *_gradients(gradient.contiguous(), *ctx.saved_tensors), None


class _NormedDown(torch.autograd.Function):
    """Saves the parameters themselves and nothing made of them: ZeRO 3 takes parameters back between the passes, and
    could not take that."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, A: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
        ctx.save_for_backward(rows, A, weight, bias)
        ctx.epsilon = epsilon
        return kept(lambda: _normalized(rows, weight, bias, epsilon)[0] @ A.t())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        rows, A, weight, bias = ctx.saved_tensors
        normalized, mean, inverse = _normalized(rows, weight, bias, ctx.epsilon)
        of_A = gradient.t() @ normalized
        del normalized
        of_rows, of_weight, of_bias = _gradients(gradient @ A, rows, mean, inverse, weight, bias)
        return of_rows, of_A, of_weight, of_bias, None


def layer_norm(rows: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    """LN of `rows (..., width)` with `weight (width)` and `bias (width)`."""
    return _LayerNorm.apply(rows, weight, bias, epsilon)


def normed_down(rows: Tensor, A: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    """`A LN(x)`: `rows (tokens, in)` to `(tokens, rank)`, with `A (rank, in)`."""
    return _NormedDown.apply(rows, A, weight, bias, epsilon)
