"""Whole runs: exact resume, on the same parallel layout and on another one, and kills that cost nothing."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from pretrain.checkpoint.format import KEYS
from pretrain.checkpoint.reader import CheckpointReader, find_checkpoint
from pretrain.distributed import free_port
from tests.support.training_runs import (
    LAUNCHED,
    ROOT,
    curve,
    cut_back,
    train,
    write_config,
)

GRADIENT = {
    "rank.policy": "gradient",
    "rank.schedule": [],
    "rank.check_every": 4,
    "rank.stop_step": 12,
    "rank.probe": 4,
    "rank.budget": 0.9,
    "rank.truncate": 0.001,
}
"""Decides at steps 4 and 8, and measures in the three steps before each."""

RESUMES = [
    ({"parallel.tensor": 2, **GRADIENT}, "llama"),
    ({"deepspeed.stage": 2, "train.precision": "bf16", "model.parametrization": "additive", **GRADIENT}, "gpt2"),
    ({"deepspeed.stage": 3, "train.precision": "bf16", "deepspeed.offload_optimizer": True, **GRADIENT}, "gpt2"),
    *(
        pytest.param(settings, family, marks=pytest.mark.matrix)
        for settings, family in (
            ({"parallel.tensor": 1, "deepspeed.stage": 0}, "gpt2"),
            ({"parallel.tensor": 2, "deepspeed.stage": 1}, "llama"),
            ({"parallel.tensor": 1, "deepspeed.stage": 2, "train.precision": "bf16"}, "gpt2"),
            ({"parallel.tensor": 2, "train.precision": "bf16", "model.parametrization": "additive"}, "gpt2"),
        )
    ),
    *(
        pytest.param(
            {"deepspeed.stage": stage, "model.parametrization": "additive", "model.trained": "factors"},
            "llama",
            marks=pytest.mark.matrix,
        )
        for stage in (2, 3)
    ),
    *(
        pytest.param(
            {"deepspeed.stage": stage, "deepspeed.offload_optimizer": offload}, family, marks=pytest.mark.matrix
        )
        for stage, offload in ((1, True), (2, True), (3, False))
        for family in ("llama", "gpt2")
    ),
]


@pytest.mark.parametrize(("settings", "family"), RESUMES)
def test_resume_continues_bit_for_bit(corpus: Path, tmp_path: Path, settings: dict[str, Any], family: str) -> None:
    """From right before an event (4), right after it (5), several events before the end (2), and between (9); with
    policy gradient also from the midst of a measurement (2, 7) and from between it and the decision (4, 8)."""
    overrides = [f"{key}={value}" for key, value in settings.items()] + ["checkpoint.every=1"]
    sections = {"model": {"family": family, "hidden_dropout": 0.1, "attention_dropout": 0.1}}
    whole = train(corpus, tmp_path / "whole", 2, *overrides, **sections)
    expected = curve(whole)
    final = CheckpointReader(whole / "checkpoints" / "step_000000012")
    if settings.get("rank.policy") == "gradient":
        changes = [
            (event["before"][name], event["after"][name]) for event in final.state["growth"] for name in event["after"]
        ]
        assert any(after > before for before, after in changes)
        if settings.get("train.precision") != "bf16":  # the additive case, where nothing is small enough to cut
            assert any(after < before for before, after in changes)
        assert (whole / "checkpoints" / "step_000000007" / "probe.safetensors").exists()
    for step in (2, 4, 7, 8) if settings.get("rank.policy") == "gradient" else (2, 4, 5, 9):
        again = tmp_path / f"from_{step}"
        cut_back(whole, again, step)
        train(corpus, again, 2, *overrides, **sections)
        assert curve(again) == expected
        found = CheckpointReader(again / "checkpoints" / "step_000000012")
        assert found.state["ranks"] == final.state["ranks"]
        for name in final.layouts:
            for key in ("master",) if name in final.frozen else KEYS:
                assert torch.equal(found.read(name, key), final.read(name, key)), f"{key} of {name} from step {step}"


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (["parallel.tensor=2"], ["parallel.tensor=1", "deepspeed.stage=2"]),
        (["deepspeed.stage=3", "deepspeed.offload_optimizer=true"], ["parallel.tensor=2"]),
        pytest.param(["deepspeed.stage=2"], ["deepspeed.stage=3"], marks=pytest.mark.matrix),
    ],
)
def test_another_layout_takes_over(corpus: Path, tmp_path: Path, first: list[str], then: list[str]) -> None:
    """Two processes begin on one layout and go on on another: the same curve to rounding."""
    whole = train(corpus, tmp_path / "whole", 2, *first, "checkpoint.every=6")
    again = tmp_path / "again"
    cut_back(whole, again, 6)
    train(corpus, again, 2, *then)
    for mine, other in zip(curve(again), curve(whole), strict=True):
        assert mine["lm_loss"] == pytest.approx(other["lm_loss"], rel=1e-5)


def _launch(config: Path, *overrides: str) -> subprocess.Popen[str]:
    environment = os.environ | LAUNCHED
    command = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2", "--master_port", str(free_port())]
    command += [str(ROOT / "pretrain" / "train.py"), "--config", str(config), "parallel.tensor=2", *overrides]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def _workers(launcher: subprocess.Popen[str]) -> list[psutil.Process]:
    children = psutil.Process(launcher.pid).children(recursive=True)
    return [child for child in children if any("--local_rank" in word for word in child.cmdline())]


def _wait_for(condition: Any, launcher: subprocess.Popen[str], seconds: float = 240.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if launcher.poll() is not None or time.monotonic() > deadline:
            raise AssertionError(f"it never happened:\n{launcher.communicate(timeout=30)[0]}")
        time.sleep(0.001)


@pytest.mark.faults
@pytest.mark.slow
@pytest.mark.parametrize("moment", ["step", "save"])
def test_kill_minus_nine_costs_nothing_committed(corpus: Path, tmp_path: Path, moment: str) -> None:
    """One of two processes is killed in mid-run or in mid-save; started again, the run ends as if nothing had been."""
    sections = {"model": {"hidden": 256}, "train": {"steps": 10}, "checkpoint": {"every": 3}}
    whole = train(corpus, tmp_path / "whole", 2, "parallel.tensor=2", **sections)
    folder = tmp_path / "killed"
    config = write_config(tmp_path / "killed.yaml", corpus, folder, **sections)
    checkpoints = folder / "checkpoints"
    launcher = _launch(config)
    _wait_for(lambda: (checkpoints / "step_000000003" / "manifest.json").exists(), launcher)
    victim = _workers(launcher)[1]
    if moment == "save":
        _wait_for(lambda: any(checkpoints.glob(".staging_step_000000006*")), launcher)
    victim.send_signal(signal.SIGKILL)
    output, _ = launcher.communicate(timeout=120)
    assert launcher.returncode != 0, output
    newest = find_checkpoint(checkpoints)
    assert newest is not None
    assert newest.name in ("step_000000003", "step_000000006")
    if moment == "save":
        assert newest.name == "step_000000003"
    CheckpointReader(newest).verify()
    train(corpus, folder, 2, "parallel.tensor=2", **sections)
    assert curve(folder) == curve(whole)
