"""Our tensors and Hugging Face's: one table of names and layouts, for `LlamaForCausalLM` and `GPT2LMHeadModel`.

The table speaks of *dense* logical tensors: the names of a dense model, whatever the parametrization. `dense_tensor`
makes them out of the factored ones, W = B A in fp32, so the table needs to know only this:

| ours                         | Hugging Face, llama    | Hugging Face, gpt2                          |
|------------------------------|------------------------|---------------------------------------------|
| word embeddings, output layer| padding rows cut       | padding rows cut; the output is tied        |
| qkv: per query group q, k, v | q, k, v on their own   | q over k over v, then transposed (Conv1D)   |
| fc1: gate above up           | gate, up on their own  | transposed (Conv1D); there is no gate       |
| proj, fc2                    | as they are            | transposed (Conv1D)                         |

Rotary positions are half-split on both sides, so the rows of q and k stay in their order. Tensors are full, and only
one weight exists at a time.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GPT2Config, LlamaConfig, PretrainedConfig

from model.config import ModelConfig, ProjectionKind, projections

TensorReader = Callable[[str], Tensor]
"""Gives the full logical tensor of a name."""

Layout = Callable[[ModelConfig, Tensor], tuple[Tensor, ...]]
"""Cuts one dense tensor of ours into the Hugging Face tensors that hold its numbers."""


@dataclass(frozen=True)
class Correspondence:
    """One dense tensor of ours, and the Hugging Face tensors that hold the same numbers."""

    ours: str
    theirs: tuple[str, ...]
    to_theirs: Layout


def correspondences(config: ModelConfig) -> list[Correspondence]:
    """The table for one model, in the order of execution; every tensor of either side occurs once."""
    names = _LLAMA if config.family == "llama" else _GPT2
    table = [Correspondence("embedding.word_embeddings.weight", (names.words,), _real_vocabulary)]
    if names.positions is not None:
        table.append(Correspondence("embedding.position_embeddings.weight", (names.positions,), _same))
    leaves = ("weight", "bias") if config.biases else ("weight",)
    for projection in projections(config):
        layer = names.layer.format(projection.layer)
        if projection.normed:
            for leaf in leaves:
                ours = _norm_module(projection.layer, projection.kind) + leaf
                table.append(Correspondence(ours, (layer + names.norms[projection.kind] + leaf,), _same))
        for leaf in leaves:
            theirs = tuple(f"{layer}{module}.{leaf}" for module in names.modules[projection.kind])
            table.append(Correspondence(f"{projection.name}.{leaf}", theirs, names.layouts[projection.kind, leaf]))
    table += [Correspondence(f"decoder.final_layernorm.{leaf}", (names.final_norm + leaf,), _same) for leaf in leaves]
    if not config.tied_embeddings:
        table.append(Correspondence("output_layer.weight", ("lm_head.weight",), _real_vocabulary))
    return table


def dense_tensor(config: ModelConfig, ranks: Mapping[str, int], read: TensorReader, name: str) -> Tensor:
    """The tensor `name` of the dense model that computes the same function; `read` knows the factored model's names.

    Raises `ValueError` when factors do not have the rank that `ranks` says.
    """
    for projection in projections(config):
        if not projection.factored:
            continue
        if name == projection.name + ".weight":
            rank = ranks[projection.name]
            A, B = read(projection.name + ".A").float(), read(projection.name + ".B").float()
            expected = (rank, projection.in_features), (projection.out_features, rank)
            if (tuple(A.shape), tuple(B.shape)) != expected:
                raise ValueError(
                    f"{projection.name} has factors A {tuple(A.shape)} and B {tuple(B.shape)}, "
                    f"and rank {rank} needs {expected[0]} and {expected[1]}"
                )
            return B @ A
        norm = _norm_module(projection.layer, projection.kind) if projection.normed else None
        if norm is not None and name.startswith(norm):
            return read(f"{projection.name}.norm_{name.removeprefix(norm)}")
    return read(name)


def huggingface_tensors(
    config: ModelConfig, ranks: Mapping[str, int], read: TensorReader
) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor, one after the other; the tensors may be views of each other's memory."""
    for row in correspondences(config):
        tensors = row.to_theirs(config, dense_tensor(config, ranks, read, row.ours))
        yield from zip(row.theirs, tensors, strict=True)


def huggingface_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that `huggingface_tensors` gives, without computing any."""
    dense = config.model_copy(update={"parametrization": "dense"})
    shapes = _dense_shapes(dense)
    tensors = huggingface_tensors(dense, {}, lambda name: torch.empty(shapes[name], device="meta"))
    return {name: tuple(tensor.shape) for name, tensor in tensors}


def huggingface_config(
    config: ModelConfig, *, end_of_document: int | None, dtype: torch.dtype = torch.float32
) -> PretrainedConfig:
    """Settings with which transformers computes what our model computes; `dtype` is that of the stored weights.

    A text both begins and ends at `end_of_document`: it is the token that precedes every document in training.
    """
    common = {
        "vocab_size": config.vocabulary,
        "initializer_range": config.initial_std,
        "bos_token_id": end_of_document,
        "eos_token_id": end_of_document,
        "tie_word_embeddings": config.tied_embeddings,
        "dtype": dtype,
    }
    if config.family == "llama":
        return LlamaConfig(
            architectures=["LlamaForCausalLM"],
            hidden_size=config.hidden,
            intermediate_size=config.ffn_width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.groups,
            head_dim=config.head_size,
            hidden_act="silu",
            max_position_embeddings=config.sequence_length,
            rms_norm_eps=config.norm_epsilon,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_base},
            attention_bias=False,
            attention_dropout=config.attention_dropout,
            mlp_bias=False,
            **common,
        )
    return GPT2Config(
        architectures=["GPT2LMHeadModel"],
        n_embd=config.hidden,
        n_inner=config.ffn_width,
        n_layer=config.layers,
        n_head=config.heads,
        n_positions=config.sequence_length,
        activation_function="gelu_new",
        layer_norm_epsilon=config.norm_epsilon,
        attn_pdrop=config.attention_dropout,
        resid_pdrop=config.hidden_dropout,
        embd_pdrop=config.hidden_dropout,
        **common,
    )


def _norm_module(layer: int, kind: ProjectionKind) -> str:
    """The dense model's norm in front of qkv or fc1."""
    return f"decoder.layers.{layer}." + {"qkv": "input_layernorm.", "fc1": "pre_mlp_layernorm."}[kind]


def _dense_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Full shapes of the dense model's own tensors."""
    shapes: dict[str, tuple[int, ...]] = {}
    vectors = {f"{projection.name}.bias": (projection.out_features,) for projection in projections(config)}
    matrices = {
        "embedding.word_embeddings.weight": (config.padded_vocabulary, config.hidden),
        "embedding.position_embeddings.weight": (config.sequence_length, config.hidden),
        "output_layer.weight": (config.padded_vocabulary, config.hidden),
        **{f"{p.name}.weight": (p.out_features, p.in_features) for p in projections(config)},
    }
    for row in correspondences(config):
        shapes[row.ours] = matrices.get(row.ours) or vectors.get(row.ours) or (config.hidden,)
    return shapes


# Layouts.


def _same(config: ModelConfig, tensor: Tensor) -> tuple[Tensor, ...]:
    return (tensor,)


def _transposed(config: ModelConfig, weight: Tensor) -> tuple[Tensor, ...]:
    """GPT-2's Conv1D keeps `(in, out)`."""
    return (weight.t(),)


def _real_vocabulary(config: ModelConfig, rows: Tensor) -> tuple[Tensor, ...]:
    return (rows[: config.vocabulary],)


def _gate_and_up(config: ModelConfig, rows: Tensor) -> tuple[Tensor, ...]:
    return rows.chunk(2)


def _queries_keys_values(config: ModelConfig, rows: Tensor) -> tuple[Tensor, ...]:
    """`rows ((heads + 2 groups) * size, ...)`, interleaved by query group, to those of q, of k and of v."""
    per_group = config.heads // config.groups
    grouped = rows.unflatten(0, (config.groups, per_group + 2, config.head_size))
    return tuple(part.flatten(0, 2) for part in grouped.split([per_group, 1, 1], dim=1))


def _stacked_queries_keys_values(config: ModelConfig, rows: Tensor) -> tuple[Tensor, ...]:
    """q over k over v; a weight is transposed as well."""
    stacked = torch.cat(_queries_keys_values(config, rows))
    return (stacked.t() if stacked.dim() == 2 else stacked,)


# Names.


@dataclass(frozen=True)
class _Names:
    """Hugging Face's modules of one family."""

    words: str
    positions: str | None
    layer: str
    norms: dict[str, str]
    modules: dict[str, tuple[str, ...]]
    layouts: dict[tuple[str, str], Layout]
    final_norm: str


_LLAMA = _Names(
    words="model.embed_tokens.weight",
    positions=None,
    layer="model.layers.{}.",
    norms={"qkv": "input_layernorm.", "fc1": "post_attention_layernorm."},
    modules={
        "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "proj": ("self_attn.o_proj",),
        "fc1": ("mlp.gate_proj", "mlp.up_proj"),
        "fc2": ("mlp.down_proj",),
    },
    layouts={
        ("qkv", "weight"): _queries_keys_values,
        ("proj", "weight"): _same,
        ("fc1", "weight"): _gate_and_up,
        ("fc2", "weight"): _same,
    },
    final_norm="model.norm.",
)

_GPT2 = _Names(
    words="transformer.wte.weight",
    positions="transformer.wpe.weight",
    layer="transformer.h.{}.",
    norms={"qkv": "ln_1.", "fc1": "ln_2."},
    modules={"qkv": ("attn.c_attn",), "proj": ("attn.c_proj",), "fc1": ("mlp.c_fc",), "fc2": ("mlp.c_proj",)},
    layouts={
        ("qkv", "weight"): _stacked_queries_keys_values,
        ("qkv", "bias"): _stacked_queries_keys_values,
        ("proj", "weight"): _transposed,
        ("proj", "bias"): _same,
        ("fc1", "weight"): _transposed,
        ("fc1", "bias"): _same,
        ("fc2", "weight"): _transposed,
        ("fc2", "bias"): _same,
    },
    final_norm="transformer.ln_f.",
)
