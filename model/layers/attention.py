"""Core attention through `scaled_dot_product_attention`: fused kernels on a GPU, and it works on a CPU.

On a GPU documents inside a sample are sequences of their own, for flash attention over variable lengths; elsewhere a
mask keeps them apart, and is the reference. megatron-core 0.16.1's own `DotProductAttention` needs CUDA generator
states.
"""

from contextlib import AbstractContextManager
from functools import cache

import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

from model.layers.dropout import DropoutCounter
from model.layers.rotary import RotaryPositions

HOPPER = 9
"""Compute capability of a Hopper GPU."""


def prefer_fast_kernels() -> None:
    """Has torch try this process's GPU's kernels in the order of their speed, each for what those before it do not
    take; cuDNN's, whose backward pass adds in any order (torch 2.13), not where algorithms are to be deterministic."""
    hopper = torch.cuda.get_device_capability()[0] == HOPPER
    _prefer(hopper and not torch.are_deterministic_algorithms_enabled())


@cache
def _prefer(cudnn: bool) -> AbstractContextManager:
    """Entered for good, and alive as long as it is remembered: to enter and leave it in every layer would take a tenth
    of a millisecond each time, and break the graph of a compiled one."""
    others = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    preference = sdpa_kernel([SDPBackend.CUDNN_ATTENTION, *others] if cudnn else others, set_priority=True)
    preference.__enter__()
    return preference


class ScaledDotProductAttention(nn.Module):
    """softmax(Q Kᵀ / √d) V over the heads this process holds; causal, or over the whole sequence in both directions
    (`AttnMaskType.no_mask`), or where a mask allows it."""

    def __init__(
        self,
        *,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        counter: DropoutCounter,
        softmax_scale: float | None,
        rotary: RotaryPositions | None,
        **_megatron: object,  # process groups and others: attention on whole sequences needs none
    ) -> None:
        super().__init__()
        self.causal = attn_mask_type == AttnMaskType.causal
        self.counter, self.layer, self.softmax_scale = counter, layer_number, softmax_scale
        self.dropout = config.attention_dropout
        self.rotary = rotary

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **_megatron: object,
    ) -> Tensor:
        """`query (seq, batch, heads/tp, size)`, `key` and `value (seq, batch, groups/tp, size)` to
        `(seq, batch, heads/tp * size)`.

        `attention_mask (batch, 1, seq, seq)` is added to the scores of a query, -inf where it must not look, and then
        decides alone: of the queries' type, so that all layers keep the same one for the backward pass. With one
        dimension it says where in `(batch * seq,)` documents begin, and where the last one ends.
        """
        if self.rotary is not None:
            query, key = self.rotary.rotate(query, key)
        if attention_mask is not None and attention_mask.dim() == 1:
            return self._within_documents(query, key, value, attention_mask)
        repeats = query.shape[2] // key.shape[2]
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        # Only the kernels of a GPU for 16 bits, without a mask, share a group's keys and values among its queries. A
        # CPU could, and takes half as long again in bf16.
        shared = query.is_cuda and query.dtype != torch.float32 and attention_mask is None
        if repeats > 1 and not shared:
            key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
        if self.training and self.dropout > 0.0:
            context = self._with_dropout(query, key, value, attention_mask)
        else:
            context = self._attend(query, key, value, attention_mask, 0.0)
        return context.permute(2, 0, 1, 3).flatten(2)

    def _within_documents(self, query: Tensor, key: Tensor, value: Tensor, bounds: Tensor) -> Tensor:
        """All samples one behind the other: documents end with their sample."""
        length, samples, heads, size = query.shape
        groups = key.shape[2]
        query, key, value = (tensor.transpose(0, 1) for tensor in (query, key, value))
        key, value = (
            tensor.unsqueeze(3).expand(-1, -1, -1, heads // groups, -1).reshape(-1, heads, size)
            for tensor in (key, value)
        )
        sides = (-1, 0) if self.causal else (-1, -1)  # how far a query sees to its left and right; -1: to the end
        context = varlen_attn(
            query.reshape(-1, heads, size),
            key,
            value,
            bounds,
            bounds,
            length,
            length,
            scale=self.softmax_scale,
            window_size=sides,
        )
        assert isinstance(context, Tensor)  # sums of exponentials, which were not asked for, would come with it
        return context.unflatten(0, (samples, length)).transpose(0, 1).flatten(2)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
        return nn.functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=self.causal and mask is None,
            scale=self.softmax_scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )

    def _with_dropout(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        # The kernels draw from the default generator: it is seeded for this site and put back, so that no state runs
        # on. That of a GPU is a seed and an offset, which torch keeps on the host: nothing waits.
        devices = [query.device] if query.is_cuda else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(self.counter.site_seed(self.layer, "attention", sharded=True))
            return self._attend(query, key, value, mask, self.dropout)
