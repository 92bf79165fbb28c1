"""What a run shows, read back from the files it leaves: TensorBoard, metrics, events, summary; across a resume too."""

import json
import math
import resource
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from model.costs.arithmetic import training_flops_per_token
from pretrain.config.run import parse_config
from pretrain.devices import peak_flops
from pretrain.monitor.monitor import Monitor, spectrum_scalars
from pretrain.monitor.summary import summarize
from pretrain.train_state import GrowthRecord, StepMetrics, TrainState, Validation

CONFIG = parse_config(
    {
        "data": {"prefix": "corpus", "tokenizer": "tokenizer.model"},
        "model": {"layers": 2, "hidden": 64, "heads": 4, "sequence_length": 32, "vocabulary": 100},
        "train": {"steps": 20, "micro_batch": 1, "global_batch": 4, "log_every": 5},
        "rank": {"initial": 8, "quantum": 8},
    }
)
RANKS = CONFIG.initial_ranks()
FIRST = next(iter(RANKS))


def metrics(step: int, lm_loss: float = 2.0, loss_scale: float | None = None) -> StepMetrics:
    return StepMetrics(
        lm_loss=lm_loss,
        grad_norm=1.0,
        learning_rate=1e-3,
        step_seconds=0.5,
        global_batch=4,
        consumed_samples=4 * step,
        consumed_tokens=128 * step,
        skipped_steps=0,
        loss_scale=loss_scale,
    )


def grown(step: int, seconds: float, logit_change: float | None = None) -> GrowthRecord:
    return GrowthRecord(step, 4 * step, {FIRST: 8}, {FIRST: 16}, seconds, logit_change)


def opened(folder: Path, ranks: Mapping[str, int] = RANKS, *, active: bool = True, **settings: Any) -> Monitor:
    return Monitor(folder, CONFIG, ranks, active=active, **settings)


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def flops(ranks: Mapping[str, int]) -> int:
    return training_flops_per_token(CONFIG.model, ranks)


def tensorboard(folder: Path, name: str = "tensorboard") -> EventAccumulator:
    events = EventAccumulator(str(folder / name), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    events.Reload()
    return events


def test_a_run_leaves_its_lines_tags_and_pictures(tmp_path, capsys):
    monitor = opened(tmp_path, processes=2)
    for step in range(1, 21):
        monitor.train_step(step, metrics(step, loss_scale=1024.0))
        if step == 10:
            monitor.validation(step, {"": Validation(2.5, bits_per_byte=1.25)})
            monitor.spectra(step, {name: np.array([2.0, 1.0, 1.0]) for name in RANKS})
            monitor.log_record("checkpoint", step, folder="checkpoints/step_000000010")
            monitor.growth(grown(step, seconds=0.25, logit_change=0.0125))
    monitor.close()

    lines = read_lines(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 5, 10, 15, 20]
    assert lines[-1] == {
        "step": 20,
        "lm_loss": 2.0,
        "grad_norm": 1.0,
        "learning_rate": 1e-3,
        "step_seconds": 0.5,
        "global_batch": 4,
        "consumed_samples": 80,
        "consumed_tokens": 2560,
        "skipped_steps": 0,
        "loss_scale": 1024.0,
        "tokens_per_second": 256.0,
        "mean_rank": 9.0,
        "training_flops": 40 * 32 * (flops(RANKS) + flops({**RANKS, FIRST: 16})),
        "training_seconds": 20 * 0.5 + 0.25,
    }

    events = tensorboard(tmp_path)
    scalars = set(events.Tags()["scalars"])
    assert scalars >= {
        "train/lm_loss", "train/grad_norm", "train/learning_rate", "train/skipped_steps", "train/consumed_tokens",
        "train/loss_scale", "train/global_batch", "validation/lm_loss", "validation/ppl", "validation/bits_per_byte",
        "throughput/tokens_per_second", "throughput/tflops_per_device", "throughput/dense_equivalent_speedup",
        "time/step_seconds", "time/growth_seconds", "memory/resident_bytes", "rank/mean",
        "rank/total_parameters", "rank/layer_00/qkv", "rank/layer_01/fc2", "spectrum/layer_01/fc2/spectral_norm",
        "spectrum/layer_01/fc2/stable_rank", "spectrum/layer_01/fc2/effective_rank",
    }  # fmt: skip
    assert "throughput/mfu" not in scalars  # no device that we know, and fp32
    assert set(events.Tags()["images"]) == {"rank/map", "spectrum/singular_values"}
    assert {"event/checkpoint/text_summary", "event/growth/text_summary"} <= set(events.Tags()["tensors"])
    assert [(event.step, event.value) for event in events.Scalars("event/growth")] == [(10, 2.0)]
    # Validations have a curve of their own, and there are too many checkpoints.
    assert not {"event/validation", "event/checkpoint"} & scalars
    spent = tensorboard(tmp_path / "tensorboard", "by_seconds")
    assert [event.step for event in spent.Scalars("by_seconds/train/lm_loss")] == [0, 2, 5, 8, 10]
    assert [event.step for event in spent.Scalars("by_seconds/validation/lm_loss")] == [5]
    spent = tensorboard(tmp_path / "tensorboard", "by_gflops")
    assert spent.Scalars("by_gflops/train/lm_loss")[-1].step == lines[-1]["training_flops"] // 10**9
    assert json.loads((tmp_path / "spectra.json").read_text())["singular_values"]["layer_00/qkv"] == [2.0, 1.0, 1.0]
    ranks = [(event.step, event.value) for event in events.Scalars("rank/layer_00/qkv")]
    before = [(0, 8.0), (1, 8.0), (5, 8.0), (10, 8.0)]
    assert ranks == [*before, (10, 16.0), (15, 16.0), (20, 16.0)]  # at every logged step: a staircase, no ramp
    assert events.Scalars("validation/ppl")[0].value == pytest.approx(math.exp(2.5), rel=1e-5)
    assert events.Scalars("throughput/dense_equivalent_speedup")[0].value > 1.0

    kinds = [(event["event"], event["step"]) for event in read_lines(tmp_path / "events.jsonl")]
    assert kinds == [("validation", 10), ("checkpoint", 10), ("growth", 10)]
    assert read_lines(tmp_path / "events.jsonl")[-1]["logit_change"] == 0.0125
    assert events.Scalars("growth/logit_change")[0].value == pytest.approx(0.0125)
    shown = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("step ") for line in shown) == 5
    assert "step 20/20  loss 2.0000  ppl 7.39  tokens/s 256  rank 9.0  left 0:00:00" in shown
    assert any(line.startswith("[growth] step 10  layers 1") for line in shown)


def test_a_resumed_run_shows_no_step_twice(tmp_path):
    killed = opened(tmp_path)
    for step in range(1, 16):
        killed.train_step(step, metrics(step, lm_loss=9.0 if step > 10 else 2.0))
    killed.growth(grown(13, seconds=0.5))
    killed.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "lm_lo')

    resumed = opened(tmp_path, state=TrainState(step=10))
    resumed.log_record("resume", 10)
    for step in range(11, 21):
        resumed.train_step(step, metrics(step, lm_loss=1.0))
    resumed.close()

    lines = read_lines(tmp_path / "metrics.jsonl")
    assert [(line["step"], line["lm_loss"]) for line in lines] == [(1, 2.0), (5, 2.0), (10, 2.0), (15, 1.0), (20, 1.0)]
    events = tensorboard(tmp_path)
    assert [(event.step, event.value) for event in events.Scalars("train/lm_loss")] == [
        (1, 2.0), (5, 2.0), (10, 2.0), (15, 1.0), (20, 1.0),
    ]  # fmt: skip
    assert events.Scalars("time/growth_seconds") == []  # that of step 13 was undone
    assert lines[-1]["training_flops"] == 80 * 32 * flops(RANKS)
    assert lines[-1]["training_seconds"] == 10.0
    spent = tensorboard(tmp_path / "tensorboard", "by_seconds")
    assert [event.step for event in spent.Scalars("by_seconds/train/lm_loss")] == [0, 2, 5, 8, 10]
    assert [event["event"] for event in read_lines(tmp_path / "events.jsonl")] == ["growth", "resume"]


def test_a_run_started_over_forgets_the_old_lines(tmp_path):
    for _ in range(2):
        monitor = opened(tmp_path)
        monitor.train_step(5, metrics(5))
        monitor.close()
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [5]


def test_the_rank_map_goes_back_to_the_start_of_a_resumed_run(tmp_path):
    state = TrainState(step=10, consumed_samples=40, growth=[grown(4, seconds=0.1)])
    monitor = opened(tmp_path, ranks={**RANKS, FIRST: 16}, state=state)
    assert monitor.rank_history == [(0, RANKS), (4, {**RANKS, FIRST: 16})]
    monitor.close()


def test_other_processes_write_and_say_nothing(tmp_path, capsys):
    folder = tmp_path / "run"
    monitor = opened(folder, active=False)
    monitor.train_step(5, metrics(5))
    monitor.validation(5, {"": Validation(2.0)})
    monitor.growth(grown(5, seconds=0.1))
    monitor.spectra(5, {FIRST: np.ones(8)})
    monitor.log_record("fault", 5)
    monitor.summary({})
    monitor.close()
    assert not folder.exists()
    assert capsys.readouterr().out == ""


def test_a_dense_run_has_no_ranks(tmp_path):
    monitor = opened(tmp_path, ranks={})
    monitor.train_step(5, metrics(5))
    monitor.close()
    assert not any(tag.startswith("rank/") for tag in tensorboard(tmp_path).Tags()["scalars"])
    assert read_lines(tmp_path / "metrics.jsonl")[0]["mean_rank"] is None


def test_a_loss_that_is_not_a_number_is_shown_as_such(tmp_path, capsys):
    monitor = opened(tmp_path)
    monitor.train_step(5, metrics(5, lm_loss=math.nan))
    monitor.close()
    assert read_lines(tmp_path / "metrics.jsonl")[0]["lm_loss"] is None
    assert "loss nan  ppl nan" in capsys.readouterr().out


def test_summary_is_shown_and_kept(tmp_path, capsys):
    state = TrainState(step=20, consumed_samples=80)
    facts = summarize(CONFIG, RANKS, state, lm_loss=2.0, validation=Validation(1.5), checkpoint=None)
    monitor = opened(tmp_path)
    monitor.summary(facts)
    monitor.close()
    assert json.loads((tmp_path / "summary.json").read_text()) == facts
    assert "validation loss 1.5000" in capsys.readouterr().out


def test_a_masked_run_shows_its_accuracy(tmp_path, capsys):
    masked = parse_config(CONFIG.model_dump() | {"train": CONFIG.train.model_dump() | {"objective": "mlm"}})
    monitor = Monitor(tmp_path, masked, RANKS, active=True)
    monitor.validation(5, {"": Validation(2.5, accuracy=0.25)})
    state, last = TrainState(step=20, consumed_samples=80), Validation(1.5, accuracy=0.5)
    monitor.summary(summarize(masked, RANKS, state, lm_loss=2.0, validation=last, checkpoint=tmp_path / "one"))
    monitor.close()
    events = tensorboard(tmp_path)
    assert events.Scalars("validation/accuracy")[0].value == 0.25
    assert "validation/bits_per_byte" not in events.Tags()["scalars"]
    shown = capsys.readouterr().out
    assert "validation loss 1.5000, pseudo-perplexity 4.48, 50.0 % of the hidden tokens found" in shown
    assert "consolidate_checkpoint.py" in shown
    assert "densify_checkpoint.py" not in shown


def test_a_folder_that_cannot_be_written_costs_one_warning(tmp_path, capsys):
    (tmp_path / "taken").touch()
    monitor = opened(tmp_path / "taken" / "run")
    for step in (5, 10):
        monitor.train_step(step, metrics(step))
        monitor.log_record("checkpoint", step)
    monitor.close()
    shown = capsys.readouterr().out
    assert shown.count("warning: ") == 1
    assert shown.count("loss 2.0000") == 2


# TensorBoard's own thread ends with the error that it hands to the monitor.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_disk_that_fills_up_costs_one_warning(tmp_path, capsys):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # a limit on the size of files, in place of a full disk
    try:
        monitor = opened(tmp_path)
        for step in range(5, 505, 5):
            monitor.train_step(step, metrics(step))
        monitor.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    shown = capsys.readouterr().out
    assert shown.count("warning: ") == 1
    assert shown.count("loss 2.0000") == 100
    assert 0 < len(read_lines(tmp_path / "metrics.jsonl")) < 100


def test_spectrum_scalars_by_hand():
    found = spectrum_scalars(np.array([2.0, 2.0, 0.0]))
    assert found == pytest.approx({"spectral_norm": 2.0, "stable_rank": 2.0, "effective_rank": 2.0})
    assert spectrum_scalars(np.zeros(3)) == {"spectral_norm": 0.0, "stable_rank": 0.0, "effective_rank": 0.0}


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_peaks_are_known_or_absent(name, peak):
    assert peak_flops(name) == peak
