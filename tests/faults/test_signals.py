"""Signals, second runs, and processes that stop or leave: one sentence, a code, and the last commit."""

import signal
import time
from pathlib import Path

import pytest

from tests.support.fault_runs import Started, assert_same_end, events_of, steps_of, train

pytestmark = pytest.mark.faults

HANG_SECONDS = 4.0


SIGNALS = [
    ("term", "step.forward", 143, 8),
    ("usr1", "save.shard", 138, 7),
    ("term", "save.shard", 143, 7),
    ("usr1", "event.changed", 138, 9),
    ("term", "event.changed", 143, 9),
]


@pytest.mark.parametrize(
    ("action", "place", "code", "saved"),
    [pytest.param(*one, marks=() if number == 0 else pytest.mark.slow) for number, one in enumerate(SIGNALS)],
)
def test_a_signal_to_one_process_saves_and_ends_all(
    config: Path, undisturbed: Path, action: str, place: str, code: int, saved: int
) -> None:
    """The signal comes in the second of two micro-steps, in a save, and in an event."""
    run = config.parent / "run"
    step = {"step.forward": 7, "save.shard": 6, "event.changed": 8}[place]
    ended = train(config, faults=f"{action}@{place}:1:{step}")
    assert ended.codes == [code, code]
    assert ended.said == [f"error: SIG{action.upper()}: saved at step {saved}; start the run again to go on"]
    assert steps_of(run)[-1] == saved
    assert events_of(run, "stopped")[0]["step"] == saved
    assert train(config).codes == [0, 0]
    assert_same_end(run, undisturbed)


def test_a_second_sigterm_ends_at_once(config: Path) -> None:
    started = Started(config, ("guard.hang_seconds=0",), 2, "stop@step.forward:1:7", config.parent / "outputs")
    started.wait_for("step 7/12")
    started.signal(0, signal.SIGTERM)  # waits for a process that does not go on
    started.signal(0, signal.SIGTERM)  # as a launcher does at once
    time.sleep(4.0)
    assert started.processes[0].is_alive()
    started.signal(0, signal.SIGTERM)
    started.processes[0].join(10.0)
    assert started.processes[0].exitcode == 143
    started.end(0.0)


def test_a_second_run_is_kept_out(config: Path) -> None:
    first = Started(config, ("train.steps=400",), 1, "", config.parent / "first")
    first.wait_for("step 1/400")
    second = train(config, processes=1)
    assert second.codes == [2]
    (sentence,) = second.said
    assert f"is in use by process {first.processes[0].pid} on " in sentence
    first.signal(0, signal.SIGKILL)
    first.end()
    assert train(config, processes=1).codes == [0]  # a killed run leaves no lock


def test_a_process_that_stops_answering_is_named(config: Path, undisturbed: Path) -> None:
    started = Started(config, (f"guard.hang_seconds={HANG_SECONDS}",), 2, "stop@step.forward:1:7", config.parent / "o")
    started.processes[0].join(40.0)
    ended = started.end(0.0)
    assert ended.codes == [5, None]
    (sentence,) = ended.said
    assert "process 1 on " in sentence
    assert "stopped answering at " in sentence
    assert f"guard.hang_seconds is {HANG_SECONDS:g}" in sentence
    assert "most recent call first" in ended.stderr[0]
    assert train(config).codes == [0, 0]
    assert_same_end(config.parent / "run", undisturbed)


@pytest.mark.slow
def test_a_process_that_falls_behind_is_named(config: Path) -> None:
    """It lives, and sleeps for longer than it may."""
    ended = Started(config, ("guard.hang_seconds=1.5",), 2, "slow@step.forward:0:7", config.parent / "o").end(40.0)
    assert ended.codes == [5, 5]
    (sentence,) = ended.said
    assert "process 0 on " in sentence
    assert "hangs at step.forward of step 7, behind the others" in sentence


def test_a_background_write_that_stands_still_ends_the_run(config: Path, undisturbed: Path) -> None:
    """As on shared storage that is gone: the save after it waits for no longer than `guard.hang_seconds`."""
    run = config.parent / "run"
    settings = ("checkpoint.background=true", "checkpoint.every=1", f"guard.hang_seconds={HANG_SECONDS}")
    ended = Started(config, settings, 2, ",".join(3 * ["slow@save.shard:*:6"]), config.parent / "o").end(40.0)
    assert ended.codes == [5, 5]
    assert all(f"guard.hang_seconds is {HANG_SECONDS:g}" in sentence for sentence in ended.said)
    assert "has been at save.waiting of step " in "".join(ended.said)
    assert steps_of(run)[-1] == 5
    assert train(config).codes == [0, 0]
    assert_same_end(run, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("action", ["raise", "exit"])
def test_nobody_waits_for_a_process_that_has_left(config: Path, action: str) -> None:
    ended = train(config, faults=f"{action}@step.forward:1:7")
    assert ended.codes == [5, 1 if action == "raise" else 0]
    assert "process 0 lost another one at " in ended.said[0]
    assert ended.seconds < 60.0
    if action == "raise":
        assert "RuntimeError: a fault on purpose" in ended.stderr[1]


@pytest.mark.slow
@pytest.mark.parametrize("place", ["step.forward", "event.stashed"])
def test_a_process_that_is_out_of_step_ends_the_run(config: Path, undisturbed: Path, place: str) -> None:
    """It takes part in one collective more than the others."""
    step = {"step.forward": 7, "event.stashed": 8}[place]
    hang = (f"guard.hang_seconds={HANG_SECONDS}",)
    ended = Started(config, hang, 2, f"collective@{place}:1:{step}", config.parent / "o").end(60.0)
    assert ended.codes == [5, 5]
    (sentence,) = ended.said
    assert "process 1 on " in sentence
    assert f"hangs at {place} of step {step}, behind the others; process 0 has been at " in sentence
    assert train(config).codes == [0, 0]
    assert_same_end(config.parent / "run", undisturbed)
