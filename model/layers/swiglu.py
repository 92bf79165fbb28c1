"""The gated activation of the llama family: y = silu(gate) ⊙ up.

megatron-core's own keeps five tensors of the inner width from forward to backward: silu(gate), up, what it multiplies
and the result. This one keeps gate and up as fc1 gave them, and the result that fc2 keeps; silu(gate) is made again.
"""

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inner: Tensor) -> Tensor:
        ctx.save_for_backward(inner)
        if inner.is_cuda:
            from model.layers.pointwise_kernels import swiglu

            return swiglu(inner)
        gate, up = inner.chunk(2, dim=-1)
        return nn.functional.silu(gate) * up

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (inner,) = ctx.saved_tensors
        if inner.is_cuda:
            from model.layers.pointwise_kernels import swiglu_gradient

            return swiglu_gradient(inner, gradient)
        gate, up = inner.chunk(2, dim=-1)
        of_gate = torch.ops.aten.silu_backward(gradient * up, gate)
        return torch.cat([of_gate, gradient * nn.functional.silu(gate)], dim=-1)


class SwiGLU(nn.Module):
    """`inner (..., 2·ffn/tp)`, gate before up, to `(..., ffn/tp)`."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()

    def forward(self, inner: Tensor) -> Tensor:
        return _SwiGLU.apply(inner)
