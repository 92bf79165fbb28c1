"""Both families and all parametrizations: transformers computes from the translated tensors what the reference does."""

import math

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from model.config import ModelConfig, factored_projections
from model.huggingface.config import huggingface_config
from model.huggingface.dense import dense_tensor
from model.huggingface.tensors import correspondences, huggingface_shapes, huggingface_tensors
from tests.support.reference import random_tensors, reference_logits, tensor_shapes

END = 3

CONFIGS = {
    "llama": ModelConfig.model_validate(
        {
            "family": "llama",
            "layers": 2,
            "hidden": 48,
            "heads": 6,
            "query_groups": 2,
            "ffn": 40,
            "sequence_length": 24,
            "vocabulary": 61,
            "vocabulary_multiple": 16,
            "norm_epsilon": 1e-4,
            "rope_base": 500.0,
        }
    ),
    "gpt2": ModelConfig.model_validate(
        {
            "family": "gpt2",
            "layers": 2,
            "hidden": 32,
            "heads": 4,
            "ffn": 72,
            "sequence_length": 24,
            "vocabulary": 61,
            "vocabulary_multiple": 16,
            "norm_epsilon": 1e-4,
        }
    ),
}
PARAMETRIZATIONS = {
    "all": {"parametrization": "factored", "factored_layers": "all"},
    "mlp": {"parametrization": "factored", "factored_layers": "mlp"},
    "dense": {"parametrization": "dense"},
    "additive": {"parametrization": "additive"},
}


def _config(family: str, parametrization: str, **changes: object) -> ModelConfig:
    return CONFIGS[family].model_copy(update=PARAMETRIZATIONS[parametrization] | changes)


def _ranks(config: ModelConfig) -> dict[str, int]:
    """A different rank for every layer."""
    return {projection.name: 3 + place for place, projection in enumerate(factored_projections(config))}


def _model(settings: PretrainedConfig, tensors: dict[str, Tensor]) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_config(settings)
    found = model.load_state_dict(tensors, strict=False)
    assert found.unexpected_keys == []
    tied = {"lm_head.weight"} if settings.tie_word_embeddings else set()
    assert set(found.missing_keys) == tied
    model.tie_weights()
    return model.eval()


@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
@pytest.mark.parametrize("family", CONFIGS)
def test_transformers_computes_the_same_logits(family: str, parametrization: str) -> None:
    config = _config(family, parametrization)
    ranks = _ranks(config)
    tensors = random_tensors(config, ranks, seed=1)
    tokens = torch.randint(config.vocabulary, (3, config.sequence_length), generator=torch.Generator().manual_seed(2))
    exported = dict(huggingface_tensors(config, ranks, tensors.__getitem__))
    with torch.no_grad():
        expected = reference_logits(config, ranks, tensors, tokens)
        found = _model(huggingface_config(config, end_of_document=END), exported)(input_ids=tokens).logits
    assert found.shape == (3, config.sequence_length, config.vocabulary)
    assert expected.std() > 0.5
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
@pytest.mark.parametrize("family", CONFIGS)
def test_every_tensor_is_used_once_and_shapes_are_foretold(family: str, parametrization: str) -> None:
    config = _config(family, parametrization)
    ranks = _ranks(config)
    tensors = random_tensors(config, ranks, seed=1)
    read: list[str] = []

    def reader(name: str) -> Tensor:
        read.append(name)
        return tensors[name]

    exported = list(huggingface_tensors(config, ranks, reader))
    assert sorted(read) == sorted(tensors)
    assert len({name for name, _ in exported}) == len(exported)
    assert {name: tuple(tensor.shape) for name, tensor in exported} == huggingface_shapes(config)


@pytest.mark.parametrize("family", CONFIGS)
def test_table_names_the_tensors_of_the_dense_model(family: str) -> None:
    config = _config(family, "all")
    dense = _config(family, "dense")
    assert sorted(row.ours for row in correspondences(config)) == sorted(tensor_shapes(dense, {}))
    numbers = sum(math.prod(shape) for shape in huggingface_shapes(config).values())
    padding = (config.padded_vocabulary - config.vocabulary) * config.hidden * (1 if config.tied_embeddings else 2)
    assert numbers == sum(math.prod(shape) for shape in tensor_shapes(dense, {}).values()) - padding


@pytest.mark.parametrize("family", CONFIGS)
def test_settings_survive_their_file(family: str, tmp_path) -> None:
    config = _config(family, "all", attention_dropout=0.1, hidden_dropout=0.2)
    huggingface_config(config, end_of_document=END, dtype=torch.bfloat16).save_pretrained(tmp_path)
    settings = AutoConfig.from_pretrained(tmp_path)
    common = {
        "vocab_size": 61,
        "max_position_embeddings": 24,
        "num_hidden_layers": 2,
        "bos_token_id": END,
        "eos_token_id": END,
        "dtype": torch.bfloat16,
    }
    own = {
        "llama": {
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": 48,
            "intermediate_size": 40,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "rms_norm_eps": 1e-4,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
            "tie_word_embeddings": False,
            "attention_dropout": 0.1,
            "attention_bias": False,
            "mlp_bias": False,
            "hidden_act": "silu",
        },
        "gpt2": {
            "architectures": ["GPT2LMHeadModel"],
            "hidden_size": 32,
            "n_inner": 72,
            "num_attention_heads": 4,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-4,
            "tie_word_embeddings": True,
            "attn_pdrop": 0.1,
            "resid_pdrop": 0.2,
            "embd_pdrop": 0.2,
        },
    }
    expected = common | own[family]
    assert {name: getattr(settings, name) for name in expected} == expected


def test_factors_of_another_rank_are_refused() -> None:
    config = _config("llama", "all")
    ranks = _ranks(config)
    tensors = random_tensors(config, ranks, seed=1)
    name = "decoder.layers.1.mlp.linear_fc2"
    with pytest.raises(ValueError, match=r"linear_fc2 has factors A \(10, 40\) and B \(48, 10\), and rank 11 needs"):
        dense_tensor(config, ranks | {name: 11}, tensors.__getitem__, name + ".weight")
