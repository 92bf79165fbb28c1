"""`config.json` in both directions, and what our model does not compute."""

from typing import Any

import pytest

from model.config import ModelConfig
from model.huggingface.config import dense_config, huggingface_config

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 61,
    "max_position_embeddings": 24,
    "rms_norm_eps": 1e-4,
    "rope_theta": 500.0,
}
GPT2: dict[str, Any] = {
    "model_type": "gpt2",
    "n_embd": 32,
    "n_head": 4,
    "n_layer": 2,
    "n_positions": 24,
    "vocab_size": 61,
    "attn_pdrop": 0.1,
    "resid_pdrop": 0.2,
}


@pytest.mark.parametrize(
    "config",
    [
        ModelConfig(
            family="llama", layers=2, hidden=48, heads=6, query_groups=2, ffn=40, vocabulary=61, rope_base=500.0
        ),
        ModelConfig(family="llama", layers=2, hidden=48, heads=6, ffn=40, vocabulary=61, attention_dropout=0.1),
        ModelConfig(family="gpt2", layers=3, hidden=32, heads=4, ffn=72, vocabulary=61, hidden_dropout=0.2),
    ],
)
def test_settings_come_back(config: ModelConfig) -> None:
    found = dense_config(huggingface_config(config, end_of_document=3).to_dict())
    assert found == config.model_copy(update={"parametrization": "dense"})


def test_older_files_and_defaults() -> None:
    llama = dense_config(LLAMA)
    assert (llama.rope_base, llama.head_size, llama.groups, llama.parametrization) == (500.0, 8, 2, "dense")
    gpt2 = dense_config(GPT2)
    assert (gpt2.ffn_width, gpt2.norm_epsilon) == (128, 1e-5)
    assert (gpt2.attention_dropout, gpt2.hidden_dropout) == (0.1, 0.2)


@pytest.mark.parametrize(
    ("base", "change", "words"),
    [
        (LLAMA, {"model_type": "mistral"}, "its model_type is 'mistral', and only llama and gpt2 can be imported"),
        (LLAMA, {"model_type": None}, "its model_type is None"),
        (LLAMA, {"model_type": ["llama"]}, r"its model_type is \['llama'\]"),
        (LLAMA, {"architectures": ["LlamaForSequenceClassification"]}, "of llama only LlamaForCausalLM is"),
        (LLAMA, {"architectures": [["LlamaForCausalLM"]]}, "of llama only LlamaForCausalLM is"),
        (LLAMA, {"quantization_config": {"bits": 4}}, "its weights are quantized"),
        (LLAMA, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "its rope_type is 'linear'"),
        (
            LLAMA,
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 5e5, "factor": 2.0}},
            "its rope_type is 'dynamic'",
        ),
        (LLAMA, {"attention_bias": True}, "its attention_bias is True, and our projections have none"),
        (LLAMA, {"mlp_bias": True}, "its mlp_bias is True"),
        (LLAMA, {"hidden_act": "gelu"}, "its hidden_act is 'gelu', and our llama has silu"),
        (LLAMA, {"head_dim": 16}, "its head_dim is 16, and ours is hidden_size 48 / num_attention_heads 6"),
        (LLAMA, {"num_key_value_heads": 4}, "6 heads do not divide into 4 query groups"),
        (LLAMA, {"hidden_size": "48"}, "transformers refuses its settings .*hidden_size"),
        (LLAMA, {"num_attention_heads": 0}, "transformers refuses its settings"),
        (LLAMA, {"num_key_value_heads": 0}, "its num_key_value_heads is 0, and no model has less than 1"),
        (LLAMA, {"intermediate_size": 0}, "its intermediate_size is 0"),
        (GPT2, {"n_inner": 0}, "its n_inner is 0"),
        (LLAMA, {"num_hidden_layers": 0}, r"its sizes make no model \(layers"),
        (LLAMA, {"vocab_size": 0}, "it has no tokens"),
        (LLAMA, {"intermediate_size": 10**12}, "its ffn is 1000000000000, and no model has a size above"),
        (GPT2, {"activation_function": "relu"}, "its activation_function is 'relu'"),
        (GPT2, {"scale_attn_by_inverse_layer_idx": True}, "its scale_attn_by_inverse_layer_idx is True"),
        (GPT2, {"reorder_and_upcast_attn": True}, "its reorder_and_upcast_attn is True"),
        (GPT2, {"scale_attn_weights": False}, "its scale_attn_weights is False"),
        (GPT2, {"add_cross_attention": True}, "its add_cross_attention is True"),
        (GPT2, {"tie_word_embeddings": False}, "its tie_word_embeddings is False, and our gpt2 is tied"),
        (GPT2, {"n_head": 5}, "hidden 32 is not divisible by 5 heads"),
    ],
)
def test_what_our_model_does_not_compute(base: dict[str, Any], change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        dense_config(base | change)
    assert "\n" not in str(caught.value)
