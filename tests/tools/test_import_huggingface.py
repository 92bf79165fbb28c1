"""Imports of what transformers saves and of our own folders: the same function, bit for bit where nothing is cut, and
one sentence for everything else."""

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from model.config import ModelConfig
from pretrain.config.run import load_config
from pretrain.convert.consolidated import ConsolidatedModel
from pretrain.convert.huggingface_import import open_source
from pretrain.errors import CheckpointError, ConfigError, DataError, EspalierError, run_command
from pretrain.tokenizer.load import open_tokenizer
from tests.support.consolidated_folder import FAMILIES, random_consolidated, small_tokenizer
from tests.support.reference import reference_logits
from tools import densify_checkpoint, import_huggingface

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


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def saved(tokenizer_path: Path, tmp_path: Path) -> Maker:
    """Saves a random model as transformers does, with a tokenizer beside it."""

    def save(name: str, dtype: torch.dtype = torch.float32, **settings: object) -> Path:
        torch.manual_seed(5)
        model = MODELS[name](open_tokenizer(tokenizer_path).vocabulary)
        for parameter in model.parameters():  # norms off one, biases off zero
            if parameter.dim() == 1:
                nn.init.normal_(parameter, parameter[0].item(), 0.2)
        folder = tmp_path / name
        model.to(dtype).save_pretrained(folder, **settings)
        (folder / "tokenizer.model").write_bytes(tokenizer_path.read_bytes())
        return folder

    return save


@pytest.fixture
def imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., ConsolidatedModel]:
    """Runs the tool as its command line does."""

    def call(source: Path, parametrization: str, *flags: object) -> ConsolidatedModel:
        output = tmp_path / "starts" / parametrization
        arguments = ["--input", source, "--output", output, "--parametrization", parametrization, *flags]
        monkeypatch.setattr(sys, "argv", ["import_huggingface.py", *map(str, arguments)])
        import_huggingface.main()
        return ConsolidatedModel(output)

    return call


def _logits(model: ConsolidatedModel, tokens: Tensor) -> Tensor:
    tensors = {name: model.read(name) for name in model.names}
    return reference_logits(model.config, model.ranks, tensors, tokens)


def _tokens(vocabulary: int, length: int = 32) -> Tensor:
    return torch.randint(vocabulary, (2, length), generator=torch.Generator().manual_seed(9))


# The same function ----------------------------------------------------------------------------------------------------


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


# What cannot be imported ----------------------------------------------------------------------------------------------


def _edit(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


NORM = "model.norm.weight"
FAULTS: dict[str, tuple[Callable[[Path], object], type[EspalierError], str]] = {
    "architecture": (
        lambda f: _edit(f, model_type="bert"),
        CheckpointError,
        "model_type is 'bert', and only llama and gpt2",
    ),
    "rope": (lambda f: _edit(f, rope_scaling={"type": "yarn", "factor": 2.0}), CheckpointError, "rope_type is 'yarn'"),
    "attention": (
        lambda f: _edit(f, _attn_implementation="of another kind"),
        CheckpointError,
        "_attn_implementation is 'of another kind'",
    ),
    "pickled": (_pickle, CheckpointError, r"are pickled \(pytorch_model\.bin\)"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), CheckpointError, "holds no model.safetensors"),
    "cut": (
        lambda f: (f / "model.safetensors").write_bytes(b"\x08" + bytes(20)),
        CheckpointError,
        "not a whole safeten",
    ),
    "not json": (
        lambda f: (f / "config.json").write_text("{"),
        CheckpointError,
        "config.json cannot be used: it is not",
    ),
    "a list": (lambda f: (f / "config.json").write_text("[]"), CheckpointError, "not a JSON object but a list"),
    "no settings": (lambda f: (f / "config.json").unlink(), CheckpointError, "is neither a Hugging Face folder"),
    "narrower": (
        lambda f: _edit(f, intermediate_size=44),
        CheckpointError,
        r"gate_proj\.weight as \(40, 48\), and its config\.json asks for \(44, 48\)",
    ),
    "deeper": (
        lambda f: _edit(f, num_hidden_layers=3),
        CheckpointError,
        r"lacks model\.layers\.2\.inp.* \(9 such names\)",
    ),
    "bottomless": (
        lambda f: _edit(f, num_hidden_layers=10**7),
        CheckpointError,
        "tensors, and its config.json asks for",
    ),
    "missing": (lambda f: _edit_tensors(f, lambda t: t.pop(NORM)), CheckpointError, r"lacks model\.norm\.weight"),
    "superfluous": (
        lambda f: _edit_tensors(f, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(48)})),
        CheckpointError,
        r"holds model\.layers\.0\.self_attn\.q_proj\.bias .* without it",
    ),
    "type": (
        lambda f: _edit_tensors(f, lambda t: t.update({NORM: t[NORM].int()})),
        CheckpointError,
        "as I32, and only",
    ),
    "not finite": (
        lambda f: _edit_tensors(f, lambda t: t[NORM].fill_(float("nan"))),
        CheckpointError,
        r"NaN or an infinity in model\.norm",
    ),
    "no tokenizer": (
        lambda f: (f / "tokenizer.model").unlink(),
        CheckpointError,
        "is missing, and corpora are made with",
    ),
    "other tokenizer": (
        lambda f: (f / "tokenizer.model").write_bytes(b"nothing"),
        DataError,
        "is not a sentencepiece model",
    ),
    "index": (
        lambda f: (f / "model.safetensors.index.json").write_text(
            '{"metadata": {}, "weight_map": {"x": "../x.safetensors"}}'
        ),
        CheckpointError,
        "not the name of a weight file",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_input_is_one_sentence(
    fault: str, saved: Maker, imported: Callable[..., ConsolidatedModel], tmp_path: Path, capsys
) -> None:
    folder = saved("llama")
    damage, _, words = FAULTS[fault]
    damage(folder)
    with pytest.raises(SystemExit) as ended:
        run_command(partial(imported, folder, "dense"))  # type: ignore[arg-type]
    assert ended.value.code in (2, 3)
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    with pytest.raises(FAULTS[fault][1], match=words):
        imported(folder, "dense")
    assert not list(tmp_path.glob("starts/*"))


def _resize(folder: Path, rows: int) -> None:
    def resized(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if "embed" in name or "lm" in name]:
            tensors[name] = nn.functional.pad(tensors[name], (0, 0, 0, rows - len(tensors[name]))).contiguous()

    _edit_tensors(folder, resized)


def test_a_larger_tokenizer_is_refused_and_rows_to_spare_are_said(
    saved: Maker, imported: Callable[..., ConsolidatedModel], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saved("llama")
    _edit(folder, vocab_size=900)
    with pytest.raises(CheckpointError, match=r"model\.embed_tokens|lm_head"):
        imported(folder, "dense")
    _resize(folder, 900)
    assert imported(folder, "dense").config.vocabulary == 900
    assert "the embedding has 900 rows" in capsys.readouterr().out
    _edit(folder, vocab_size=100)
    _resize(folder, 100)
    with pytest.raises(CheckpointError, match=r"tokens, and the vocab_size of .* is 100"):
        imported(folder, "dense", "--overwrite")


@pytest.mark.parametrize(
    ("parametrization", "flags", "words"),
    [
        ("factored", (), "--parametrization factored needs the rank of its factors"),
        ("additive", (), "--parametrization additive needs the rank"),
        ("dense", ("--rank", 4), "a dense model has none"),
        ("factored", ("--rank", 0), "--rank is 0"),
        ("factored", ("--rank", 60), r"--rank is 60, and above .* cost more than its dense weight"),
    ],
)
def test_ranks_that_make_no_sense(
    parametrization: str,
    flags: tuple[object, ...],
    words: str,
    saved: Maker,
    imported: Callable[..., ConsolidatedModel],
) -> None:
    with pytest.raises(ConfigError, match=words):
        imported(saved("llama"), parametrization, *flags)


@pytest.mark.parametrize("flags", [("dense",), ("factored", "--rank", 4)])
def test_wrong_import_is_noticed_before_it_gets_its_name(
    saved: Maker, imported: Callable[..., ConsolidatedModel], monkeypatch, tmp_path: Path, flags: tuple[Any, ...]
) -> None:
    folder = saved("gpt2")

    def with_other_norms(*arguments: Any, **settings: Any) -> Any:
        source = open_source(*arguments, **settings)
        wrong: ModelConfig = source.config.model_copy(update={"norm_epsilon": 0.1})
        return type(source)(wrong, source.read, source.tokenizer)

    monkeypatch.setattr(import_huggingface, "open_source", with_other_norms)
    with pytest.raises(CheckpointError, match=r"the imported model does not compute what .* computes"):
        imported(folder, *flags)
    assert not list(tmp_path.glob("starts/*"))
