"""Losses that are not finite or spike, and settings that cannot work."""

from pathlib import Path

import pytest

from pretrain.checkpoint.reader import CheckpointReader, find_checkpoint
from tests.support.fault_runs import Ended, events_of, steps_of, train

pytestmark = pytest.mark.faults

STEPS = 12
FIXED = ("rank.policy=fixed", "rank.schedule=[]")
"""Ranks that change make the losses before them no measure."""


@pytest.mark.parametrize(
    "stage",
    [
        0,
        pytest.param(1, marks=pytest.mark.slow),
        pytest.param(2, marks=pytest.mark.slow),
        pytest.param(3, marks=pytest.mark.slow),
    ],
)
def test_a_gradient_that_is_not_finite_on_one_process_is_skipped_by_all(config: Path, stage: int) -> None:
    run = config.parent / "run"
    ended = train(config, f"deepspeed.stage={stage}", faults="nan@step.loss:1:5")
    assert ended.codes == [0, 0]
    (skipped,) = events_of(run, "skipped")
    assert skipped["step"] == 6
    newest = find_checkpoint(run / "checkpoints")
    assert newest is not None
    reader = CheckpointReader(newest)
    assert reader.state["train"]["skipped_steps"] == 1
    assert all(reader.read(name).isfinite().all() for name in reader.layouts)


def test_skips_in_a_row_turn_the_run_back_and_leave_the_samples_out(config: Path) -> None:
    run = config.parent / "run"
    faults = ",".join(f"nan@step.loss:1:{step}" for step in (7, 8))
    ended = train(config, "guard.skips=2", faults=faults)
    assert ended.codes == [0, 0]
    (event,) = events_of(run, "rollback")
    assert event["step"] == 6
    assert event["left_out"] == [6 * 8, 9 * 8]
    newest = find_checkpoint(run / "checkpoints")
    assert newest is not None
    train_state = CheckpointReader(newest).state["train"]
    assert train_state["left_out"] == [[6 * 8, 9 * 8]]
    assert train_state["consumed_samples"] == 8 * (STEPS + 3)
    assert train_state["skipped_steps"] == 0


@pytest.mark.slow
def test_a_run_that_keeps_turning_back_gives_up(config: Path) -> None:
    faults = ",".join(f"nan@step.loss:{process}:{step}" for process in (0, 1) for step in (7, 8))
    ended = train(config, "guard.skips=1", "guard.rollbacks=1", faults=faults)
    assert ended.codes == [4, 4]
    (sentence,) = ended.said
    assert "not finite in 1 steps in a row" in sentence
    assert "guard.rollbacks, 1, are used up" in sentence
    assert steps_of(config.parent / "run") == [3, 6]


@pytest.mark.parametrize(
    "action", ["rollback", pytest.param("warn", marks=pytest.mark.slow), pytest.param("stop", marks=pytest.mark.slow)]
)
def test_a_loss_spike_is_seen(config: Path, action: str) -> None:
    run = config.parent / "run"
    spike = ",".join(f"spike@step.loss:{process}:10" for process in (0, 1))
    ended = train(
        config, "guard.spike_window=5", *FIXED, f"guard.on_spike={action}", "optimizer.learning_rate=1e-4", faults=spike
    )
    (event,) = events_of(run, "spike")
    assert event["step"] == 11
    assert event["deviations"] > 12.0
    assert ended.codes == ([4, 4] if action == "stop" else [0, 0])
    assert len(events_of(run, "rollback")) == (action == "rollback")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        pytest.param("model.hidden=64", "model.hidden is 32 there and 64 here", marks=pytest.mark.slow),
        ("run.seed=5", "run.seed"),
    ],
)
def test_what_a_resumed_run_may_not_change(config: Path, override: str, words: str) -> None:
    train(config, faults="kill@step.forward:0:4", processes=1)
    ended = train(config, override, processes=1)
    assert ended.codes[0] in (2, 3)
    assert words in ended.said[0]


def test_a_model_that_is_too_large_for_the_machine_is_refused(config: Path) -> None:
    dense = ("model.parametrization=dense", "rank.policy=fixed", "rank.schedule=[]")
    ended = train(config, "model.hidden=8192", "model.layers=200", "model.heads=64", *dense, processes=1)
    assert ended.codes == [2]
    assert "weights, gradients and optimizer of the first step take" in ended.said[0]
    assert not (config.parent / "run").exists()


@pytest.mark.parametrize(
    ("fault", "words"),
    [("kill", "is not ACTION@PLACE:PROCESS:STEP"), ("kill@nowhere:0:1", "there is no place 'nowhere'")],
)
def test_a_fault_that_is_none_is_refused(config: Path, fault: str, words: str) -> None:
    ended: Ended = train(config, processes=1, faults=fault)
    assert ended.codes == [2]
    assert words in ended.said[0]
