"""Small consolidated folders with random numbers and a real tokenizer, for tests of exports."""

import json
import shutil
from pathlib import Path

import sentencepiece
from safetensors.torch import save_file
from torch import Tensor

from model.config import ModelConfig, factored_projections
from pretrain.tokenizer.base import Tokenizer
from pretrain.tokenizer.load import open_tokenizer
from pretrain.tokenizer.sentencepiece import END_OF_DOCUMENT
from tests.support.reference import random_tensors

PARAMETRIZATIONS = {
    "all": {"parametrization": "factored", "factored_layers": "all"},
    "mlp": {"parametrization": "factored", "factored_layers": "mlp"},
    "dense": {"parametrization": "dense"},
    "additive": {"parametrization": "additive"},
}
FAMILIES = {
    "llama": {"family": "llama", "hidden": 32, "heads": 4, "query_groups": 2, "ffn": 48},
    "gpt2": {"family": "gpt2", "hidden": 32, "heads": 4, "ffn": 64},
}
TEXT = "def main(): return the answer to all of it, and more than that. "


def small_tokenizer(folder: Path) -> Path:
    """Trains a BPE model of a few hundred pieces, with the settings that `SentencePieceTokenizer` asks for."""
    (folder / "text").write_text("\n".join([TEXT * 3, "".join(map(chr, range(33, 127)))] * 20))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=420,
        hard_vocab_limit=False,
        character_coverage=1.0,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        bos_id=-1,
        pad_id=-1,
        unk_id=0,
        eos_id=1,
        eos_piece=END_OF_DOCUMENT,
        minloglevel=2,
    )
    return folder / "tokenizer.model"


def random_consolidated(
    folder: Path, tokenizer_path: Path, family: str, parametrization: str = "all", **changes: object
) -> Path:
    """Makes `folder`: two layers, 32 positions, every rank another."""
    tokenizer = open_tokenizer(tokenizer_path)
    settings: dict[str, object] = {"layers": 2, "sequence_length": 32, "vocabulary": tokenizer.vocabulary}
    config = ModelConfig.model_validate(settings | FAMILIES[family] | PARAMETRIZATIONS[parametrization] | changes)
    ranks = {projection.name: 4 + place for place, projection in enumerate(factored_projections(config))}
    write_consolidated(folder, tokenizer, config, ranks)
    return folder


def write_consolidated(
    folder: Path, tokenizer: Tokenizer, config: ModelConfig, ranks: dict[str, int]
) -> dict[str, Tensor]:
    """Makes `folder`, as training left it after 40 steps, with the random numbers that it returns."""
    tensors = random_tensors(config, ranks, seed=3)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    facts = {
        "format_version": 1,
        "model": config.model_dump(),
        "ranks": ranks,
        "growth": [],
        "train": {"step": 40, "consumed_samples": 160, "consumed_tokens": 5120, "skipped_steps": 0},
        "tokenizer": {"fingerprint": tokenizer.fingerprint, "vocabulary": tokenizer.vocabulary},
    }
    (folder / "espalier.json").write_text(json.dumps(facts))
    shutil.copy(tokenizer.path, folder / "tokenizer.model")
    return tensors
