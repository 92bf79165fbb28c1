"""The report: its numbers are those of the model's arithmetic and of the files."""

import json
import sys
from pathlib import Path

import pytest

from model.config import ModelConfig, factored_projections
from model.costs.arithmetic import training_flops_per_token
from pretrain.checkpoint.reader import CheckpointReader
from pretrain.convert.consolidated import write_consolidated
from pretrain.errors import CheckpointError, ConfigError
from tests.support.checkpoint_cases import flip_bit, save_model, tokenizer_file
from tests.support.reference import random_tensors
from tools.inspect_checkpoint import main

CONFIG = ModelConfig(layers=2, hidden=16, heads=2, ffn=24, sequence_length=8, vocabulary=100)
RANKS = {projection.name: 4 + 2 * projection.layer for projection in factored_projections(CONFIG)}
DENSE = CONFIG.model_copy(update={"parametrization": "dense"})


def count(config: ModelConfig, ranks: dict[str, int]) -> int:
    return sum(tensor.numel() for tensor in random_tensors(config, ranks, seed=1).values())


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    return tokenizer_file(tmp_path)


@pytest.fixture
def folder(tmp_path: Path, tokenizer: Path) -> Path:
    return save_model(tmp_path / "run" / "checkpoints", CONFIG, RANKS, tokenizer, step=10)


def inspect(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    monkeypatch.setattr(sys, "argv", ["inspect_checkpoint.py", *map(str, arguments)])
    main()
    return capsys.readouterr().out


def test_checkpoint(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "facts.json"
    text = inspect(monkeypatch, capsys, "--checkpoint", tmp_path / "run", "--json", file, "--verify")
    report = json.loads(file.read_text())
    assert report["step"] == 10
    assert report["consumed_tokens"] == 10 * 8 * 16
    assert report["ranks"] == RANKS
    assert report["mean_rank"] == 5.0
    assert report["parameters"] == count(CONFIG, RANKS)
    assert report["dense_parameters"] == count(DENSE, {})
    assert report["flops_per_token"] == training_flops_per_token(CONFIG, RANKS)
    assert report["growth"][0]["after"] == RANKS
    assert (report["precision"], report["zero_stage"], report["tensor_size"]) == ("bf16", 1, 1)
    files = [path for path in folder.iterdir() if path.name != "manifest.json"]
    assert report["bytes"] == sum(path.stat().st_size for path in files)

    lines = text.splitlines()
    assert lines[0] == f"{folder}: step 10, 1,280 tokens"
    share = count(CONFIG, RANKS) / count(DENSE, {})
    assert f"parameters: {count(CONFIG, RANKS):,}, {share:.1%} of the dense model's {count(DENSE, {}):,}" in lines
    rows = [line.split() for line in lines]
    assert ["layer", "qkv", "proj", "fc1", "fc2"] in rows
    # in * out / (in + out): qkv 16 x 48, proj 16 x 16, fc1 16 x 48, fc2 24 x 16
    assert ["0", "4/12", "4/8", "4/12", "4/9"] in rows
    assert ["1", "6/12", "6/8", "6/12", "6/9"] in rows
    assert any("step         5: 8 layers, mean rank 2.5 -> 5.0, 0.25 s" in line for line in lines)
    assert lines[-1] == "all checksums are right"


def test_dense_model(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(tmp_path / "checkpoints", DENSE, {}, tokenizer)
    text = inspect(monkeypatch, capsys, "--checkpoint", tmp_path / "checkpoints")
    assert "100.0% of the dense model's" in text
    assert "growth" not in text
    assert "ranks" not in text


def test_half_factored_model(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = CONFIG.model_copy(update={"factored_layers": "mlp"})
    ranks = {projection.name: 5 for projection in factored_projections(config)}
    save_model(tmp_path / "checkpoints", config, ranks, tokenizer)
    text = inspect(monkeypatch, capsys, "--checkpoint", tmp_path / "checkpoints")
    assert ["1", "dense", "dense", "5/12", "5/9"] in [line.split() for line in text.splitlines()]


def test_consolidated_model(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_consolidated(CheckpointReader(folder), tmp_path / "merged", 10**9)
    text = inspect(monkeypatch, capsys, "--checkpoint", tmp_path / "merged")
    assert f"{tmp_path / 'merged'}: step 10, 1,280 tokens" in text
    assert f"parameters: {count(CONFIG, RANKS):,}" in text
    assert "shard files" not in text
    with pytest.raises(CheckpointError, match="leave out --verify"):
        inspect(monkeypatch, capsys, "--checkpoint", tmp_path / "merged", "--verify")


@pytest.mark.faults
def test_damage(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    flip_bit(folder / "shard_000_00000.safetensors", -1)
    inspect(monkeypatch, capsys, "--checkpoint", folder)
    with pytest.raises(CheckpointError, match="damaged"):
        inspect(monkeypatch, capsys, "--checkpoint", folder, "--verify")


def test_json_file_that_cannot_be_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match="give another --json"):
        inspect(monkeypatch, capsys, "--checkpoint", folder, "--json", tmp_path / "nowhere" / "facts.json")
