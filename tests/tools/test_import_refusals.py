"""What cannot be imported is one sentence, and leaves nothing behind."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model.config import ModelConfig
from pretrain.convert.consolidated import ConsolidatedModel
from pretrain.convert.huggingface_import import open_source
from pretrain.errors import CheckpointError, ConfigError, DataError, EspalierError, run_command
from tests.support.huggingface_models import Maker
from tools import import_huggingface


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
    capsys.readouterr()  # the bar that transformers shows when it saves
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
