"""`tools/generate.py` on a small export of random numbers."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pretrain.consolidated import ConsolidatedModel
from pretrain.dense_export import write_dense_export
from pretrain.errors import CheckpointError, ConfigError
from pretrain.tokenizer import END_OF_DOCUMENT
from tests.consolidated_folder import random_consolidated, small_tokenizer
from tools import generate

Run = Callable[..., str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds `merged/` and its export `dense/`."""
    folder = tmp_path_factory.mktemp("generate")
    source = random_consolidated(folder / "merged", small_tokenizer(folder), "llama")
    (folder / "dense").mkdir()
    write_dense_export(ConsolidatedModel(source), folder / "dense", dtype=torch.float32, max_shard_bytes=10**9)
    return folder


@pytest.fixture
def run(folder: Path, monkeypatch, capsys) -> Run:
    """Runs the tool as its command line does, and gives what it prints."""

    def run(*flags: str, model: str = "dense") -> str:
        monkeypatch.setattr(sys, "argv", ["generate.py", "--model", str(folder / model), *flags])
        generate.main()
        return capsys.readouterr().out

    return run


def test_continues_the_prompt(run: Run) -> None:
    greedy = run("--prompt", "def main", "--max-new-tokens", "12", "--greedy")
    assert greedy.startswith("def main")
    assert len(greedy) > len("def main\n")
    assert run("--prompt", "def main", "--max-new-tokens", "12", "--top-k", "1", "--seed", "9") == greedy


def test_same_seed_same_text(run: Run) -> None:
    flags = ("--prompt", "the", "--max-new-tokens", "12")
    first = run(*flags, "--seed", "1")
    assert run(*flags, "--seed", "1") == first
    assert run(*flags, "--seed", "2") != first


def test_empty_prompt_starts_a_document(run: Run) -> None:
    assert END_OF_DOCUMENT.replace("\u2581", " ") not in run("--prompt", "", "--max-new-tokens", "12")


def test_refuses_in_a_sentence(run: Run) -> None:
    with pytest.raises(ConfigError, match="exceeds the 32 positions"):
        run("--prompt", "def", "--max-new-tokens", "32")
    with pytest.raises(ConfigError, match=r"--temperature 0\.0 is not above 0"):
        run("--prompt", "def", "--temperature", "0")
    with pytest.raises(ConfigError, match="--max-new-tokens 0 is below 1"):
        run("--prompt", "def", "--max-new-tokens", "0")
    with pytest.raises(CheckpointError, match="is no folder"):
        run("--prompt", "def", model="missing")
    with pytest.raises(CheckpointError, match="is no dense export"):
        run("--prompt", "def", model="merged")


def test_damaged_weights_are_refused_in_a_sentence(run: Run, folder: Path) -> None:
    shutil.copytree(folder / "dense", folder / "damaged")
    (folder / "damaged" / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(CheckpointError, match=r"damaged cannot be loaded, export it again: Error while deserializing"):
        run("--prompt", "def", model="damaged")
