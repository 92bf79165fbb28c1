"""Parameters, floating-point operations and kept activations of a model, from its config and ranks alone.

A linear layer takes 2 FLOPs a weight and token forward and twice that backward: 6·out·in dense, 6·r·(in+out) factored.
A frozen weight needs no gradient of its own, only that of its input: 4·out·in, so 4·out·in + 6·r·(in+out) additive.
Attention adds 12·s·hidden a token and layer (scores and values, forward and backward; causality is not halved, as in
Megatron-LM and PaLM, appendix B). Embedding look-ups count nothing, the output layer counts as a dense layer.
"""

from collections.abc import Mapping

from model.config import ModelConfig, Projection, Recompute, projections


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
    norm = config.hidden * len(config.norm_parameters)
    norms = norm * (2 * config.layers + 1)
    biases = sum(p.out_features for p in projections(config)) if config.biases else 0
    positions = config.sequence_length * config.hidden if config.learned_positions else 0
    embeddings = config.padded_vocabulary * config.hidden * (1 if config.tied_embeddings else 2)
    return linear_parameters(config, ranks) + norms + biases + positions + embeddings


def trained_parameters(config: ModelConfig, ranks: Mapping[str, int]) -> int:
    """Numbers of the model that have a gradient, a master and moments."""
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
    """Most FLOPs a token that a gradient probe of so many directions adds to a step: as many as trained directions."""
    return 6 * directions * sum(p.in_features + p.out_features for p in projections(config) if p.name in ranks)


def gram_flops(config: ModelConfig, ranks: Mapping[str, int]) -> int:
    """FLOPs of the two Gram matrices of every factored layer, which is what a spectrum costs."""
    return sum(
        2 * ranks[p.name] ** 2 * (p.in_features + p.out_features) for p in projections(config) if p.name in ranks
    )


def training_flops_per_token(config: ModelConfig, ranks: Mapping[str, int]) -> int:
    """Forward and backward FLOPs of one token at full sequence length; empty `ranks`: of the dense model."""
    attention = 12 * config.sequence_length * config.hidden * config.layers
    output = (4 if ranks and config.trained == "factors" else 6) * config.padded_vocabulary * config.hidden
    return 6 * linear_parameters(config, ranks) - 2 * _frozen_weights(config, ranks) + attention + output


def statistic_parts(element_bytes: int) -> int:
    """How many numbers of that size hold an fp32 statistic to 4e-6 or better: one bf16 alone would err by 0.2 %."""
    return 1 if element_bytes >= 4 else 2


_LARGEST_HEAD, _HEAD_MULTIPLE = 256, 8
"""Largest head size, and its divisor, that flash attention over variable lengths takes."""


def packs_documents(config: ModelConfig, element_bytes: int) -> bool:
    """Whether a GPU attends to documents without a mask: in 16 bits, and without dropout, which
    `torch.nn.attention.varlen` does not know."""
    fits = config.head_size <= _LARGEST_HEAD and config.head_size % _HEAD_MULTIPLE == 0
    return fits and config.attention_dropout == 0.0 and element_bytes == 2


def kept_activation_bytes(
    config: ModelConfig,
    ranks: Mapping[str, int],
    recompute: Recompute,
    *,
    tensor_parallel: int,
    element_bytes: int,
    gpu: bool = False,
    within_documents: bool = False,
) -> list[int]:
    """Bytes a token that each transformer layer keeps on one process from its forward to its backward pass.

    While a layer is recomputed, it also holds what it would have kept with `none`. Embedding, final norm, logits and
    loss are not counted, nor is a mask of documents or what does not grow with the tokens. For `none` attention is a
    flash kernel (which a CPU does not have for dropout), all parameters are trained, and norms are as a CPU computes
    them: torch 2.13 composes a whole llama norm of elementary operations there, and fused CUDA kernels keep less.
    """
    stream = config.hidden // (tensor_parallel if config.parametrization == "factored" else 1)
    kept = []
    for layer in range(config.layers):
        four = [p for p in projections(config) if p.layer == layer]
        if recompute == "layers":
            kept.append(element_bytes * stream)
        elif recompute == "factors":
            bottlenecks = sum(_bottleneck_bytes(config, p, ranks[p.name], tensor_parallel, element_bytes) for p in four)
            kept.append(element_bytes * stream + bottlenecks)
        else:
            masks = 2 * dropout_mask_bytes(config, gpu) * stream
            inputs = sum(
                _input_bytes(config, p, ranks.get(p.name), stream, tensor_parallel, element_bytes) for p in four
            )
            packed = gpu and within_documents and packs_documents(config, element_bytes)
            attention = _attention_bytes(config, tensor_parallel, element_bytes, gpu, packed)
            kept.append(attention + _mlp_bytes(config, tensor_parallel, element_bytes) + inputs + masks)
    return kept


def dropout_mask_bytes(config: ModelConfig, gpu: bool) -> int:
    """Bytes that a dropout outside attention keeps for each number; none on a GPU, which draws the mask again."""
    return 1 if config.hidden_dropout > 0.0 and not gpu else 0


def _bottleneck_bytes(
    config: ModelConfig, projection: Projection, rank: int, tensor_parallel: int, element_bytes: int
) -> int:
    """Bytes of one token in the buffer of the forward all-reduce; in one process the product alone, without
    statistics."""
    statistics = tensor_parallel * statistic_parts(element_bytes) * config.norm_statistics
    return element_bytes * (rank + (statistics if projection.normed and tensor_parallel > 1 else 0))


def _attention_bytes(config: ModelConfig, tensor_parallel: int, element_bytes: int, gpu: bool, packed: bool) -> int:
    """Bytes a token that attention keeps for its backward pass, from behind `qkv` to the input of `proj`."""
    own_heads, own_groups = config.heads // tensor_parallel, max(1, config.groups // tensor_parallel)
    queries = own_heads * config.head_size
    qkv = (config.heads + 2 * config.groups) * config.head_size
    if config.groups >= tensor_parallel:  # else megatron-core gathers those of all processes
        qkv //= tensor_parallel
    shared = gpu and element_bytes == 2  # keys and values, by the queries of a group
    if packed:
        attention = 4 * queries  # all three one sample behind the other, keys and values repeated; and so the result
    elif config.learned_positions:
        attention = qkv
    elif own_groups < own_heads and not shared:
        attention = 3 * queries  # rotated queries; keys and values, repeated
    else:
        # Rotated queries and keys; values are a view of all three.
        attention = queries + own_groups * config.head_size + qkv
    log_sums = 4 * own_heads
    return element_bytes * (attention + queries) + log_sums


def _mlp_bytes(config: ModelConfig, tensor_parallel: int, element_bytes: int) -> int:
    """Bytes a token that the MLP keeps for its backward pass, from behind `fc1` to the input of `fc2`."""
    return element_bytes * ((3 if config.gated else 2) * config.ffn_width // tensor_parallel)


def _input_bytes(
    config: ModelConfig,
    projection: Projection,
    rank: int | None,
    stream: int,
    tensor_parallel: int,
    element_bytes: int,
) -> int:
    """Bytes a token that a norm and the bottleneck behind it keep for their backward pass, or the bottleneck alone."""
    statistics = config.norm_statistics
    bottleneck = element_bytes * (rank or 0)
    if not projection.normed:
        return bottleneck
    shared = 4 * (2 + tensor_parallel if statistics == 1 else 2 + 3 * tensor_parallel)
    if projection.fused_norm and rank is not None:
        if statistics == 2 and tensor_parallel == 1:
            return element_bytes * stream + bottleneck
        if statistics == 1:
            product = _bottleneck_bytes(config, projection, rank, tensor_parallel, element_bytes)
        else:
            product = 4 * (rank + tensor_parallel)
        return element_bytes * stream + shared + product + bottleneck
    whole = element_bytes * config.hidden  # what the column-parallel layer takes
    if config.parametrization == "factored" and tensor_parallel > 1:
        return (2 * element_bytes + 4) * stream + shared + whole
    if statistics == 1:
        return 8 * stream + 4 + whole + bottleneck
    statistics_bytes = 4 if config.parametrization == "factored" else element_bytes
    return element_bytes * stream + 2 * statistics_bytes + whole + bottleneck
