"""A model seen as a dense one of ours, one tensor at a time: what imports convert and exports write."""

from dataclasses import dataclass

from torch import Tensor

from model.config import ModelConfig
from model.huggingface.dense import TensorReader, dense_tensor
from pretrain.convert.consolidated import ConsolidatedModel
from pretrain.errors import CheckpointError
from pretrain.tokenizer.base import Tokenizer
from pretrain.tokenizer.load import open_tokenizer


@dataclass(frozen=True)
class DenseSource:
    """Settings, weights and tokenizer of a dense model."""

    config: ModelConfig
    """Settings of the dense model."""
    read: TensorReader
    """Reads a tensor of the dense model, in fp32, by name."""
    tokenizer: Tokenizer
    notes: tuple[str, ...] = ()
    """Sentences for the user about how the model differs from the original."""


def dense_source(consolidated: ConsolidatedModel) -> DenseSource:
    """The dense model that computes the same as the factored one: factors are multiplied out."""

    def read(name: str) -> Tensor:
        return dense_tensor(consolidated.config, consolidated.ranks, consolidated.read, name)

    return DenseSource(_as_dense(consolidated.config), read, trained_tokenizer(consolidated))


def frozen_base(consolidated: ConsolidatedModel) -> DenseSource:
    """An additive model without its update: W0 with the trained embeddings, norms and biases."""
    return DenseSource(_as_dense(consolidated.config), consolidated.read, trained_tokenizer(consolidated))


def _as_dense(config: ModelConfig) -> ModelConfig:
    return config.model_copy(update={"parametrization": "dense", "factored_layers": "all", "trained": "all"})


def trained_tokenizer(consolidated: ConsolidatedModel) -> Tokenizer:
    """The folder's tokenizer, if it is the one the model was trained with."""
    tokenizer = open_tokenizer(consolidated.tokenizer_path)
    trained = consolidated.facts["tokenizer"].get("fingerprint")
    if tokenizer.fingerprint != trained:
        raise CheckpointError(
            f"{consolidated.tokenizer_path} is not the tokenizer of the run: its fingerprint is "
            f"{tokenizer.fingerprint[:12]} and should be {str(trained)[:12]}: consolidate the checkpoint again"
        )
    if tokenizer.vocabulary > consolidated.config.vocabulary:
        raise CheckpointError(
            f"the tokenizer has {tokenizer.vocabulary} tokens and the model only {consolidated.config.vocabulary}: "
            "consolidate the checkpoint again"
        )
    return tokenizer
