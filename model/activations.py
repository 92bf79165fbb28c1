"""Bytes that one process keeps from the forward to the backward pass of a micro-batch, from config and ranks alone.

What layers keep is `model/arithmetic.py`'s business. With T tokens, p tensor-parallel processes, e bytes a number,
hidden h, the rest is the gathered input of the output layer T·h·e, the softmax of the loss T·vocabulary/p·4, the last
norm, and the embedding's dropout mask. A CPU keeps what was counted (`tests/model/test_activations.py`); CUDA's
fused norms keep less.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from model.arithmetic import kept_activation_bytes
from model.config import ModelConfig, Recompute

FP32_BYTES, INTEGER_BYTES = 4, 8


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
    tokens = sequences * config.sequence_length
    whole, kept = (
        kept_activation_bytes(config, ranks, mode, tensor_parallel=tensor_size, element_bytes=element_bytes)
        for mode in ("none", recompute)
    )
    outside = tokens * _outside_layers(config, tensor_size, element_bytes)
    return Activations(outside + tokens * sum(kept), 0 if recompute == "none" else tokens * max(whole))


def _outside_layers(config: ModelConfig, tensor_size: int, element_bytes: int) -> int:
    """Bytes a token of embedding, last norm, output layer and loss."""
    in_stream = config.parametrization == "factored"
    stream = config.hidden // (tensor_size if in_stream else 1)
    if in_stream and tensor_size > 1:
        norm = (2 * element_bytes + FP32_BYTES) * stream
    else:
        norm = element_bytes * stream if config.family == "gpt2" else 2 * FP32_BYTES * stream
    mask = element_bytes * stream if config.hidden_dropout else 0
    logits = config.padded_vocabulary // tensor_size * FP32_BYTES
    return norm + element_bytes * config.hidden + logits + 2 * INTEGER_BYTES + mask
