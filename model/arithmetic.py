"""Parameters and floating-point operations of a model, from its config and ranks alone.

A linear layer takes 2 FLOPs a weight and token forward and twice that backward: 6·out·in dense, 6·r·(in+out) factored.
A frozen weight needs no gradient of its own, only that of its input: 4·out·in, so 4·out·in + 6·r·(in+out) additive.
Attention adds 12·s·hidden a token and layer (scores and values, forward and backward; causality is not halved, as in
Megatron-LM and PaLM, appendix B). Embedding look-ups count nothing, the output layer counts as a dense layer.
"""

from collections.abc import Mapping

from model.config import ModelConfig, Projection, projections


def projection_parameters(projection: Projection, rank: int | None) -> int:
    """Numbers in the weight, or in both factors when `rank` is given (additive: and in the frozen weight); biases and
    norms are not counted."""
    weight = projection.in_features * projection.out_features
    if rank is None:
        return weight
    return rank * (projection.in_features + projection.out_features) + (weight if projection.additive else 0)


def linear_parameters(config: ModelConfig, ranks: Mapping[str, int]) -> int:
    """Numbers in all linear layers of the stack; `ranks` maps `Projection.name` to rank, and may be empty (dense)."""
    return sum(projection_parameters(p, ranks.get(p.name)) for p in projections(config))


def total_parameters(config: ModelConfig, ranks: Mapping[str, int]) -> int:
    """Every number of the model, padded vocabulary rows included."""
    norm = config.hidden * (2 if config.family == "gpt2" else 1)
    norms = norm * (2 * config.layers + 1)
    biases = sum(p.out_features for p in projections(config)) if config.biases else 0
    positions = config.sequence_length * config.hidden if config.family == "gpt2" else 0
    embeddings = config.padded_vocabulary * config.hidden * (1 if config.tied_embeddings else 2)
    return linear_parameters(config, ranks) + norms + biases + positions + embeddings


def trained_parameters(config: ModelConfig, ranks: Mapping[str, int]) -> int:
    """Those of `total_parameters` that have a gradient, a master and moments."""
    if config.trained == "factors":
        return linear_parameters(config, ranks) - _frozen_weights(config, ranks)
    return total_parameters(config, ranks) - _frozen_weights(config, ranks)


def _frozen_weights(config: ModelConfig, ranks: Mapping[str, int]) -> int:
    """Numbers in linear layers of the stack that never change."""
    frozen = 0
    for projection in projections(config):
        whole = projection.name not in ranks
        if ranks and (projection.additive or (whole and config.trained == "factors")):
            frozen += projection_parameters(projection, None)
    return frozen


def probe_flops_per_token(config: ModelConfig, ranks: Mapping[str, int], directions: int) -> int:
    """What that many directions of a gradient probe add to a step, at most: as much as directions that are trained."""
    return 6 * directions * sum(p.in_features + p.out_features for p in projections(config) if p.name in ranks)


def gram_flops(config: ModelConfig, ranks: Mapping[str, int]) -> int:
    """Of the two Gram matrices of every factored layer, which is what a spectrum costs."""
    return sum(
        2 * ranks[p.name] ** 2 * (p.in_features + p.out_features) for p in projections(config) if p.name in ranks
    )


def training_flops_per_token(config: ModelConfig, ranks: Mapping[str, int]) -> int:
    """Forward and backward FLOPs of one token at full sequence length; empty `ranks`: of the dense model."""
    attention = 12 * config.sequence_length * config.hidden * config.layers
    output = (4 if ranks and config.trained == "factors" else 6) * config.padded_vocabulary * config.hidden
    return 6 * linear_parameters(config, ranks) - 2 * _frozen_weights(config, ranks) + attention + output
