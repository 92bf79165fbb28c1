"""Whole runs: precisions, schedules of batches, policies, and the end of a run that diverges."""

import json
from pathlib import Path
from typing import Any

import pytest

from model.config import factored_projections
from pretrain.checkpoint.reader import CheckpointReader
from pretrain.config.run import load_config
from pretrain.errors import NumericalError
from tests.support.distributed import run
from tests.support.training_runs import (
    curve,
    cut_back,
    events,
    train,
    train_and_count_tokenizers,
    train_and_lose_a_file,
    twenty_steps,
    write_config,
)


@pytest.mark.parametrize(
    ("stage", "family"), [(2, "gpt2"), *(pytest.param(stage, "llama", marks=pytest.mark.matrix) for stage in (1, 3))]
)
def test_bf16_follows_fp32(corpus: Path, tmp_path: Path, stage: int, family: str) -> None:
    sections = twenty_steps(family, "factored", "all")
    exact = curve(train(corpus, tmp_path / "fp32", 2, "parallel.tensor=2", **sections))
    overrides = ["parallel.tensor=2", "train.precision=bf16", f"deepspeed.stage={stage}"]
    rounded = curve(train(corpus, tmp_path / "bf16", 2, *overrides, **sections))
    for mine, other in zip(rounded, exact, strict=True):
        assert mine["lm_loss"] == pytest.approx(other["lm_loss"], rel=1e-2)


@pytest.mark.parametrize(
    ("stage", "family"), [(2, "llama"), *(pytest.param(stage, "gpt2", marks=pytest.mark.matrix) for stage in (1, 3))]
)
def test_fp16_skips_until_its_scale_fits_and_grows(corpus: Path, tmp_path: Path, stage: int, family: str) -> None:
    """Skipped steps are counted and leave Adam's step count alone; the loss scale survives both events and a resume."""
    file = tmp_path / "deepspeed.json"
    file.write_text(json.dumps({"fp16": {"initial_scale_power": 24, "hysteresis": 1}}))
    overrides = ["parallel.tensor=2", "train.precision=fp16", f"deepspeed.stage={stage}", f"deepspeed.config={file}"]
    sections = twenty_steps(family, "factored", "all") | {"checkpoint": {"every": 10}}
    folder = train(corpus, tmp_path / "run", 2, *overrides, **sections)
    lines = curve(folder)
    skipped = lines[-1]["skipped_steps"]
    assert 0 < skipped < 20
    assert lines[-1]["loss_scale"] == 2.0 ** (24 - skipped)
    assert lines[-1]["lm_loss"] < lines[0]["lm_loss"]
    assert CheckpointReader(folder / "checkpoints" / "step_000000020").state["optimizer"]["adam_step"] == 20 - skipped
    again = tmp_path / "again"
    cut_back(folder, again, 10)
    train(corpus, again, 2, *overrides, **sections)
    assert curve(again) == lines


def test_growth_asks_no_deepspeed_file_again(corpus: Path, tmp_path: Path) -> None:
    """It may move while the run goes on; the run's own record has what it said."""
    file, run_folder = tmp_path / "deepspeed.json", tmp_path / "run"
    file.write_text(json.dumps({"zero_optimization": {"reduce_bucket_size": 3000}}))
    config = write_config(tmp_path / "run.yaml", corpus, run_folder)
    run(train_and_lose_a_file, 2, str(config), [f"deepspeed.config={file}"], str(file))
    assert not file.exists()
    assert curve(run_folder)[-1]["mean_rank"] == 10
    kept = load_config(str(run_folder / "config.yaml")).deepspeed.config
    assert kept == {"zero_optimization": {"reduce_bucket_size": 3000}}
    assert (
        CheckpointReader(run_folder / "checkpoints" / "step_000000012").state["config"]["deepspeed"]["config"] == kept
    )


def test_a_run_opens_its_tokenizer_once(corpus: Path, tmp_path: Path) -> None:
    """And asks it once how long tokens are, in however many validations."""
    config = write_config(tmp_path / "run.yaml", corpus, tmp_path / "run")
    overrides = ["train.validate_every=2", "train.steps=6", "rank.policy=fixed", "rank.schedule=[]"]
    assert run(train_and_count_tokenizers, 1, str(config), overrides) == [(1, 1)]


def test_batch_ramp_consumes_what_it_says(corpus: Path, tmp_path: Path) -> None:
    ramp = {"train": {"batch_ramp": {"start": 4, "increment": 4, "steps": 6}, "global_batch": 12, "micro_batch": 2}}
    lines = curve(train(corpus, tmp_path / "run", 2, "schedule.shape=linear", **ramp))
    assert [line["global_batch"] for line in lines] == [4] * 3 + [8] * 3 + [12] * 6
    assert [line["consumed_samples"] for line in lines][-1] == 3 * 4 + 3 * 8 + 6 * 12


def test_explained_ratio_grows_by_its_spectra_and_reports_its_null(corpus: Path, tmp_path: Path) -> None:
    rank = {"policy": "explained_ratio", "initial": 8, "buffer": 4, "check_every": 3, "stop_step": 12, "schedule": []}
    folder = train(corpus, tmp_path / "run", 2, "parallel.tensor=2", rank=rank)
    assert [event["step"] for event in events(folder, "null")] == [0]
    assert curve(folder)[-1]["mean_rank"] > 8


MEASURED: dict[str, dict[str, Any]] = {
    "excess_explained_ratio": {"buffer": 2, "budget": 0.6},
    "gradient": {"probe": 4, "budget": 0.6, "budget_unit": "flops"},
}


@pytest.mark.parametrize(
    ("policy", "family", "parametrization"),
    [
        ("excess_explained_ratio", "llama", "factored"),
        pytest.param("excess_explained_ratio", "gpt2", "additive", marks=pytest.mark.matrix),
        pytest.param("gradient", "gpt2", "factored", marks=pytest.mark.matrix),
        ("gradient", "llama", "additive"),
    ],
)
def test_what_was_measured_decides_alike_on_every_layout(
    corpus: Path, tmp_path: Path, policy: str, family: str, parametrization: str
) -> None:
    """One process, tensor parallel, data parallel with accumulation: the same ranks, within the budget."""
    rank = {"policy": policy, "schedule": [], "check_every": 4, "stop_step": 12, **MEASURED[policy]}
    if parametrization == "additive":
        rank["budget_unit"] = "parameters"
    model = {"family": family, "parametrization": parametrization}
    sections = {"model": model, "rank": rank, "checkpoint": {"every": 12}}
    curves, states = [], []
    for number, (processes, overrides) in enumerate(
        [
            (1, ["deepspeed.stage=0"]),
            (2, ["parallel.tensor=2", "deepspeed.stage=1"]),
            (2, ["train.micro_batch=2", "deepspeed.stage=3"]),
        ]
    ):
        folder = train(corpus, tmp_path / f"run_{number}", processes, *overrides, **sections)
        curves.append(curve(folder))
        states.append(CheckpointReader(folder / "checkpoints" / "step_000000012").state)
        decisions = events(folder, "decision")
        assert [event["step"] for event in decisions] == [4, 8]
        assert all(event["flops"] > 0.0 for event in decisions)
    assert states[0]["growth"]
    for found, state in zip(curves[1:], states[1:], strict=True):
        assert state["ranks"] == states[0]["ranks"]
        for mine, other in zip(found, curves[0], strict=True):
            assert mine["lm_loss"] == pytest.approx(other["lm_loss"], rel=1e-5)
    config = load_config(str(tmp_path / "run_0.yaml"))
    layers = factored_projections(config.model)
    allowed = 0.6 * sum(layer.in_features * layer.out_features for layer in layers)
    summary = json.loads((tmp_path / "run_0" / "summary.json").read_text())
    if rank.get("budget_unit") == "flops":
        other_flops = summary["dense_training_flops"] - 12 * 8 * 32 * 6 * allowed / 0.6
        assert summary["training_flops"] - other_flops <= 12 * 8 * 32 * 6 * allowed
    else:
        ranks = states[0]["ranks"]
        assert sum(ranks[layer.name] * (layer.in_features + layer.out_features) for layer in layers) <= allowed


def test_divergence_is_one_sentence_and_saves_nothing(corpus: Path, tmp_path: Path) -> None:
    overrides = ["optimizer.learning_rate=1e30", "schedule.shape=constant", "checkpoint.every=1", "deepspeed.stage=1"]
    folder = tmp_path / "run"
    with pytest.raises(NumericalError, match="not finite"):
        train(corpus, folder, 2, *overrides)
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert events[-1]["event"] == "fault"
    assert "not finite" in events[-1]["error"]
    without = [*overrides, "deepspeed.stage=0", "checkpoint.every=0", "guard.skips=3"]
    with pytest.raises(NumericalError, match=r"not finite in 3 steps in a row.*; there is no checkpoint to go back to"):
        train(corpus, tmp_path / "other", 2, *without)
