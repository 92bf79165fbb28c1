"""Our settings and Hugging Face's, in both directions: `ModelConfig` and the content of `config.json`.

What comes in was written by others, so everything that our model does not compute is refused, with the setting's name
and value; a setting that is left out has transformers' default.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from pydantic import ValidationError
from transformers import GPT2Config, LlamaConfig, PretrainedConfig

from model.config import ModelConfig

_SILU = {"silu", "swish"}
_TANH_GELU = {"gelu_new", "gelu_pytorch_tanh"}
_LARGEST_SIZE = 2**28
"""Products of two sizes in bytes stay below 2**63."""
_LEADING_ELSEWHERE: dict[str, tuple[str, ...]] = {
    "transformers_weights": (),
    "attn_implementation": ("eager", "sdpa"),
    "_attn_implementation": ("eager", "sdpa"),
}
"""Settings that name a file of weights, which may be a pickle, or an implementation, which may be a download; and what
of them is fine."""


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
    family = _FAMILIES[config.family]
    return family.settings_class(architectures=[family.architecture], **family.to_theirs(config), **common)


def dense_config(settings: Mapping[str, Any]) -> ModelConfig:
    """The dense model that the content of a `config.json` describes.

    Raises `ValueError` with one clause, such as "its hidden_act is 'gelu', and ours is silu", when it is another kind
    of model or when it contradicts itself.
    """
    family = settings.get("model_type")
    if not isinstance(family, str) or family not in _FAMILIES:
        raise ValueError(f"its model_type is {family!r}, and only {' and '.join(_FAMILIES)} can be imported")
    translation = _FAMILIES[family]
    architectures = {translation.architecture} | translation.other_architectures
    named = settings.get("architectures") or []
    if not isinstance(named, list) or not all(isinstance(name, str) and name in architectures for name in named):
        raise ValueError(f"its architectures are {named!r}, and of {family} only {', '.join(sorted(architectures))} is")
    if settings.get("quantization_config") is not None:
        raise ValueError("its weights are quantized (quantization_config)")
    for name, allowed in _LEADING_ELSEWHERE.items():
        if (value := settings.get(name)) is not None and value not in allowed:
            raise ValueError(f"its {name} is {value!r}, which leads transformers to other files or to code of a hub")
    try:
        theirs = translation.settings_class.from_dict(dict(settings))
    except (StrictDataclassError, ValueError, TypeError, ArithmeticError, AttributeError, KeyError) as error:
        # The last line of a strict dataclass's error says what is wrong.
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1].strip()
        raise ValueError(f"transformers refuses its settings ({reason})") from error
    return _validated(translation.from_theirs(theirs))


def _to_llama(config: ModelConfig) -> dict[str, Any]:
    return {
        "hidden_size": config.hidden,
        "intermediate_size": config.ffn_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.groups,
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "max_position_embeddings": config.sequence_length,
        "rms_norm_eps": config.norm_epsilon,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
        "attention_bias": False,
        "attention_dropout": config.attention_dropout,
        "mlp_bias": False,
    }


def _from_llama(theirs: PretrainedConfig) -> dict[str, Any]:
    rope = theirs.rope_parameters or {}
    heads, groups, hidden = theirs.num_attention_heads, theirs.num_key_value_heads, theirs.hidden_size
    _refuse("attention_bias", theirs.attention_bias, {False}, "our projections have none")
    _refuse("mlp_bias", theirs.mlp_bias, {False}, "our projections have none")
    _refuse("hidden_act", theirs.hidden_act, _SILU, "our llama has silu")
    _refuse("rope_type", rope.get("rope_type", "default"), {"default"}, "ours are not scaled")
    _refuse("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0), {1.0}, "ours turn the whole head")
    _refuse_nothing("num_key_value_heads", groups)
    _refuse_nothing("intermediate_size", theirs.intermediate_size)
    if heads and theirs.head_dim != hidden / heads:
        raise ValueError(
            f"its head_dim is {theirs.head_dim}, and ours is hidden_size {hidden} / num_attention_heads {heads}"
        )
    return {
        "family": "llama",
        "layers": theirs.num_hidden_layers,
        "hidden": hidden,
        "heads": heads,
        "query_groups": 0 if groups == heads else groups,
        "ffn": theirs.intermediate_size,
        "sequence_length": theirs.max_position_embeddings,
        "vocabulary": theirs.vocab_size,
        "attention_dropout": theirs.attention_dropout,
        "initial_std": theirs.initializer_range,
        "norm_epsilon": theirs.rms_norm_eps,
        "rope_base": rope.get("rope_theta"),
    }


def _to_gpt2(config: ModelConfig) -> dict[str, Any]:
    return {
        "n_embd": config.hidden,
        "n_inner": config.ffn_width,
        "n_layer": config.layers,
        "n_head": config.heads,
        "n_positions": config.sequence_length,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": config.norm_epsilon,
        "attn_pdrop": config.attention_dropout,
        "resid_pdrop": config.hidden_dropout,
        "embd_pdrop": config.hidden_dropout,
    }


def _from_gpt2(theirs: PretrainedConfig) -> dict[str, Any]:
    _refuse("activation_function", theirs.activation_function, _TANH_GELU, "our gpt2 has the tanh form, gelu_new")
    _refuse("scale_attn_weights", theirs.scale_attn_weights, {True}, "ours are scaled")
    by_layer = theirs.scale_attn_by_inverse_layer_idx
    _refuse("scale_attn_by_inverse_layer_idx", by_layer, {False}, "ours are scaled by the head size alone")
    _refuse("reorder_and_upcast_attn", theirs.reorder_and_upcast_attn, {False}, "ours keeps its order and precision")
    _refuse("add_cross_attention", theirs.add_cross_attention, {False}, "ours has a decoder alone")
    _refuse("tie_word_embeddings", theirs.tie_word_embeddings, {True}, "our gpt2 is tied")
    _refuse_nothing("n_inner", theirs.n_inner)
    return {
        "family": "gpt2",
        "layers": theirs.n_layer,
        "hidden": theirs.n_embd,
        "heads": theirs.n_head,
        "ffn": theirs.n_inner or 0,
        "sequence_length": theirs.n_positions,
        "vocabulary": theirs.vocab_size,
        "attention_dropout": theirs.attn_pdrop,
        "hidden_dropout": theirs.resid_pdrop,
        "initial_std": theirs.initializer_range,
        "norm_epsilon": theirs.layer_norm_epsilon,
    }


def _refuse_nothing(name: str, size: int | None) -> None:
    """ValueError if `size` is zero or less; zero means something else in our settings."""
    if size is not None and size < 1:
        raise ValueError(f"its {name} is {size}, and no model has less than 1")


def _refuse(name: str, value: object, allowed: set[Any], ours: str) -> None:
    if not isinstance(value, (str, bool, int, float)) or value not in allowed:
        raise ValueError(f"its {name} is {value!r}, and {ours}")


def _validated(settings: dict[str, Any]) -> ModelConfig:
    if not settings["vocabulary"]:
        raise ValueError("it has no tokens (vocab_size)")
    for name, value in settings.items():
        if isinstance(value, int) and value > _LARGEST_SIZE:
            raise ValueError(f"its {name} is {value}, and no model has a size above {_LARGEST_SIZE}")
    try:
        return ModelConfig.model_validate(settings | {"parametrization": "dense"})
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        reason = first["msg"].removeprefix("Value error, ")
        raise ValueError(f"its sizes make no model ({place + ': ' if place else ''}{reason})") from error


@dataclass(frozen=True)
class _Translation:
    """The settings of one family in transformers, in both directions."""

    settings_class: type[PretrainedConfig]
    architecture: str
    """The class that exports are for."""
    other_architectures: frozenset[str]
    """More classes whose tensors `model/huggingface/tensors.py` knows."""
    to_theirs: Callable[[ModelConfig], dict[str, Any]]
    from_theirs: Callable[[PretrainedConfig], dict[str, Any]]


_FAMILIES: dict[str, _Translation] = {
    "llama": _Translation(LlamaConfig, "LlamaForCausalLM", frozenset(), _to_llama, _from_llama),
    # `GPT2Model` lacks only the output layer, which is tied.
    "gpt2": _Translation(GPT2Config, "GPT2LMHeadModel", frozenset({"GPT2Model"}), _to_gpt2, _from_gpt2),
}
