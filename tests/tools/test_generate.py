"""`tools/generate.py` on a small model of random numbers, consolidated and exported."""

import fcntl
import os
import pty
import shutil
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pretrain.convert.consolidated import ConsolidatedModel
from pretrain.convert.huggingface_export import write_dense_export
from pretrain.errors import CheckpointError, ConfigError
from pretrain.tokenizer.sentencepiece import END_OF_DOCUMENT
from tests.support.consolidated_folder import random_consolidated, small_tokenizer
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
    with pytest.raises(CheckpointError, match="is neither a consolidated folder"):
        run("--prompt", "def", model=".")


def test_damaged_weights_are_refused_in_a_sentence(run: Run, folder: Path) -> None:
    shutil.copytree(folder / "dense", folder / "damaged")
    (folder / "damaged" / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(CheckpointError, match=r"damaged cannot be loaded, export it again: Error while deserializing"):
        run("--prompt", "def", model="damaged")


def test_a_consolidated_folder_says_what_its_export_says(run: Run) -> None:
    # A few tokens: further on this random model says bytes that are no UTF-8, for which libraries show other signs.
    flags = ("--prompt", "def main", "--max-new-tokens", "6", "--greedy")
    assert run(*flags, model="merged") == run(*flags)


def test_without_prompt_and_terminal_it_says_so(run: Run) -> None:
    with pytest.raises(ConfigError, match="no terminal to ask for one"):
        run()


@pytest.mark.slow
def test_a_conversation(folder: Path) -> None:
    """A conversation in a real terminal: two prompts, one too long, Ctrl-C, Ctrl-D."""
    terminal, inside = pty.openpty()
    command = [sys.executable, "tools/generate.py", "--model", str(folder / "merged"), "--max-new-tokens", "8"]
    # A session of its own with the terminal as its own, so that Ctrl-C becomes a signal.
    process = subprocess.Popen(
        [*command, "--greedy"], stdin=inside, stdout=inside, stderr=subprocess.DEVNULL, start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(inside)
    heard = b""

    def hear(prompts: int) -> None:
        nonlocal heard
        while heard.count(b"> ") < prompts:
            heard += os.read(terminal, 4096)

    try:
        hear(1)
        for count, keys in enumerate((b"def main\n", b"the " * 40 + b"\n", b"\x03"), start=2):
            os.write(terminal, keys)
            hear(count)
        os.write(terminal, b"\x04")
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        os.close(terminal)
    assert b"error: the prompt has" in heard
