"""Tokenizers of published models: ids and texts as their own library has them, from the corpus to the export."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer

from pretrain.convert.consolidated import ConsolidatedModel
from pretrain.errors import DataError
from pretrain.tokenizer.huggingface import HuggingFaceTokenizer
from pretrain.tokenizer.load import open_tokenizer
from tests.support.distributed import run
from tests.support.huggingface_files import END, byte_level, save, sentencepiece_like, texts
from tests.support.training_runs import train_in_workers, write_config
from tools import consolidate_checkpoint, densify_checkpoint, evaluate, generate, import_huggingface
from tools.corpus.documents import find_files
from tools.preprocess_corpus import preprocess

HARD = ["", " ", "  two\t\n\r\n", "Größe – 寸法 🙂\u2581", f"a{END}b", "</s><s><unk><0x41>", "\x00\x7f"]


def test_byte_level_text_comes_back(tmp_path: Path) -> None:
    tokenizer = open_tokenizer(byte_level(tmp_path))
    lengths = tokenizer.byte_lengths()
    for text in (*texts(), *HARD):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.comes_back(text, ids)
        assert tokenizer.end_of_document not in ids  # also where the text spells it
        assert lengths[ids].sum() == len(text.encode())
    assert lengths[tokenizer.end_of_document] == 0
    assert tokenizer.ordinary_tokens().sum() == tokenizer.vocabulary - 1
    assert tokenizer.mask is None


def test_ids_are_those_of_transformers(tmp_path: Path) -> None:
    path = byte_level(tmp_path, {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END})
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path), open_tokenizer(path)
    for text in texts():
        assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]
    assert ours.end_of_document == theirs.eos_token_id
    assert open_tokenizer(tmp_path).fingerprint == ours.fingerprint


def test_sentencepiece_like_text_comes_back(tmp_path: Path) -> None:
    """Text comes back as far as the format allows: Llama 2's tokenizer loses only a U+2581."""
    tokenizer = open_tokenizer(sentencepiece_like(tmp_path))
    lengths = tokenizer.byte_lengths()
    for text in (*texts(), "a b", "Größe 寸法 🙂"):
        ids = tokenizer.encode(text)
        assert tokenizer.comes_back(text, ids)
        assert lengths[ids].sum() == len(text.encode()) + 1  # the space in front
    assert not tokenizer.comes_back("\u2581", tokenizer.encode("\u2581"))
    assert tokenizer.end_of_document == 2


@pytest.mark.parametrize("named", [END, {"content": END, "special": True}])
def test_settings_name_the_end(tmp_path: Path, named: object) -> None:
    tokenizer = open_tokenizer(byte_level(tmp_path, {"eos_token": named, "mask_token": "<mask>"}, ("<a>", "<mask>")))
    assert (tokenizer.end_of_document, tokenizer.mask) == (0, 2)


def test_what_decides_is_in_the_fingerprint(tmp_path: Path) -> None:
    one = open_tokenizer(byte_level(tmp_path / "one", {"eos_token": END}, ("<a>",)))
    other_end = open_tokenizer(byte_level(tmp_path / "two", {"eos_token": "<a>"}, ("<a>",)))
    other_class = open_tokenizer(byte_level(tmp_path / "three", {"eos_token": END, "tokenizer_class": "X"}, ("<a>",)))
    assert one.fingerprint == other_class.fingerprint != other_end.fingerprint


def word_piece(folder: Path) -> Path:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(texts(), trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]"]))
    return save(tokenizer, folder, None)


def test_what_cannot_be_used_is_refused_in_a_sentence(tmp_path: Path) -> None:
    def message(path: Path) -> str:
        with pytest.raises(DataError) as raised:
            open_tokenizer(path)
        return str(raised.value)

    assert "cannot read the tokenizer" in message(tmp_path / "missing.json")
    assert "holds neither tokenizer.model nor tokenizer.json" in message(tmp_path)
    assert "neither a byte-level tokenizer" in message(word_piece(tmp_path / "words"))
    for name, content in {"no_json": b"{", "other": b"{}", "list": b"[1]", "binary": b"\xff\xfe"}.items():
        (tmp_path / f"{name}.json").write_bytes(content)
        assert "is not a Hugging Face tokenizer" in message(tmp_path / f"{name}.json")
    several = byte_level(tmp_path / "several", None, ("<a>",))
    assert "has 2 special tokens, and no eos_token in tokenizer_config.json beside it" in message(several)
    assert "names 'def' as eos_token" in message(byte_level(tmp_path / "wrong", {"eos_token": "def"}))
    settings = byte_level(tmp_path / "settings", {}).with_name("tokenizer_config.json")
    settings.write_text("[]")
    assert "is no JSON object but list" in message(settings.with_name("tokenizer.json"))
    settings.write_text("{")
    assert "is not JSON" in message(settings.with_name("tokenizer.json"))


def test_export_is_the_same_tokenizer_and_asks_for_no_code(tmp_path: Path) -> None:
    settings = {"eos_token": END, "tokenizer_class": "Foreign", "auto_map": {"AutoTokenizer": ["x.py", None]}}
    tokenizer = open_tokenizer(byte_level(tmp_path / "own", settings))
    (tmp_path / "out").mkdir()
    tokenizer.export(tmp_path / "out", 64)
    written = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert "auto_map" not in written
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs("def f(x):")["input_ids"] == tokenizer.encode("def f(x):")
    assert theirs.model_max_length == 64
    assert open_tokenizer(tmp_path / "out").fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize("make", [byte_level, sentencepiece_like])
def test_from_the_corpus_to_the_export_and_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], make: Any
) -> None:
    """One tokenizer goes through corpus, training, resume, consolidation, export, generation, evaluation and import."""

    def call(tool: Any, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [tool.__name__, *map(str, arguments)])
        tool.main()
        return capsys.readouterr().out

    own = make(tmp_path / "tokenizer")
    source = find_files(["stdlib"])[::60]
    facts = preprocess(source, tmp_path / "corpus", own.parent)
    assert facts.round_trip_exceptions == 0
    data = {"prefix": str(tmp_path / "corpus"), "tokenizer": str(own.parent)}
    config = write_config(tmp_path / "run.yaml", tmp_path, tmp_path / "run", data=data, train={"steps": 10})
    run(train_in_workers, 2, str(config), ["parallel.tensor=2", "train.steps=6", "rank.schedule=[{step: 4, rank: 6}]"])
    run(train_in_workers, 2, str(config), ["train.steps=10", "rank.schedule=[{step: 4, rank: 6}]"])
    call(consolidate_checkpoint, "--checkpoint", tmp_path / "run", "--output", tmp_path / "merged")
    tokenizer = open_tokenizer(own)
    merged = ConsolidatedModel(tmp_path / "merged")
    assert merged.tokenizer_path.name == "tokenizer.json"
    assert open_tokenizer(merged.tokenizer_path).fingerprint == tokenizer.fingerprint
    call(densify_checkpoint, "--input", tmp_path / "merged", "--output", tmp_path / "export")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "export")
    text = source[0].read_text(encoding="utf-8")[:500]
    assert theirs(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text)
    assert theirs.decode(tokenizer.encode(text)) == text
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert model.config.eos_token_id == tokenizer.end_of_document
    flags = ("--prompt", "def main", "--max-new-tokens", 3, "--greedy")
    said = call(generate, "--model", tmp_path / "merged", *flags)
    assert said.startswith("def main")
    assert said == call(generate, "--model", tmp_path / "export", *flags)
    losses = []
    for form in ("run", "merged", "export"):
        call(evaluate, "--model", tmp_path / form, "--text", source[0], "--json", tmp_path / f"{form}.json")
        losses.append(json.loads((tmp_path / f"{form}.json").read_text())["lm_loss"])
    np.testing.assert_allclose(losses, losses[0], rtol=1e-5)
    back = ("--parametrization", "dense", "--output", tmp_path / "imported")
    call(import_huggingface, "--input", tmp_path / "export", *back)
    imported = ConsolidatedModel(tmp_path / "imported")
    assert isinstance(open_tokenizer(imported.tokenizer_path), HuggingFaceTokenizer)
    assert imported.facts["tokenizer"]["fingerprint"] == tokenizer.fingerprint
    assert (
        "tokenizer: " + str(tmp_path / "imported" / "tokenizer.json")
        in (tmp_path / "imported" / "training.yaml").read_text()
    )
