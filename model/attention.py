"""Core attention through `scaled_dot_product_attention`: flash kernels on CUDA, and it works on CPU.

megatron-core 0.16.1's own `DotProductAttention` needs CUDA generator states.
"""

import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from model.dropout import DropoutCounter
from model.rotary import RotaryPositions


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
        decides alone: of the queries' type, so that all layers keep the same one for the backward pass.
        """
        if self.rotary is not None:
            query, key = self.rotary.turn(query, key)
        repeats = query.shape[2] // key.shape[2]
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        if repeats > 1:
            key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
        if self.training and self.dropout > 0.0:
            context = self._with_dropout(query, key, value, attention_mask)
        else:
            context = self._attend(query, key, value, attention_mask, 0.0)
        return context.permute(2, 0, 1, 3).flatten(2)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
        return nn.functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=self.causal and mask is None,
            scale=self.softmax_scale,
        )

    def _with_dropout(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        # The kernels draw from the default generator: it is seeded for this site and put back, so that no state runs
        # on.
        devices = [query.device] if query.is_cuda else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(self.counter.site_seed(self.layer, "attention", sharded=True))
            return self._attend(query, key, value, mask, self.dropout)
