"""The model in plain single-process PyTorch, straight from its logical tensors: what everything else is compared with.

It shares no code with `model/gpt.py` and knows neither megatron-core nor process groups. The tensors are a dictionary
of full (unsharded) tensors by parameter name, in any floating point type; gradients flow back to every one of them:

    tensors = random_tensors(config, ranks, seed=1)
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    reference_loss(config, ranks, leaves, tokens, labels).mean().backward()
    leaves["decoder.layers.0.mlp.linear_fc1.A"].grad

Rows of the vocabulary that only pad it take no part: logits end at the real vocabulary.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from model.config import ModelConfig, Projection, projections


def reference_logits(
    config: ModelConfig, ranks: Mapping[str, int], tensors: Mapping[str, Tensor], tokens: Tensor
) -> Tensor:
    """Logits `(batch, seq, vocabulary)` of `tokens (batch, seq)`, without dropout."""
    check_shapes(config, ranks, tensors)
    layers: list[list[Projection]] = [[] for _ in range(config.layers)]
    for projection in projections(config):
        layers[projection.layer].append(projection)

    words = tensors["embedding.word_embeddings.weight"]
    stream = words[tokens]
    if config.family == "gpt2":
        stream = stream + tensors["embedding.position_embeddings.weight"][: tokens.shape[1]]
    for qkv, proj, fc1, fc2 in layers:
        fused = _linear(tensors, qkv, _layer_norm_in_front(config, tensors, qkv, stream))
        stream = stream + _linear(tensors, proj, _attention(config, fused))
        inner = _linear(tensors, fc1, _layer_norm_in_front(config, tensors, fc1, stream))
        stream = stream + _linear(tensors, fc2, _activation(config, inner))
    final = "decoder.final_layernorm."
    stream = _norm(config, stream, tensors[final + "weight"], tensors.get(final + "bias"))
    output = words if config.tied_embeddings else tensors["output_layer.weight"]
    return stream @ output[: config.vocabulary].T


def reference_loss(
    config: ModelConfig, ranks: Mapping[str, int], tensors: Mapping[str, Tensor], tokens: Tensor, labels: Tensor
) -> Tensor:
    """Cross entropy `(batch, seq)` of each token over the real vocabulary."""
    logits = reference_logits(config, ranks, tensors, tokens)
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)


def tensor_shapes(config: ModelConfig, ranks: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Name and full shape of every parameter."""
    layer_norm = config.family == "gpt2"
    shapes: dict[str, tuple[int, ...]] = {"embedding.word_embeddings.weight": (config.padded_vocabulary, config.hidden)}
    if config.family == "gpt2":
        shapes["embedding.position_embeddings.weight"] = (config.sequence_length, config.hidden)
    norms = {"qkv": "input_layernorm", "fc1": "pre_mlp_layernorm"}
    for projection in projections(config):
        name = projection.name
        if projection.factored:
            shapes[name + ".A"] = (ranks[name], projection.in_features)
            shapes[name + ".B"] = (projection.out_features, ranks[name])
        if projection.additive or not projection.factored:
            shapes[name + ".weight"] = (projection.out_features, projection.in_features)
        if config.biases:
            shapes[name + ".bias"] = (projection.out_features,)
        if projection.normed:
            layer = f"decoder.layers.{projection.layer}."
            norm = name + ".norm_" if projection.fused_norm else layer + norms[projection.kind] + "."
            shapes[norm + "weight"] = (config.hidden,)
            if layer_norm:
                shapes[norm + "bias"] = (config.hidden,)
    shapes["decoder.final_layernorm.weight"] = (config.hidden,)
    if layer_norm:
        shapes["decoder.final_layernorm.bias"] = (config.hidden,)
    if not config.tied_embeddings:
        shapes["output_layer.weight"] = (config.padded_vocabulary, config.hidden)
    return shapes


def frozen_names(config: ModelConfig) -> set[str]:
    """Parameters that must get no gradient."""
    layers = projections(config)
    if config.trained == "factors":
        factors = {f"{layer.name}.{side}" for layer in layers if layer.factored for side in "AB"}
        return tensor_shapes(config, {layer.name: 1 for layer in layers}).keys() - factors
    return {f"{layer.name}.weight" for layer in layers if layer.additive}


def random_tensors(
    config: ModelConfig, ranks: Mapping[str, int], *, seed: int, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """A value for every parameter, none of them trivial: norms off one, biases off zero, logits of order one."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in tensor_shapes(config, ranks).items():
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        if "norm" in name and name.endswith("weight"):
            values = 1.0 + 0.2 * values
        elif len(shape) == 1:
            values = 0.2 * values
        elif name.startswith("embedding."):
            values = 0.5 * values
        else:
            values = values / shape[1] ** 0.5
        tensors[name] = values.to(dtype)
    return tensors


def check_shapes(config: ModelConfig, ranks: Mapping[str, int], tensors: Mapping[str, Tensor]) -> None:
    """Fails on a missing, a superfluous or a wrongly shaped tensor."""
    expected = tensor_shapes(config, ranks)
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert found == expected, f"differ: {sorted(found.items() ^ expected.items())}"


def _linear(tensors: Mapping[str, Tensor], projection: Projection, hidden: Tensor) -> Tensor:
    """`hidden (batch, seq, in)` to `(batch, seq, out)`."""
    name = projection.name
    parts = [tensors[name + ".weight"]] if name + ".weight" in tensors else []
    if projection.factored:
        parts.append(tensors[name + ".B"] @ tensors[name + ".A"])
    return nn.functional.linear(hidden, sum(parts[1:], parts[0]), tensors.get(name + ".bias"))


def _norm(config: ModelConfig, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if config.family == "llama":
        return weight * hidden * (hidden.square().mean(-1, keepdim=True) + config.norm_epsilon).rsqrt()
    return nn.functional.layer_norm(hidden, (config.hidden,), weight, bias, config.norm_epsilon)


def _layer_norm_in_front(
    config: ModelConfig, tensors: Mapping[str, Tensor], projection: Projection, hidden: Tensor
) -> Tensor:
    """The norm that belongs to a qkv or fc1 projection, whichever module holds its parameters."""
    if projection.fused_norm:
        prefix = projection.name + ".norm_"
    else:
        module = "input_layernorm." if projection.kind == "qkv" else "pre_mlp_layernorm."
        prefix = f"decoder.layers.{projection.layer}." + module
    return _norm(config, hidden, tensors[prefix + "weight"], tensors.get(prefix + "bias"))


def _attention(config: ModelConfig, fused: Tensor) -> Tensor:
    """Attention, causal or bidirectional; `fused (batch, seq, (heads + 2 groups) * size)` holds queries, key and value
    of each group."""
    batch, length, _ = fused.shape
    size, per_group = config.head_size, config.heads // config.groups
    grouped = fused.view(batch, length, config.groups, per_group + 2, size)
    query = grouped[..., :per_group, :].flatten(2, 3)
    key = grouped[..., per_group, :].repeat_interleave(per_group, dim=2)
    value = grouped[..., per_group + 1, :].repeat_interleave(per_group, dim=2)
    if config.family == "llama":
        query, key = _rotate(config, query), _rotate(config, key)
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / size**0.5
    if not config.bidirectional:
        future = torch.ones(length, length, dtype=torch.bool, device=fused.device).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value).flatten(2)


def _rotate(config: ModelConfig, heads: Tensor) -> Tensor:
    """Rotary positions on `heads (batch, seq, heads, size)`: entry i turns together with entry i + size/2."""
    length, half = heads.shape[1], config.head_size // 2
    exponents = torch.arange(half, dtype=heads.dtype, device=heads.device) / half
    positions = torch.arange(length, dtype=heads.dtype, device=heads.device)
    angles = torch.outer(positions, config.rope_base**-exponents)[:, None, :]
    first, second = heads.split(half, dim=-1)
    cosine, sine = angles.cos(), angles.sin()
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)


def _activation(config: ModelConfig, inner: Tensor) -> Tensor:
    if not config.gated:
        return nn.functional.gelu(inner, approximate="tanh")
    gate, up = inner.chunk(2, dim=-1)
    return nn.functional.silu(gate) * up
