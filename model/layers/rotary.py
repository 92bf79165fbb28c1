"""Rotary positions: entry i of a head turns together with entry i + size/2, by an angle that grows with the position.

    x'_i = x_i cos(p θ_i) − x_j sin(p θ_i),   x'_j = x_j cos(p θ_i) + x_i sin(p θ_i)

with j = i + size/2 and θ_i = base^(−2i/size). Sines and cosines are made once and serve all layers and steps.
megatron-core 0.16.1 makes them in every layer, of queries and of keys, and turns each in ten operations; its fused form
needs Transformer Engine.
"""

from typing import Any

import torch
from torch import Tensor


class RotaryPositions:
    """The tables of one model, shared by its layers; no part of its state."""

    def __init__(self, base: float, head_size: int) -> None:
        self.base, self.head_size = base, head_size
        self._tables: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def rotate(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """`query (seq, batch, heads/tp, size)` and `key (seq, batch, groups/tp, size)`, rotated."""
        return _Rotation.apply(query, key, *self._up_to(query))

    def _up_to(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines `(seq, 1, 1, size/2)`, in the type and on the device of `like (seq, ...)`."""
        place, length = (like.device, like.dtype), like.shape[0]
        tables = self._tables.get(place)
        if tables is None or len(tables[0]) < length:
            tables = self._tables[place] = self._new_tables(length, like)
        return tables[0][:length], tables[1][:length]

    @torch.no_grad()
    def _new_tables(self, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Angles are fp32 whatever the type: 16 bits would round position 257."""
        steps = torch.arange(0, self.head_size, 2, dtype=torch.float32, device=like.device) / self.head_size
        positions = torch.arange(length, dtype=torch.float32, device=like.device)
        angles = torch.outer(positions, 1.0 / self.base**steps)[:, None, None, :]
        return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


class _Rotation(torch.autograd.Function):
    """The rotation as an autograd function. It keeps the tables alone: its gradient is rotated back."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cosine, sine)
        return _rotated(query, key, cosine, sine)

    @staticmethod
    def backward(ctx: Any, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, None, None]:
        cosine, sine = ctx.saved_tensors
        return *_rotated(query, key, cosine, -sine), None, None


def _rotated(query: Tensor, key: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor]:
    if query.is_cuda:
        from model.layers.pointwise_kernels import rotated

        return rotated(query, key, cosine, sine)
    return _rotated_heads(query, cosine, sine), _rotated_heads(key, cosine, sine)


def _rotated_heads(heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    first, second = heads.chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)
