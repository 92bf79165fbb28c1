"""The worked example of docs/extending.md, in a copy of the source: it is planned and decides, it trains and grows."""

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
STEPPING = {
    "policy": "stepping", "budget": 0.9, "schedule": [], "check_every": 2, "start_step": 2, "stop_step": 10,
}  # fmt: skip

DECISION = """
import json, sys
import numpy as np
from model.config import factored_projections
from pretrain.config.run import parse_config
from pretrain.errors import ConfigError
from pretrain.planning.rank_outlook import outlooks
from pretrain.policies.budget import affordable_parameters
from pretrain.policies.limits import decide_ranks
from pretrain.policies.policy import LayerMeasurement
from pretrain.policies.select import build_policy

def config_with(**rank):
    rank = {"policy": "stepping", "initial": 8, "quantum": 4, "check_every": 10, **rank}
    model = {"layers": 1, "hidden": 64, "heads": 4, "sequence_length": 32, "vocabulary": 100}
    data = {"prefix": "corpus", "tokenizer": "tokenizer.model"}
    return parse_config({"data": data, "model": model, "train": {"steps": 100, "global_batch": 8}, "rank": rank})

try:
    config_with()
except ConfigError as error:
    refused = str(error)
config = config_with(budget=0.5)
rank, (busy, *idle) = config.rank, factored_projections(config.model)
layers = [LayerMeasurement(busy, 8, np.ones(8), np.ones(16))]
layers += [LayerMeasurement(projection, 8, np.ones(8), np.zeros(16)) for projection in idle]
policy = build_policy(rank, config.train.steps)
affordable = affordable_parameters(rank, [busy, *idle], config.initial_ranks(), [], 80, 800)
json.dump({
    "refused": refused,
    "threshold": rank.threshold,
    "due": [step for step in range(100) if policy.due(step)],
    "grown": list(decide_ranks(policy, rank, 10, layers, affordable).values()),
    "outlook": [one.name for one in outlooks(config)],
}, sys.stdout)
"""


def blocks(language: str) -> list[str]:
    """The fenced blocks of the page in one language."""
    text = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of the source with the example's three edits."""
    copy = tmp_path / "source"
    for name in ("configs", "model", "pretrain"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    (module,), (change,) = blocks("python"), blocks("diff")
    (copy / "pretrain" / "policies" / "stepping.py").write_text(module)
    subprocess.run(["patch", "-p1", "--fuzz=0"], cwd=copy, input=change, text=True, check=True)
    return copy


def test_the_example_is_short() -> None:
    (module,), (change,) = blocks("python"), blocks("diff")
    assert len(module.splitlines()) + len(change.splitlines()) < 60


def test_the_example_takes_the_edits_it_names(source: Path) -> None:
    (change,) = blocks("diff")
    assert re.findall(r"^\+\+\+ b/(.*)$", change, flags=re.MULTILINE) == [
        "pretrain/policies/policy.py",
        "pretrain/policies/select.py",
    ]
    command, environment = [sys.executable, "-c", DECISION], os.environ | {"PYTHONPATH": str(source)}
    ended = subprocess.run(command, cwd=source, env=environment, check=True, capture_output=True, text=True)
    found = json.loads(ended.stdout.splitlines()[-1])
    assert "rank.policy=stepping grows up to a budget, and there is none: set rank.budget" in found["refused"]
    assert found["threshold"] == 0.95
    assert found["due"] == [10, 20]
    assert found["grown"] == [12]
    assert found["outlook"] == ["start", "budget", "dense"]


@pytest.mark.slow
def test_the_example_trains_and_grows(source: Path, tmp_path: Path) -> None:
    make_corpus(tmp_path / "corpus")
    config = write_config(tmp_path / "run.yaml", tmp_path / "corpus", tmp_path / "run", rank=STEPPING)
    environment = os.environ | {"PYTHONPATH": str(source)}
    command = [sys.executable, str(source / "pretrain" / "train.py"), "--config", str(config)]
    subprocess.run(command, cwd=source, env=environment, check=True)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["mean_rank"] > 4.0
    assert summary["growth"]
