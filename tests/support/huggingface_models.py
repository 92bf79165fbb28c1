"""Small random models, saved as transformers saves them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from pretrain.tokenizer.load import open_tokenizer

Maker = Callable[..., Path]

MODELS: dict[str, Callable[[int], Any]] = {
    "llama": lambda vocabulary: LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=48,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=6,
            num_key_value_heads=2,
            max_position_embeddings=32,
            rope_parameters={"rope_type": "default", "rope_theta": 500.0},
            initializer_range=0.3,
        )
    ),
    "tied_llama": lambda vocabulary: LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=32,
            tie_word_embeddings=True,
            initializer_range=0.3,
        )
    ),
    "gpt2": lambda vocabulary: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocabulary, n_embd=32, n_head=4, n_layer=2, n_positions=32, n_inner=72, initializer_range=0.3
        )
    ),
}


def save_random(
    root: Path, tokenizer_path: Path, name: str, dtype: torch.dtype = torch.float32, **settings: object
) -> Path:
    """Makes the folder `name` in `root`: a random model of that name in `MODELS`, and a tokenizer."""
    torch.manual_seed(5)
    model = MODELS[name](open_tokenizer(tokenizer_path).vocabulary)
    for parameter in model.parameters():  # norms off one, biases off zero
        if parameter.dim() == 1:
            nn.init.normal_(parameter, parameter[0].item(), 0.2)
    folder = root / name
    model.to(dtype).save_pretrained(folder, **settings)
    (folder / "tokenizer.model").write_bytes(tokenizer_path.read_bytes())
    return folder
