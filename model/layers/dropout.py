"""Dropout whose masks come from counters, not from a running generator.

A mask's seed is a hash of (run seed, step, micro-step, data-parallel index, layer, site) and of the tensor-parallel
index where the tensor is split. The same counters always give the same mask: recomputation and resume are exact, and no
generator state is saved. megatron-core 0.16.1's tracker of generator states raises without CUDA, and a default
generator with one seed would give every hidden shard the same mask.

A CPU keeps a mask of one byte a number to the backward pass. A GPU draws it again (`model/layers/residual_kernel.py`),
and from another generator: its masks are others.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from model.process_groups import data_index, tensor_index


@dataclass
class DropoutCounter:
    """Where training stands; one object is shared by all sites of a model, and the trainer moves it on."""

    seed: int
    step: int = 0
    micro_step: int = 0

    @contextmanager
    def at(self, step: int, micro_step: int) -> Iterator[None]:
        """Sets the counters inside the block, and puts them back behind it."""
        now = self.step, self.micro_step
        self.step, self.micro_step = step, micro_step
        try:
            yield
        finally:
            self.step, self.micro_step = now

    def site_seed(self, layer: int, site: str, sharded: bool) -> int:
        """Seed of one mask: 63 bits of a SHA-256 over all counters."""
        shard = tensor_index() if sharded else "whole"
        text = f"{self.seed}:{self.step}:{self.micro_step}:{data_index()}:{layer}:{site}:{shard}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


class _MaskedScale(torch.autograd.Function):
    """values * mask * scale, which keeps the mask alone: one byte a number."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, mask: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(mask)
        ctx.scale = scale
        return values.mul(mask).mul_(scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (mask,) = ctx.saved_tensors
        return gradient.mul(mask).mul_(ctx.scale), None, None


class CounterDropout(nn.Module):
    """Inverted dropout with probability `probability` at one site of one layer; the identity in evaluation."""

    def __init__(self, counter: DropoutCounter, probability: float, layer: int, site: str, sharded: bool) -> None:
        super().__init__()
        self.counter, self.probability, self.layer, self.site, self.sharded = counter, probability, layer, site, sharded

    def forward(self, values: Tensor) -> Tensor:
        if not self.drops:
            return values
        if values.is_cuda:
            return self.fused(values, None, None)
        generator = torch.Generator(values.device).manual_seed(self._seed)
        keep = 1.0 - self.probability
        mask = torch.empty_like(values, dtype=torch.uint8).bernoulli_(keep, generator=generator)
        return _MaskedScale.apply(values, mask, 1.0 / keep)

    @property
    def drops(self) -> bool:
        """Whether this site drops anything now."""
        return self.training and self.probability > 0.0

    @property
    def _seed(self) -> int:
        return self.counter.site_seed(self.layer, self.site, self.sharded)

    def fused(self, values: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        """`residual + dropout(values + bias)` on a GPU, without what is None."""
        # Here, because a CPU does without Triton.
        from model.layers.residual_kernel import bias_dropout_add

        probability, seed = (self.probability, self._seed) if self.drops else (0.0, 0)
        return bias_dropout_add(values, bias, residual, probability, seed)


class BiasDropoutAdd(nn.Module):
    """megatron-core's bias-dropout-add slot: `residual + dropout(x + bias)`."""

    def __init__(self, dropout: CounterDropout) -> None:
        super().__init__()
        self.dropout = dropout

    def forward(self, training: bool, fused: bool) -> Callable[[tuple[Tensor, Tensor | None], Tensor, float], Tensor]:
        """megatron-core asks for the function first and calls it with the probability it was configured with."""

        def add(output_and_bias: tuple[Tensor, Tensor | None], residual: Tensor, probability: float) -> Tensor:
            output, bias = output_and_bias
            if output.is_cuda and (bias is not None or self.dropout.drops):
                return self.dropout.fused(output, bias, residual)
            return residual + self.dropout(output if bias is None else output + bias)

        return add
