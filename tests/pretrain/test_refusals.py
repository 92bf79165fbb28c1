"""What a run cannot begin or go on with is refused in one sentence, and nothing is written."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pretrain.errors import CheckpointError, ConfigError, DataError, EspalierError
from tests.support.training_runs import (
    LAUNCHED,
    ROOT,
    curve,
    train,
    write_config,
)


def _refused(kind: type[EspalierError], corpus: Path, folder: Path, *overrides: str, **sections: dict[str, Any]) -> str:
    with pytest.raises(kind) as caught:
        train(corpus, folder, 2, *overrides, **sections)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_foreign_folder_is_refused_and_left_alone(corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "chapter.txt").write_text("mine")
    assert "run.folder" in _refused(ConfigError, corpus, folder)
    assert [path.name for path in folder.iterdir()] == ["chapter.txt"]


def test_processes_and_heads_must_divide(corpus: Path, tmp_path: Path) -> None:
    assert "2 processes" in _refused(ConfigError, corpus, tmp_path / "a", "parallel.tensor=4")
    assert "heads" in _refused(ConfigError, corpus, tmp_path / "b", "parallel.tensor=2", model={"heads": 1})
    assert "global_batch" in _refused(ConfigError, corpus, tmp_path / "c", "train.global_batch=9")
    assert not any((tmp_path / name).exists() for name in "abc")


def test_missing_and_truncated_data_are_named(corpus: Path, tmp_path: Path) -> None:
    assert "nowhere" in _refused(DataError, corpus, tmp_path / "a", "data.prefix=/nowhere/corpus")
    assert "nowhere" in _refused(DataError, corpus, tmp_path / "b", "data.tokenizer=/nowhere/tokenizer.model")
    for suffix in (".bin", ".idx"):
        copy = tmp_path / f"cut{suffix}"
        shutil.copytree(corpus, copy)
        damaged = copy / f"corpus{suffix}"
        damaged.write_bytes(damaged.read_bytes()[:-3])
        assert f"corpus{suffix}" in _refused(DataError, corpus, tmp_path / "c", f"data.prefix={copy / 'corpus'}")
    assert "model.vocabulary" in _refused(ConfigError, corpus, tmp_path / "d", "model.vocabulary=300")


def test_resume_needs_the_same_model_and_a_whole_checkpoint(corpus: Path, tmp_path: Path) -> None:
    folder = train(corpus, tmp_path / "run", 2, "checkpoint.every=6")
    message = _refused(ConfigError, corpus, folder, "train.steps=14", model={"hidden": 64})
    assert "model.hidden is 32 there and 64 here" in message
    for manifest in (folder / "checkpoints").glob("*/manifest.json"):
        manifest.unlink()
    assert "manifest" in _refused(CheckpointError, corpus, folder, "train.steps=14")


def test_resume_needs_the_same_samples(corpus: Path, tmp_path: Path) -> None:
    folder = train(corpus, tmp_path / "run", 2, "checkpoint.every=6")
    assert "run.seed 1234" in _refused(CheckpointError, corpus, folder, "train.steps=14", "run.seed=7")
    assert "data.split" in _refused(CheckpointError, corpus, folder, "train.steps=14", "data.split='20,80,0'")
    train(corpus, folder, 2, "train.steps=14", "train.global_batch=4", "train.micro_batch=2")  # another batch is fine
    assert curve(folder)[-1]["consumed_samples"] == 12 * 8 + 2 * 4


@pytest.mark.parametrize(("size", "kind"), [("2m", CheckpointError), ("64k", DataError)])
def test_full_disk_ends_the_run_with_one_sentence(
    corpus: Path, tmp_path: Path, size: str, kind: type[EspalierError]
) -> None:
    """A real file system too small for the checkpoint, or for the order of the samples, where we may mount one."""
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(small)], check=False).returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        message = _refused(kind, corpus, small / "run", model={"hidden": 128})
        assert "space" in message.lower()
        assert not list((small / "run" / "checkpoints").glob("step_*"))
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_users_mistake_is_one_line_and_an_exit_code(corpus: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.yaml", corpus, tmp_path / "run")
    command = [sys.executable, str(ROOT / "pretrain" / "train.py"), "--config", str(config), "train.stepz=3"]
    environment = os.environ | LAUNCHED
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 2
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert "train.stepz" in errors[0]
    assert "train.steps" in errors[0]
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()
