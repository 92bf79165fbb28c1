"""Bytes that one process keeps between the forward and the backward pass of a micro-batch, from config and ranks alone.

With T tokens, s sequence length, p tensor-parallel processes, e bytes a number, hidden h, MLP width f, a heads, rank r,
a layer keeps

| where                              | bytes                                                                          |
|------------------------------------|--------------------------------------------------------------------------------|
| fused norm                         | T·h/p·4, and T·h/p·e of what A multiplies (in fp32 RMSNorm: the same numbers)  |
| norm on its own in a split stream  | T·h/p·(8 + e)                                                                  |
| torch's norm, stream whole         | LayerNorm T·h·e, RMSNorm T·h·8                                                 |
| bottleneck                         | T·r·e, behind a fused norm also T·r·4 and r·h/p·e of A ⊙ g                     |
| dense column layer                 | its whole input, T·h·e                                                         |
| attention                          | query, key, value, output 4·T·h/p·e, log-sum-exp 4·T·a/p; no s² (flash kernel) |
| the same, RoPE, as many groups     | 6·T·h/p·e: the values are a view of the product they were split from           |
| MLP                                | tanh-GELU 2·T·f/p·e, SwiGLU 5·T·f/p·e (megatron-core 0.16.1 adds an offset)    |
| each of two dropouts               | its mask, T·e times the width of the stream                                    |

and the model the last norm, the gathered input of the output layer T·h·e, and the softmax of the loss T·vocabulary/p·4.
What a CPU keeps is what was counted (`tests/model/test_activations.py`); CUDA's fused RMSNorm keeps less.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from model.config import ModelConfig, Projection, projections

FP32_BYTES, INTEGER_BYTES = 4, 8

Recompute = Literal["none", "factors", "layers"]


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro-batch on one process."""

    kept: int
    """From the forward to the backward pass."""
    recomputed: int
    """Of the one layer whose activations are computed again, beside them."""

    @property
    def peak(self) -> int:
        return self.kept + self.recomputed


def activation_bytes(
    config: ModelConfig,
    ranks: Mapping[str, int],
    *,
    tensor_size: int,
    sequences: int,
    element_bytes: int,
    recompute: Recompute = "none",
) -> Activations:
    """Of a micro-batch of `sequences` sequences; `ranks` maps `Projection.name` to rank."""
    sizes = _Sizes(config, ranks, tensor_size, sequences * config.sequence_length, element_bytes)
    linears = projections(config)
    layers = [sizes.layer(linears[first : first + 4]) for first in range(0, len(linears), 4)]
    if recompute == "none":
        return Activations(sizes.outside() + sum(layers), 0)
    inputs = config.layers * sizes.tokens * sizes.stream * element_bytes
    bottlenecks = sum(sizes.tokens * rank * element_bytes for rank in ranks.values()) if recompute == "factors" else 0
    return Activations(sizes.outside() + inputs + bottlenecks, max(layers))


@dataclass(frozen=True)
class _Sizes:
    config: ModelConfig
    ranks: Mapping[str, int]
    processes: int
    tokens: int
    element_bytes: int

    @property
    def in_stream(self) -> bool:
        return self.config.parametrization == "factored"

    @property
    def stream(self) -> int:
        """Width of the residual stream on one process."""
        return self.config.hidden // (self.processes if self.in_stream else 1)

    @property
    def layernorm(self) -> bool:
        return self.config.family == "gpt2"

    def outside(self) -> int:
        """Of embedding, last norm, output layer and loss."""
        config = self.config
        logits = self.tokens * config.padded_vocabulary // self.processes * FP32_BYTES
        gathered = self.tokens * config.hidden * self.element_bytes
        return self._norm() + gathered + logits + 2 * self.tokens * INTEGER_BYTES + self._dropout()

    def layer(self, linears: list[Projection]) -> int:
        total = self._attention() + self._mlp() + 2 * self._dropout()
        for linear in linears:
            total += self._linear(linear)
            if linear.normed:
                total += self._fused_norm(self.ranks[linear.name]) if linear.fused_norm else self._norm()
        return total

    def _linear(self, linear: Projection) -> int:
        """What it keeps beyond the input that a row layer shares with attention or MLP."""
        whole_input = linear.normed and not linear.fused_norm
        total = self.tokens * linear.in_features * self.element_bytes if whole_input else 0
        if linear.factored:
            rank = self.ranks[linear.name]
            total += self.tokens * rank * self.element_bytes
            if linear.fused_norm:
                scaled = rank * linear.in_features // self.processes * self.element_bytes
                total += self.tokens * rank * FP32_BYTES + scaled
        return total

    def _fused_norm(self, rank: int) -> int:
        shared = self.element_bytes == FP32_BYTES and not self.layernorm
        numbers = FP32_BYTES if shared else FP32_BYTES + self.element_bytes
        columns = 4 * self.processes + 2 if self.layernorm else 2 + self._gathered_columns
        return self.tokens * (self.stream * numbers + columns * FP32_BYTES) + self._kept_buffer(rank)

    def _kept_buffer(self, rank: int) -> int:
        """LayerNorm's extra rows are a view of the buffer that was reduced, and in fp32 keep all of it."""
        if not self.layernorm or self.processes == 1 or self.element_bytes != FP32_BYTES:
            return 0
        extra = 2 * self.processes
        return (self.tokens + extra) * (rank + extra) * FP32_BYTES

    def _norm(self) -> int:
        if self.in_stream:
            columns = 3 * self.processes + 2 if self.layernorm else 2 + self._gathered_columns
            return self.tokens * (self.stream * (2 * FP32_BYTES + self.element_bytes) + columns * FP32_BYTES)
        if self.layernorm:
            return self.tokens * (self.stream + 2) * self.element_bytes
        return self.tokens * (2 * self.stream + 1) * FP32_BYTES

    @property
    def _gathered_columns(self) -> int:
        return self.processes if self.processes > 1 else 0

    def _attention(self) -> int:
        config, p = self.config, self.processes
        width = config.hidden // p
        # megatron-core gathers the whole product where there are fewer query groups than processes.
        product = (config.heads + 2 * config.groups) * config.head_size // (p if config.groups >= p else 1)
        repeated = config.heads // p > max(config.groups // p, 1)
        views = product + (1 if config.family == "gpt2" else 3) * width  # of the product: all three, or the value alone
        numbers = 4 * width if repeated else views
        rotary = 4 * config.sequence_length * config.head_size * self.element_bytes if config.family == "llama" else 0
        return self.tokens * (numbers * self.element_bytes + config.heads // p * FP32_BYTES) + rotary

    def _mlp(self) -> int:
        return (
            self.tokens * self.config.ffn_width // self.processes * self.element_bytes * (5 if self.config.gated else 2)
        )

    def _dropout(self) -> int:
        return self.tokens * self.stream * self.element_bytes if self.config.hidden_dropout else 0
