"""Our tensors and Hugging Face's: one table of names and arrangements, for `LlamaForCausalLM` and `GPT2LMHeadModel`.

It is read in both directions: exports go from ours to theirs, imports from theirs to ours. The table speaks of *dense*
logical tensors, whatever the parametrization (`model/huggingface/dense.py` makes them and makes others of them), so it
needs to know only this:

| ours                         | Hugging Face, llama    | Hugging Face, gpt2                          |
|------------------------------|------------------------|---------------------------------------------|
| word embeddings, output layer| padding rows cut/zero  | padding rows cut/zero; the output is tied   |
| qkv: per query group q, k, v | q, k, v on their own   | q over k over v, then transposed (Conv1D)   |
| fc1: gate above up           | gate, up on their own  | transposed (Conv1D); there is no gate       |
| proj, fc2                    | as they are            | transposed (Conv1D)                         |

Rotary positions are half-split on both sides, so the rows of q and k stay in their order. Tensors are full, and only
one weight exists at a time.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.config import Family, ModelConfig, Projection, projections
from model.huggingface.dense import TensorReader, dense_tensor, norm_module, parameter_shapes


@dataclass(frozen=True)
class Arrangement:
    """How one dense tensor of ours and the Hugging Face tensors with its numbers come out of each other."""

    to_theirs: Callable[[ModelConfig, Tensor], tuple[Tensor, ...]]
    from_theirs: Callable[[ModelConfig, tuple[Tensor, ...]], Tensor]


@dataclass(frozen=True)
class Correspondence:
    """One dense tensor of ours, and the Hugging Face tensors that hold the same numbers."""

    ours: str
    theirs: tuple[str, ...]
    arrangement: Arrangement


def correspondences(config: ModelConfig) -> list[Correspondence]:
    """The table for one model, in the order of execution; every tensor of either side occurs once."""
    names = _NAMES[config.family]
    table = [Correspondence("embedding.word_embeddings.weight", (names.words,), _VOCABULARY)]
    if names.positions is not None:
        table.append(Correspondence("embedding.position_embeddings.weight", (names.positions,), _SAME))
    leaves = ("weight", "bias") if config.biases else ("weight",)
    norm_leaves = config.norm_parameters
    for projection in projections(config):
        layer = names.layer.format(projection.layer)
        if projection.normed:
            for leaf in norm_leaves:
                ours = norm_module(projection.layer, projection.kind) + leaf
                table.append(Correspondence(ours, (layer + names.norms[projection.kind] + leaf,), _SAME))
        for leaf in leaves:
            theirs = tuple(f"{layer}{module}.{leaf}" for module in names.modules[projection.kind])
            table.append(Correspondence(f"{projection.name}.{leaf}", theirs, names.arrangements[projection.kind, leaf]))
    final = "decoder.final_layernorm."
    table += [Correspondence(final + leaf, (names.final_norm + leaf,), _SAME) for leaf in norm_leaves]
    if not config.tied_embeddings:
        table.append(Correspondence("output_layer.weight", (OUTPUT_LAYER,), _VOCABULARY))
    return table


def huggingface_tensors(
    config: ModelConfig, ranks: Mapping[str, int], read: TensorReader
) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor, one after the other; the tensors may be views of each other's memory."""
    for row in correspondences(config):
        tensors = row.arrangement.to_theirs(config, dense_tensor(config, ranks, read, row.ours))
        yield from zip(row.theirs, tensors, strict=True)


def tensor_from_theirs(config: ModelConfig, row: Correspondence, theirs: tuple[Tensor, ...]) -> Tensor:
    """One dense tensor of ours in fp32, out of the Hugging Face tensors of its row."""
    return row.arrangement.from_theirs(config, tuple(tensor.float() for tensor in theirs)).contiguous()


def modules_of(config: ModelConfig, projection: Projection) -> tuple[str, ...]:
    """Hugging Face's linear modules that hold one projection."""
    names = _NAMES[config.family]
    layer = names.layer.format(projection.layer)
    return tuple(layer + module for module in names.modules[projection.kind])


def stores_transposed(config: ModelConfig) -> bool:
    """Whether Hugging Face's linear modules hold their weights as `(in, out)`: GPT-2's Conv1D does."""
    return _NAMES[config.family].arrangements["proj", "weight"] is _TRANSPOSED


def module_rows(config: ModelConfig, projection: Projection, rows: Tensor) -> tuple[Tensor, ...]:
    """`rows (out, ...)` of a projection cut and ordered as the outputs of its `modules_of`, never transposed."""
    names = _NAMES[config.family]
    # A row number takes the same way as a bias does.
    arrangement = names.arrangements.get((projection.kind, "bias")) or names.arrangements[projection.kind, "weight"]
    places = arrangement.to_theirs(config, torch.arange(projection.out_features))
    return tuple(rows[place] for place in places)


def huggingface_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that `huggingface_tensors` gives, without computing any."""
    dense = config.model_copy(update={"parametrization": "dense"})
    shapes = parameter_shapes(dense, {})
    tensors = huggingface_tensors(dense, {}, lambda name: torch.empty(shapes[name], device="meta"))
    return {name: tuple(tensor.shape) for name, tensor in tensors}


# Arrangements.


def _real_rows(config: ModelConfig, rows: Tensor) -> tuple[Tensor, ...]:
    return (rows[: config.vocabulary],)


def _padded_rows(config: ModelConfig, theirs: tuple[Tensor, ...]) -> Tensor:
    """The word embedding or output layer with zero rows behind it, which pad the vocabulary."""
    return nn.functional.pad(theirs[0], (0, 0, 0, config.padded_vocabulary - config.vocabulary))


def _queries_keys_values(config: ModelConfig, rows: Tensor) -> tuple[Tensor, ...]:
    """`rows ((heads + 2 groups) * size, ...)`, interleaved by query group, to those of q, of k and of v."""
    per_group = config.heads // config.groups
    grouped = rows.unflatten(0, (config.groups, per_group + 2, config.head_size))
    return tuple(part.flatten(0, 2) for part in grouped.split([per_group, 1, 1], dim=1))


def _interleaved(config: ModelConfig, theirs: tuple[Tensor, ...]) -> Tensor:
    """The inverse of `_queries_keys_values`."""
    counts = (config.heads // config.groups, 1, 1)
    parts = [
        part.unflatten(0, (config.groups, count, config.head_size)) for part, count in zip(theirs, counts, strict=True)
    ]
    return torch.cat(parts, dim=1).flatten(0, 2)


def _stacked(config: ModelConfig, rows: Tensor) -> Tensor:
    """`rows` of all query groups, reordered: q over k over v."""
    return torch.cat(_queries_keys_values(config, rows))


def _unstacked(config: ModelConfig, rows: Tensor) -> Tensor:
    """The inverse of `_stacked`, where there are as many keys as queries."""
    return _interleaved(config, rows.chunk(3))


_SAME = Arrangement(lambda config, tensor: (tensor,), lambda config, theirs: theirs[0])
# GPT-2's Conv1D keeps `(in, out)`.
_TRANSPOSED = Arrangement(lambda config, weight: (weight.t(),), lambda config, theirs: theirs[0].t())
_VOCABULARY = Arrangement(_real_rows, _padded_rows)
_GATE_OVER_UP = Arrangement(lambda config, rows: rows.chunk(2), lambda config, theirs: torch.cat(theirs))
_QUERIES_KEYS_VALUES = Arrangement(_queries_keys_values, _interleaved)
_STACKED = Arrangement(
    lambda config, rows: (_stacked(config, rows),), lambda config, theirs: _unstacked(config, theirs[0])
)
_STACKED_TRANSPOSED = Arrangement(
    lambda config, rows: (_stacked(config, rows).t(),), lambda config, theirs: _unstacked(config, theirs[0].t())
)

# Names.

OUTPUT_LAYER = "lm_head.weight"
WORD_EMBEDDINGS: dict[Family, str] = {"llama": "model.embed_tokens.weight", "gpt2": "transformer.wte.weight"}


@dataclass(frozen=True)
class _Names:
    """Hugging Face's modules of one family."""

    words: str
    positions: str | None
    layer: str
    norms: dict[str, str]
    modules: dict[str, tuple[str, ...]]
    arrangements: dict[tuple[str, str], Arrangement]
    final_norm: str


_LLAMA = _Names(
    words=WORD_EMBEDDINGS["llama"],
    positions=None,
    layer="model.layers.{}.",
    norms={"qkv": "input_layernorm.", "fc1": "post_attention_layernorm."},
    modules={
        "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "proj": ("self_attn.o_proj",),
        "fc1": ("mlp.gate_proj", "mlp.up_proj"),
        "fc2": ("mlp.down_proj",),
    },
    arrangements={
        ("qkv", "weight"): _QUERIES_KEYS_VALUES,
        ("proj", "weight"): _SAME,
        ("fc1", "weight"): _GATE_OVER_UP,
        ("fc2", "weight"): _SAME,
    },
    final_norm="model.norm.",
)

_GPT2 = _Names(
    words=WORD_EMBEDDINGS["gpt2"],
    positions="transformer.wpe.weight",
    layer="transformer.h.{}.",
    norms={"qkv": "ln_1.", "fc1": "ln_2."},
    modules={"qkv": ("attn.c_attn",), "proj": ("attn.c_proj",), "fc1": ("mlp.c_fc",), "fc2": ("mlp.c_proj",)},
    arrangements={
        ("qkv", "weight"): _STACKED_TRANSPOSED,
        ("qkv", "bias"): _STACKED,
        ("proj", "weight"): _TRANSPOSED,
        ("proj", "bias"): _SAME,
        ("fc1", "weight"): _TRANSPOSED,
        ("fc1", "bias"): _SAME,
        ("fc2", "weight"): _TRANSPOSED,
        ("fc2", "bias"): _SAME,
    },
    final_norm="transformer.ln_f.",
)

_NAMES: dict[Family, _Names] = {"llama": _LLAMA, "gpt2": _GPT2}
