"""Bytes that one process keeps from the forward to the backward pass of a micro-batch, from config and ranks alone.

What layers keep is `model/costs/arithmetic.py`'s business. With T tokens, p tensor-parallel processes, e bytes a
number, hidden h, the rest is the gathered input of the output layer T·h·e, the softmax of the loss T·vocabulary/p·4 (on
a GPU with p = 1 the gradient of the logits, T·vocabulary·e: `model/layers/cross_entropy.py`), the last norm, and on a
CPU the embedding's dropout mask. A CPU keeps what was counted (`tests/model/costs/test_activations.py`); CUDA's fused
norms keep less.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from model.config import ModelConfig, Recompute
from model.costs.arithmetic import dropout_mask_bytes, kept_activation_bytes, packs_documents

FP32_BYTES, INTEGER_BYTES = 4, 8


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro-batch on one process."""

    kept: int
    """Bytes that stay from the forward to the backward pass."""
    recomputed: int
    """Bytes of the one layer whose activations are computed again, beside those that are kept."""

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
    gpu: bool = False,
    within_documents: bool = False,
) -> Activations:
    """Activations of a micro-batch of `sequences` sequences; `ranks` maps `Projection.name` to rank."""
    tokens = sequences * config.sequence_length
    whole, kept = (
        kept_activation_bytes(
            config,
            ranks,
            mode,
            tensor_parallel=tensor_size,
            element_bytes=element_bytes,
            gpu=gpu,
            within_documents=within_documents,
        )
        for mode in ("none", recompute)
    )
    outside = tokens * _outside_layers(config, tensor_size, element_bytes, gpu)
    if within_documents and not (gpu and packs_documents(config, element_bytes)):
        outside += tokens * config.sequence_length * element_bytes  # the mask of all layers
    return Activations(outside + tokens * sum(kept), 0 if recompute == "none" else tokens * max(whole))


def loss_in_place(tensor_size: int, gpu: bool) -> bool:
    """Whether the loss writes the gradient over the logits, and keeps nothing beside it."""
    return gpu and tensor_size == 1


def loss_bytes(config: ModelConfig, tensor_size: int, element_bytes: int, gpu: bool) -> int:
    """Bytes a token that the loss keeps for its backward pass."""
    number = element_bytes if loss_in_place(tensor_size, gpu) else FP32_BYTES
    return config.padded_vocabulary // tensor_size * number


def _outside_layers(config: ModelConfig, tensor_size: int, element_bytes: int, gpu: bool) -> int:
    """Bytes a token of embedding, last norm, output layer and loss."""
    in_stream = config.parametrization == "factored"
    stream = config.hidden // (tensor_size if in_stream else 1)
    if in_stream and tensor_size > 1:
        norm = (2 * element_bytes + FP32_BYTES) * stream
    else:
        norm = element_bytes * stream if config.norm == "layernorm" else 2 * FP32_BYTES * stream
    mask = dropout_mask_bytes(config, gpu) * stream
    logits = loss_bytes(config, tensor_size, element_bytes, gpu)
    return norm + element_bytes * config.hidden + logits + 2 * INTEGER_BYTES + mask
