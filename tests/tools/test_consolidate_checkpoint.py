"""The command: what it takes, what it verifies, what it prints."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model.config import ModelConfig, factored_projections
from model.costs.arithmetic import total_parameters
from pretrain.convert.consolidated import ConsolidatedModel
from pretrain.errors import ConfigError
from tests.support.checkpoint_cases import flip_bit, hidden_names, save_model, tokenizer_file
from tests.support.reference import random_tensors
from tools.arguments import parse_bytes
from tools.consolidate_checkpoint import main

CONFIG = ModelConfig(layers=1, hidden=16, heads=2, ffn=24, sequence_length=8, vocabulary=100)
RANKS = {projection.name: 4 for projection in factored_projections(CONFIG)}


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run with checkpoints of steps 10 and 20."""
    tokenizer = tokenizer_file(tmp_path)
    for step in (10, 20):
        save_model(tmp_path / "run" / "checkpoints", CONFIG, RANKS, tokenizer, step)
    return tmp_path / "run"


def consolidate(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["consolidate_checkpoint.py", *map(str, arguments)])
    main()


def test_run_folder(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "merged"
    consolidate(monkeypatch, "--checkpoint", run_folder, "--output", output)
    model = ConsolidatedModel(output)
    assert model.facts["train"]["step"] == 20
    for name, tensor in random_tensors(CONFIG, RANKS, seed=3).items():
        assert torch.equal(model.read(name), tensor)
    printed = capsys.readouterr().out
    assert f"{total_parameters(CONFIG, RANKS):,} parameters" in printed
    assert f"densify_checkpoint.py --input {output}" in printed


@pytest.mark.faults
def test_the_newest_that_is_whole(run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flip_bit(run_folder / "checkpoints" / "step_000000020" / "shard_000_00000.safetensors", -1)
    consolidate(monkeypatch, "--checkpoint", run_folder / "checkpoints", "--output", tmp_path / "merged")
    assert ConsolidatedModel(tmp_path / "merged").facts["train"]["step"] == 10


def test_as_a_command(run_folder: Path, tmp_path: Path) -> None:
    """Damage ends it with one line and exit code 3, and without a folder; a repeated run wants --overwrite."""
    step = run_folder / "checkpoints" / "step_000000010"
    command = [sys.executable, "-m", "tools.consolidate_checkpoint", "--checkpoint", str(step)]
    command += ["--output", str(tmp_path / "merged"), "--max-shard-size", "10KB"]
    first = subprocess.run(command, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    assert "step 10 of" in first.stdout
    assert (tmp_path / "merged" / "model.safetensors.index.json").exists()
    flip_bit(step / "shard_000_00000.safetensors", -1)
    second = subprocess.run([*command, "--overwrite"], capture_output=True, text=True)
    assert second.returncode == 3
    assert second.stderr.startswith("error: ")
    assert "shard_000_00000.safetensors is damaged" in second.stderr
    assert second.stderr.count("\n") == 1
    assert ConsolidatedModel(tmp_path / "merged").facts["train"]["step"] == 10
    assert hidden_names(tmp_path) == []


@pytest.mark.parametrize(
    ("text", "size"), [("4GB", 4 * 10**9), ("1.5 mb", 1_500_000), ("2GiB", 2**31), ("77", 77), ("77B", 77)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "0GB", "-1GB", "4XB", "4GB4", "1e9"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a size: write"):
        parse_bytes(text)
