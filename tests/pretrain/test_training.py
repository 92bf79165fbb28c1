"""Whole runs: the same curve on every layout, exact resume, and kills that cost nothing."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from model.config import factored_projections
from pretrain.checkpoint.format import KEYS
from pretrain.checkpoint.reader import CheckpointReader, find_checkpoint
from pretrain.config.run import load_config
from pretrain.distributed import free_port
from pretrain.errors import CheckpointError, ConfigError, DataError, EspalierError, NumericalError
from tests.support.distributed import run
from tests.support.training_runs import (
    curve,
    releasing,
    train_and_count_tokenizers,
    train_and_lose_a_file,
    train_in_workers,
    write_config,
)

ROOT = Path(__file__).resolve().parents[2]
ON_CPU = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def _train(corpus: Path, folder: Path, processes: int, *overrides: str, **sections: dict[str, Any]) -> Path:
    config = write_config(folder.with_suffix(".yaml"), corpus, folder, **sections)
    if "deepspeed.stage=3" in overrides:
        overrides += (f"deepspeed.config={releasing(folder.with_suffix('.json'))}",)
    run(train_in_workers, processes, str(config), list(overrides))
    return folder


# The same curve on every layout ---------------------------------------------------------------------------------------

LAYOUTS = [(2, 2, 0, False), (2, 2, 2, True), (4, 4, 1, False), (2, 1, 1, False), (4, 2, 3, False)]
"""Processes, tensor-parallel size, ZeRO stage, optimizer offloaded."""
ALL_LAYOUTS = [
    *LAYOUTS,
    *(
        (data * tensor, tensor, stage, offload)
        for data in (1, 2)
        for tensor in (1, 2, 4)
        for stage in (0, 1, 2, 3)
        for offload in (False, True)
        if data * tensor <= 4 and (stage or not offload) and (data * tensor, tensor, stage, offload) not in LAYOUTS
    ),
]
VARIANTS = [("llama", "factored", "all"), ("gpt2", "factored", "mlp")]
ALL_VARIANTS = [
    (family, parametrization, factored_layers)
    for family in ("llama", "gpt2")
    for parametrization, factored_layers in (
        ("factored", "all"),
        ("factored", "mlp"),
        ("additive", "all"),
        ("additive", "mlp"),
        ("dense", "all"),
    )
]
CURVES = [
    *((VARIANTS[0], layout) for layout in LAYOUTS),
    (VARIANTS[1], LAYOUTS[2]),
    (("llama", "additive", "all"), (4, 2, 2, False)),
    (("gpt2", "additive", "all"), (2, 1, 3, True)),
]
ALL_CURVES = [
    *CURVES,
    *(
        pytest.param(variant, layout, marks=pytest.mark.matrix)
        for variant in ALL_VARIANTS
        for layout in ALL_LAYOUTS
        if (variant, layout) not in CURVES
    ),
]
"""Variant and layout; by default a sample that spans both."""


@pytest.fixture(scope="module")
def alone(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Curves of one process and ZeRO 1, by variant."""
    curves: dict[tuple[str, str, str], list[dict[str, Any]]] = {}

    def of(family: str, parametrization: str, factored_layers: str) -> list[dict[str, Any]]:
        key = (family, parametrization, factored_layers)
        if key not in curves:
            folder = tmp_path_factory.mktemp("alone") / "run"
            curves[key] = curve(_train(corpus, folder, 1, **_twenty_steps(*key)))
        return curves[key]

    return of


def _twenty_steps(family: str, parametrization: str, factored_layers: str) -> dict[str, dict[str, Any]]:
    sections: dict[str, dict[str, Any]] = {
        "model": {"family": family, "parametrization": parametrization, "factored_layers": factored_layers},
        "train": {"steps": 20},
        "optimizer": {"learning_rate": 1e-3},
    }
    if parametrization == "dense":
        sections["rank"] = {"policy": "fixed", "schedule": []}
    return sections


@pytest.mark.parametrize(("variant", "layout"), ALL_CURVES)
def test_every_layout_gives_the_same_curve(
    corpus: Path, tmp_path: Path, alone: Any, variant: tuple[str, str, str], layout: tuple[int, int, int, bool]
) -> None:
    """Losses and gradient norms of 20 steps with two growth events."""
    processes, tensor, stage, offload = layout
    sections = _twenty_steps(*variant)
    overrides = [f"parallel.tensor={tensor}", f"deepspeed.stage={stage}", f"deepspeed.offload_optimizer={offload}"]
    found = curve(_train(corpus, tmp_path / "run", processes, *overrides, **sections))
    expected = alone(*variant)
    assert [line["step"] for line in found] == list(range(1, 21))
    for mine, other in zip(found, expected, strict=True):
        assert mine["mean_rank"] == other["mean_rank"]
        assert mine["lm_loss"] == pytest.approx(other["lm_loss"], rel=1e-5)
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)


# Precision, schedules, policies ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "family"), [(2, "gpt2"), *(pytest.param(stage, "llama", marks=pytest.mark.matrix) for stage in (1, 3))]
)
def test_bf16_follows_fp32(corpus: Path, tmp_path: Path, stage: int, family: str) -> None:
    sections = _twenty_steps(family, "factored", "all")
    exact = curve(_train(corpus, tmp_path / "fp32", 2, "parallel.tensor=2", **sections))
    overrides = ["parallel.tensor=2", "train.precision=bf16", f"deepspeed.stage={stage}"]
    rounded = curve(_train(corpus, tmp_path / "bf16", 2, *overrides, **sections))
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
    sections = _twenty_steps(family, "factored", "all") | {"checkpoint": {"every": 10}}
    folder = _train(corpus, tmp_path / "run", 2, *overrides, **sections)
    lines = curve(folder)
    skipped = lines[-1]["skipped_steps"]
    assert 0 < skipped < 20
    assert lines[-1]["loss_scale"] == 2.0 ** (24 - skipped)
    assert lines[-1]["lm_loss"] < lines[0]["lm_loss"]
    assert CheckpointReader(folder / "checkpoints" / "step_000000020").state["optimizer"]["adam_step"] == 20 - skipped
    again = tmp_path / "again"
    _cut_back(folder, again, 10)
    _train(corpus, again, 2, *overrides, **sections)
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
    lines = curve(_train(corpus, tmp_path / "run", 2, "schedule.shape=linear", **ramp))
    assert [line["global_batch"] for line in lines] == [4] * 3 + [8] * 3 + [12] * 6
    assert [line["consumed_samples"] for line in lines][-1] == 3 * 4 + 3 * 8 + 6 * 12


def test_explained_ratio_grows_by_its_spectra_and_reports_its_null(corpus: Path, tmp_path: Path) -> None:
    rank = {"policy": "explained_ratio", "initial": 8, "buffer": 4, "check_every": 3, "stop_step": 12, "schedule": []}
    folder = _train(corpus, tmp_path / "run", 2, "parallel.tensor=2", rank=rank)
    assert [event["step"] for event in _events(folder, "null")] == [0]
    assert curve(folder)[-1]["mean_rank"] > 8


def _events(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (folder / "events.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == kind]


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
        folder = _train(corpus, tmp_path / f"run_{number}", processes, *overrides, **sections)
        curves.append(curve(folder))
        states.append(CheckpointReader(folder / "checkpoints" / "step_000000012").state)
        decisions = _events(folder, "decision")
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
        _train(corpus, folder, 2, *overrides)
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert events[-1]["event"] == "fault"
    assert "not finite" in events[-1]["error"]
    without = [*overrides, "deepspeed.stage=0", "checkpoint.every=0", "guard.skips=3"]
    with pytest.raises(NumericalError, match=r"not finite in 3 steps in a row.*; there is no checkpoint to go back to"):
        _train(corpus, tmp_path / "other", 2, *without)


# Resume ---------------------------------------------------------------------------------------------------------------


def _cut_back(folder: Path, copy: Path, step: int) -> None:
    """What a kill after the checkpoint of `step` leaves: nothing later, `latest` pointing at what is gone."""
    shutil.copytree(folder, copy)
    for checkpoint in (copy / "checkpoints").glob("step_*"):
        if int(checkpoint.name.removeprefix("step_")) > step:
            shutil.rmtree(checkpoint)


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
    whole = _train(corpus, tmp_path / "whole", 2, *overrides, **sections)
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
        _cut_back(whole, again, step)
        _train(corpus, again, 2, *overrides, **sections)
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
    whole = _train(corpus, tmp_path / "whole", 2, *first, "checkpoint.every=6")
    again = tmp_path / "again"
    _cut_back(whole, again, 6)
    _train(corpus, again, 2, *then)
    for mine, other in zip(curve(again), curve(whole), strict=True):
        assert mine["lm_loss"] == pytest.approx(other["lm_loss"], rel=1e-5)


# Kills ----------------------------------------------------------------------------------------------------------------


def _launch(config: Path, *overrides: str) -> subprocess.Popen[str]:
    environment = {**os.environ, **ON_CPU, "PYTHONPATH": str(ROOT)}
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
    whole = _train(corpus, tmp_path / "whole", 2, "parallel.tensor=2", **sections)
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
    _train(corpus, folder, 2, "parallel.tensor=2", **sections)
    assert curve(folder) == curve(whole)


# Bad input ------------------------------------------------------------------------------------------------------------


def _refused(kind: type[EspalierError], corpus: Path, folder: Path, *overrides: str, **sections: dict[str, Any]) -> str:
    with pytest.raises(kind) as caught:
        _train(corpus, folder, 2, *overrides, **sections)
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
    folder = _train(corpus, tmp_path / "run", 2, "checkpoint.every=6")
    message = _refused(ConfigError, corpus, folder, "train.steps=14", model={"hidden": 64})
    assert "model.hidden is 32 there and 64 here" in message
    for manifest in (folder / "checkpoints").glob("*/manifest.json"):
        manifest.unlink()
    assert "manifest" in _refused(CheckpointError, corpus, folder, "train.steps=14")


def test_resume_needs_the_same_samples(corpus: Path, tmp_path: Path) -> None:
    folder = _train(corpus, tmp_path / "run", 2, "checkpoint.every=6")
    assert "run.seed 1234" in _refused(CheckpointError, corpus, folder, "train.steps=14", "run.seed=7")
    assert "data.split" in _refused(CheckpointError, corpus, folder, "train.steps=14", "data.split='20,80,0'")
    _train(corpus, folder, 2, "train.steps=14", "train.global_batch=4", "train.micro_batch=2")  # another batch is fine
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
    environment = {**os.environ, **ON_CPU, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 2
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert "train.stepz" in errors[0]
    assert "train.steps" in errors[0]
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()
