"""Imports of what transformers saves and of our own folders: the same function, bit for bit where nothing is cut."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from pretrain.config.run import load_config
from pretrain.convert.consolidated import ConsolidatedModel
from pretrain.errors import CheckpointError
from tests.support.consolidated_folder import FAMILIES, random_consolidated
from tests.support.huggingface_models import MODELS, Maker
from tests.support.reference import reference_logits
from tools import densify_checkpoint


def _logits(model: ConsolidatedModel, tokens: Tensor) -> Tensor:
    tensors = {name: model.read(name) for name in model.names}
    return reference_logits(model.config, model.ranks, tensors, tokens)


def _tokens(vocabulary: int, length: int = 32) -> Tensor:
    return torch.randint(vocabulary, (2, length), generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(name: str, saved: Maker, imported: Callable[..., ConsolidatedModel]) -> None:
    folder = saved(name)
    model = MODELS[name](420).from_pretrained(folder).eval()
    tokens = _tokens(model.config.vocab_size)
    with torch.no_grad():
        expected = model(tokens).logits
    assert expected.std() > 0.5
    for parametrization, flags in (("dense", ()), ("additive", ("--rank", 3))):
        found = imported(folder, parametrization, *flags)
        torch.testing.assert_close(_logits(found, tokens), expected, rtol=0, atol=2e-5 * float(expected.abs().max()))
        if parametrization == "additive":
            A, B = (found.read(f"decoder.layers.1.mlp.linear_fc1.{side}") for side in "AB")
            torch.testing.assert_close(A @ A.t(), torch.eye(3), atol=1e-5, rtol=0)
            assert not B.any()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_half_precision_files_are_read_in_full(
    name: str, saved: Maker, imported: Callable[..., ConsolidatedModel]
) -> None:
    folder = saved(name, torch.bfloat16, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    stored = {key: tensor for path in folder.glob("*.safetensors") for key, tensor in load_file(path).items()}
    words = "model.embed_tokens.weight" if name == "llama" else "transformer.wte.weight"
    assert stored[words].dtype == torch.bfloat16
    found = imported(folder, "dense", "--max-shard-size", "30KB").read("embedding.word_embeddings.weight")
    vocabulary = len(stored[words])
    assert torch.equal(found[:vocabulary], stored[words].float())
    assert len(found) % 128 == 0
    assert not found[vocabulary:].any()


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_export_and_import_give_every_bit_back(
    family: str, tokenizer_path: Path, tmp_path: Path, monkeypatch, imported: Callable[..., ConsolidatedModel]
) -> None:
    merged = random_consolidated(tmp_path / "merged", tokenizer_path, family, "dense", vocabulary_multiple=1)
    monkeypatch.setattr(sys, "argv", ["densify", "--input", str(merged), "--output", str(tmp_path / "export")])
    densify_checkpoint.main()
    before, after = ConsolidatedModel(merged), imported(tmp_path / "export", "dense")
    assert after.config == before.config.model_copy(update={"vocabulary_multiple": 128})
    assert after.tokenizer_path.read_bytes() == before.tokenizer_path.read_bytes()
    assert after.facts["train"]["step"] == 0
    assert sorted(after.names) == sorted(before.names)
    for name in before.names:
        expected = before.read(name)
        assert torch.equal(after.read(name)[: len(expected)], expected), name


@pytest.mark.parametrize(
    "source", ["additive", *(pytest.param(name, marks=pytest.mark.matrix) for name in ("all", "mlp", "dense"))]
)
def test_our_own_folders_are_converted_without_a_detour(
    source: str, tokenizer_path: Path, tmp_path: Path, imported: Callable[..., ConsolidatedModel], capsys
) -> None:
    merged = ConsolidatedModel(random_consolidated(tmp_path / "merged", tokenizer_path, "llama", source))
    tokens = _tokens(merged.config.vocabulary)
    expected = _logits(merged, tokens)
    for parametrization, flags in (("dense", ()), ("additive", ("--rank", 3, "--factored-layers", "mlp"))):
        found = imported(merged.folder, parametrization, *flags)
        torch.testing.assert_close(_logits(found, tokens), expected, rtol=0, atol=1e-4)
    capsys.readouterr()
    cut = imported(merged.folder, "factored", "--rank", 16)
    assert set(cut.ranks.values()) == {16}
    assert "of the weights on average" in capsys.readouterr().out


def test_older_gpt2_files(saved: Maker, imported: Callable[..., ConsolidatedModel]) -> None:
    """Files without the prefix, with masks beside the weights and the tied output layer spelled out."""
    folder = saved("gpt2")
    expected = imported(folder, "dense").read("decoder.layers.1.self_attention.linear_qkv.weight")
    tensors = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    bare |= {f"h.{layer}.attn.bias": torch.ones(1, 1, 32, 32).tril().to(torch.uint8) for layer in range(2)}
    bare |= {f"h.{layer}.attn.masked_bias": torch.tensor(-1e4) for layer in range(2)}
    bare["lm_head.weight"] = bare["wte.weight"].clone()
    save_file(bare, folder / "model.safetensors", {"format": "pt"})
    found = imported(folder, "dense", "--overwrite")
    assert torch.equal(found.read("decoder.layers.1.self_attention.linear_qkv.weight"), expected)


def test_tied_llama_gets_an_output_layer_of_its_own(
    saved: Maker, imported: Callable[..., ConsolidatedModel], capsys
) -> None:
    folder = saved("tied_llama")
    tensors = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in tensors
    model = imported(folder, "dense")
    assert torch.equal(model.read("output_layer.weight"), model.read("embedding.word_embeddings.weight"))
    assert "here it is a copy, trained on its own" in capsys.readouterr().out
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    again = imported(folder, "dense", "--overwrite")
    assert torch.equal(model.read("output_layer.weight"), again.read("output_layer.weight"))
    tensors["lm_head.weight"][0, 0] += 1.0
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"lm_head\.weight and model\.embed_tokens\.weight with different numbers"
    ):
        imported(folder, "dense", "--overwrite")


def test_longest_sequence(saved: Maker, imported: Callable[..., ConsolidatedModel]) -> None:
    table = "embedding.position_embeddings.weight"
    gpt2 = saved("gpt2")
    whole, cut = imported(gpt2, "dense").read(table), imported(gpt2, "dense", "--overwrite", "--sequence-length", 20)
    assert cut.config.sequence_length == 20
    assert torch.equal(cut.read(table), whole[:20])
    with pytest.raises(CheckpointError, match="--sequence-length is 33, and this model allows 2 to 32"):
        imported(gpt2, "dense", "--overwrite", "--sequence-length", 33)
    assert imported(saved("llama"), "dense", "--overwrite", "--sequence-length", 64).config.sequence_length == 64


def test_settings_beside_the_model_are_a_config(
    saved: Maker, imported: Callable[..., ConsolidatedModel], capsys
) -> None:
    model = imported(saved("llama"), "additive", "--rank", 4)
    line = capsys.readouterr().out.splitlines()[-1]
    config = load_config(line.split("--config ")[1].split()[0], ["data.prefix=corpus"])
    assert config.model == model.config
    assert config.initial_ranks() == model.ranks
    assert config.checkpoint.start_from == str(model.folder)
    own = model.folder.parent / "own.yaml"
    own.write_text(yaml.safe_dump({"extends": "additive/training.yaml", "data": {"prefix": "corpus"}}))
    assert load_config(str(own), []) == config
