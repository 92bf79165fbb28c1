"""Sliding windows, and the loss of a model in every form it can have and on several layouts."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from model.process_groups import initialize_process_groups
from pretrain.checkpoint.reader import CheckpointReader, locate_checkpoint
from pretrain.convert.consolidated import ConsolidatedModel, write_consolidated
from pretrain.convert.huggingface_export import write_dense_export
from pretrain.errors import CheckpointError, ConfigError, DataError
from pretrain.evaluation import Evaluation, evaluate, find_model, windows
from pretrain.tokenizer.load import open_tokenizer
from tests.support.consolidated_folder import random_consolidated, small_tokenizer
from tests.support.distributed import run
from tests.support.training_runs import make_corpus, train_in_workers, write_config
from tools import evaluate as command


def evaluate_in_worker(path: str, tensor: int, stride: int) -> Evaluation:
    """Evaluates a text of 101 tokens by windows of the model's length."""
    initialize_process_groups(tensor)
    model = find_model(Path(path), tensor)
    tokenizer = open_tokenizer(model.tokenizer_path)
    stream = np.random.default_rng(5).integers(0, tokenizer.vocabulary, 101)
    return evaluate(
        model.load(), stream, tokenizer.byte_lengths(), length=model.positions, stride=stride, micro_batch=2
    )


@pytest.mark.parametrize(("predictions", "length", "stride"), [(9, 5, 3), (9, 5, 5), (9, 5, 1), (10, 5, 5), (3, 5, 2)])
def test_every_token_is_scored_once_and_sees_enough(predictions: int, length: int, stride: int) -> None:
    scored: list[int] = []
    for begin, first in windows(predictions, length, stride):
        end = begin + min(length, predictions)
        assert 0 <= begin < end <= predictions
        assert begin == 0 or first >= length - stride
        scored += range(begin + first, end)
    assert scored == list(range(predictions))


def test_the_same_loss_from_every_form_on_every_layout(tmp_path: Path) -> None:
    make_corpus(tmp_path / "corpus")
    config = write_config(tmp_path / "run.yaml", tmp_path / "corpus", tmp_path / "run")
    run(train_in_workers, 2, str(config), ["parallel.tensor=2"])
    write_consolidated(CheckpointReader(locate_checkpoint(tmp_path / "run")), tmp_path / "merged", 10**9)
    (tmp_path / "dense").mkdir()
    merged = ConsolidatedModel(tmp_path / "merged")
    write_dense_export(merged, tmp_path / "dense", dtype=torch.float32, max_shard_bytes=10**9)
    cases = [("run", 1, 1), ("run", 2, 1), ("run", 2, 2), ("merged", 2, 2), ("dense", 2, 1)]
    found = [
        evaluation
        for form, processes, tensor in cases
        for evaluation in run(evaluate_in_worker, processes, str(tmp_path / form), tensor, 7)
    ]
    assert found[0].tokens == 100
    assert found[0].length == 32
    for one in found[1:]:
        assert one.facts() == pytest.approx(found[0].facts(), rel=1e-5)
    (disjoint,) = run(evaluate_in_worker, 1, str(tmp_path / "run"), 1, 32)
    assert disjoint.tokens == 100
    assert disjoint.lm_loss != pytest.approx(found[0].lm_loss, rel=1e-5)  # less context


def test_documents_one_by_one(tmp_path: Path) -> None:
    """Every token is predicted once, just as if its document were the whole text."""
    merged = str(random_consolidated(tmp_path / "merged", small_tokenizer(tmp_path), "llama"))
    documents = [[5, 6, 7], [8] * 70, [9], [5, 8] * 20]
    end = open_tokenizer(tmp_path / "tokenizer.model").end_of_document
    stream = np.array([end] + [token for document in documents for token in (*document, end)])
    for processes in (1, 2):
        found = run(evaluate_stream, processes, merged, stream, end)[0]
        alone = [run(evaluate_stream, 1, merged, np.array([end, *one, end]), None)[0] for one in documents]
        assert found.tokens == len(stream) - 1 == sum(one.tokens for one in alone)
        assert found.bytes == sum(one.bytes for one in alone)
        assert found.lm_loss * found.tokens == pytest.approx(sum(one.lm_loss * one.tokens for one in alone), rel=1e-5)
        assert found.length == 32


def evaluate_stream(merged: str, stream: np.ndarray, end: int | None) -> Evaluation:
    model = find_model(Path(merged), 1)
    initialize_process_groups(1)
    lengths = open_tokenizer(model.tokenizer_path).byte_lengths()
    return evaluate(model.load(), stream, lengths, length=32, stride=8, micro_batch=3, end_of_document=end)


def test_what_cannot_be_evaluated_is_refused(tmp_path: Path) -> None:
    tokenizer = small_tokenizer(tmp_path)
    masked = random_consolidated(tmp_path / "masked", tokenizer, "llama", bidirectional=True)
    with pytest.raises(CheckpointError, match=r"train\.objective=mlm and predicts no next token"):
        find_model(masked, 1)
    with pytest.raises(ConfigError, match=r"parallel\.tensor 3 does not divide"):
        find_model(random_consolidated(tmp_path / "merged", tokenizer, "llama"), 3)
    with pytest.raises(CheckpointError, match="there is no checkpoint in"):
        find_model(tmp_path / "nothing", 1)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="holds no tokenizer"):
        find_model(tmp_path / "foreign", 1)
    with pytest.raises(ConfigError, match="is not split over processes"):
        find_model(tmp_path / "foreign", 2)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    merged = random_consolidated(tmp_path / "merged", small_tokenizer(tmp_path), "gpt2")
    (tmp_path / "held_out.txt").write_text("def main(): return the answer. " * 10)

    def call(*flags: str) -> str:
        monkeypatch.setattr(sys, "argv", ["evaluate.py", "--model", str(merged), *flags])
        command.main()
        return capsys.readouterr().out

    shown = call("--text", str(tmp_path / "held_out.txt"), "--stride", "8", "--json", str(tmp_path / "found.json"))
    assert "310 bytes" in shown  # as many as the text has
    assert "windows of 32, stride 8" in shown
    assert '"stride": 8' in (tmp_path / "found.json").read_text()
    assert "windows of 32" in call("--text", str(tmp_path / "held_out.txt"), "--within-documents")
    with pytest.raises(ConfigError, match="--stride 33 is above the 32 positions"):
        call("--text", str(tmp_path / "held_out.txt"), "--stride", "33")
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(DataError, match="holds no text"):
        call("--text", str(tmp_path / "empty.txt"))


def test_shares_are_those_of_a_run() -> None:
    assert command._share("98,2,0", "validation", 1000) == (980, 1000)
    assert command._share("0,0,100", "test", 7) == (0, 7)
    with pytest.raises(ConfigError, match="three shares"):
        command._share("98,x", "test", 7)
