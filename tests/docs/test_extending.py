"""The worked example of docs/extending.md, in a copy of the source: it trains, and it grows."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.training_runs import make_corpus, write_config

ROOT = Path(__file__).resolve().parents[2]
STEPPING = {"policy": "stepping", "events": [], "check_every": 2, "start_step": 2, "stop_step": 10}


def blocks(language: str) -> list[str]:
    """The fenced blocks of the page in one language."""
    text = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def test_the_example_is_short() -> None:
    (module,), (change,) = blocks("python"), blocks("diff")
    assert len(module.splitlines()) + len(change.splitlines()) < 60


@pytest.mark.slow
def test_the_example_trains_and_grows(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name in ("configs", "model", "pretrain"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    (module,), (change,) = blocks("python"), blocks("diff")
    (source / "pretrain" / "policies" / "stepping.py").write_text(module)
    subprocess.run(["patch", "-p1", "--fuzz=0"], cwd=source, input=change, text=True, check=True)
    make_corpus(tmp_path / "corpus")
    config = write_config(tmp_path / "run.yaml", tmp_path / "corpus", tmp_path / "run", rank=STEPPING)
    environment = os.environ | {"PYTHONPATH": str(source)}
    command = [sys.executable, str(source / "pretrain" / "train.py"), "--config", str(config)]
    subprocess.run(command, cwd=source, env=environment, check=True)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["mean_rank"] > 4.0
    assert summary["augmentations"]
