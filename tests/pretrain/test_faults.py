"""Real runs that are killed, stopped, signalled and starved, and what is left: the last commit, one sentence, a code.

A run that was broken off and started again must end with the bits of the run that nobody disturbed.
"""

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.checkpoint_format import KEYS
from pretrain.checkpoint_reader import CheckpointReader, find_checkpoint, step_folders
from tests.fault_runs import Ended, Started, small_disk, train
from tests.training_runs import curve, make_corpus, write_config

pytestmark = pytest.mark.faults

STEPS, EVERY = 12, 3
"""Ranks grow after steps 4 and 8 (`tests/training_runs.py`)."""
HANG_SECONDS = 4.0
NOT_SAVED = "was not saved, earlier ones are as they were"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a corpus, and a config of a run of `STEPS` steps."""
    folder = tmp_path_factory.mktemp("faults")
    make_corpus(folder / "corpus")
    return folder


@pytest.fixture
def config(folder: Path, tmp_path: Path) -> Path:
    checkpoint = {"every": EVERY, "keep": 20}
    return write_config(tmp_path / "run.yaml", folder / "corpus", tmp_path / "run", checkpoint=checkpoint)


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> Iterator[Path]:
    """The folder of a run that nothing happens to."""
    checkpoint = {"every": EVERY, "keep": 20}
    config = write_config(folder / "run.yaml", folder / "corpus", folder / "undisturbed", checkpoint=checkpoint)
    assert train(config).codes == [0, 0]
    yield folder / "undisturbed"
    shutil.rmtree(folder / "undisturbed")


def _assert_same_end(run: Path, other: Path) -> None:
    """Masters and moments of both runs' newest checkpoints are the same bits, and so is every logged loss."""
    newest = [find_checkpoint(one / "checkpoints", verify=True) for one in (run, other)]
    mine, theirs = (CheckpointReader(one) for one in newest if one is not None)
    assert mine.step == theirs.step
    assert mine.state["ranks"] == theirs.state["ranks"]
    for name in theirs.layouts:
        for key in KEYS:
            assert torch.equal(mine.read(name, key), theirs.read(name, key)), (name, key)
    assert curve(run) == curve(other)


def _events(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == kind]


def _steps(run: Path) -> list[int]:
    """Of the checkpoints, oldest first."""
    return [CheckpointReader(one).step for one in reversed(step_folders(run / "checkpoints"))]


# Kills ----------------------------------------------------------------------------------------------------------------

KILLS = [
    ("step.forward", 1, 7, 6),
    ("step.optimizer", 0, 7, 6),
    ("save.begin", 0, 6, 3),
    ("save.staging", 0, 6, 3),
    ("save.shard", 1, 6, 3),
    ("save.written", 1, 6, 3),
    ("save.manifest", 0, 6, 3),
    ("save.renamed", 0, 6, 6),
    ("save.pointer", 0, 6, 6),
    ("event.begin", 1, 8, 6),
    ("event.stashed", 0, 8, 6),
    ("event.changed", 1, 8, 6),
    ("event.rebuilt", 0, 8, 6),
    ("event.restored", 1, 8, 6),
]
"""Place, process, step, and the last commit before it."""
IN_CI = {"step.forward", "save.shard", "save.manifest", "save.renamed", "event.changed"}


@pytest.mark.parametrize(
    ("place", "process", "step", "committed"),
    [pytest.param(*kill, marks=() if kill[0] in IN_CI else pytest.mark.slow, id=kill[0]) for kill in KILLS],
)
def test_a_killed_process_costs_nothing_that_was_committed(
    config: Path, undisturbed: Path, place: str, process: int, step: int, committed: int
) -> None:
    run = config.parent / "run"
    killed = train(config, faults=f"kill@{place}:{process}:{step}")
    assert killed.codes[process] == -signal.SIGKILL
    assert killed.codes[1 - process] == 5
    assert len(killed.said) == 1
    assert f"process {1 - process} lost another one at" in killed.said[0]
    assert _steps(run)[-1] == committed
    again = train(config)
    assert again.codes == [0, 0]
    assert f"[resume] step {committed}" in again.stdout[0]
    _assert_same_end(run, undisturbed)
    assert [path.name for path in (run / "checkpoints").iterdir() if path.name.startswith(".")] == []


@pytest.mark.slow
@pytest.mark.parametrize("place", ["resume.opened", "resume.built", "resume.restored"])
def test_a_kill_while_resuming_leaves_the_checkpoint(config: Path, undisturbed: Path, place: str) -> None:
    run = config.parent / "run"
    train(config, faults="kill@step.forward:1:7")
    killed = train(config, faults=f"kill@{place}:1:6")
    assert killed.codes == [5, -signal.SIGKILL]
    assert train(config).codes == [0, 0]
    _assert_same_end(run, undisturbed)


@pytest.mark.slow
def test_a_kill_while_a_checkpoint_of_the_same_step_is_replaced(config: Path, undisturbed: Path) -> None:
    """A run that went back past a damaged checkpoint writes that step anew."""
    run = config.parent / "run"
    train(config, faults="kill@step.forward:1:7")
    (run / "checkpoints" / "step_000000006" / "shard_000_00000.safetensors").write_bytes(b"")
    killed = train(config, faults="kill@save.aside:0:6")
    assert killed.codes == [-signal.SIGKILL, 5]
    assert train(config).codes == [0, 0]
    _assert_same_end(run, undisturbed)


@pytest.mark.slow
def test_fifty_kills_at_random_times(folder: Path, tmp_path: Path) -> None:
    """500 steps and several growths; every life makes at least one commit."""
    steps, kills = 500, 50
    settings: dict[str, Any] = {
        "train": {"steps": steps},
        "rank": {"events": [{"step": 100, "rank": 6}, {"step": 250, "rank": 8}, {"step": 400, "rank": 10}]},
        "checkpoint": {"every": 7, "keep": 2, "background": True},
    }
    quiet = write_config(tmp_path / "quiet.yaml", folder / "corpus", tmp_path / "quiet", **settings)
    assert train(quiet).codes == [0, 0]
    config = write_config(tmp_path / "run.yaml", folder / "corpus", tmp_path / "run", **settings)
    draw, done = random.Random(5), 0
    while done < kills:
        started = Started(config, (), 2, "", tmp_path / f"life_{done}")
        before = _newest(tmp_path / "run")
        while _newest(tmp_path / "run") == before and started.processes[0].is_alive():
            time.sleep(0.01)
        time.sleep(draw.uniform(0.0, 0.3))
        if not started.processes[0].is_alive():
            break
        started.signal(draw.randrange(2), signal.SIGKILL)
        started.end()
        done += 1
    assert train(config).codes == [0, 0]
    print(f"{done} kills")
    _assert_same_end(tmp_path / "run", tmp_path / "quiet")
    assert done >= kills


def _newest(run: Path) -> str:
    found = step_folders(run / "checkpoints")
    return found[0].name if found else ""


# Signals --------------------------------------------------------------------------------------------------------------

SIGNALS = [
    ("term", "step.forward", 143, 8),
    ("usr1", "save.shard", 138, 7),
    ("term", "save.shard", 143, 7),
    ("usr1", "event.changed", 138, 9),
    ("term", "event.changed", 143, 9),
]


@pytest.mark.parametrize(
    ("action", "place", "code", "saved"),
    [pytest.param(*one, marks=() if number in (0, 3) else pytest.mark.slow) for number, one in enumerate(SIGNALS)],
)
def test_a_signal_to_one_process_saves_and_ends_all(
    config: Path, undisturbed: Path, action: str, place: str, code: int, saved: int
) -> None:
    """In the second of two micro-steps, in a save, and in an event."""
    run = config.parent / "run"
    step = {"step.forward": 7, "save.shard": 6, "event.changed": 8}[place]
    ended = train(config, faults=f"{action}@{place}:1:{step}")
    assert ended.codes == [code, code]
    assert ended.said == [f"error: SIG{action.upper()}: saved at step {saved}; start the run again to go on"]
    assert _steps(run)[-1] == saved
    assert _events(run, "stopped")[0]["step"] == saved
    assert train(config).codes == [0, 0]
    _assert_same_end(run, undisturbed)


def test_a_second_sigterm_ends_at_once(config: Path) -> None:
    started = Started(config, ("guard.hang_seconds=0",), 2, "stop@step.forward:1:7", config.parent / "outputs")
    started.wait_for("step 7/12")
    started.signal(0, signal.SIGTERM)  # waits for a process that does not go on
    time.sleep(0.5)
    assert started.processes[0].is_alive()
    started.signal(0, signal.SIGTERM)
    started.processes[0].join(10.0)
    assert started.processes[0].exitcode == 143
    started.end(0.0)


# Disks ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault", ["full@save.shard:1:6", pytest.param("readonly@save.manifest:0:6", marks=pytest.mark.slow)]
)
def test_a_save_that_fails_is_reported_and_training_goes_on(config: Path, undisturbed: Path, fault: str) -> None:
    run = config.parent / "run"
    ended = train(config, faults=fault)
    assert ended.codes == [0, 0]
    (event,) = _events(run, "save_failed")
    assert event["step"] == 6
    assert NOT_SAVED in event["error"]
    assert _steps(run) == [3, 9, 12]
    _assert_same_end(run, undisturbed)


def test_saves_that_fail_in_a_row_end_the_run(config: Path) -> None:
    ended = train(config, "checkpoint.failures=2", faults="full@save.shard:1:6,full@save.shard:1:9")
    assert ended.codes == [3, 3]
    (sentence,) = ended.said
    assert "on process 1, No space left on device" in sentence
    assert "set run.folder to a larger disk" in sentence
    assert _steps(config.parent / "run") == [3]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
def test_a_disk_that_fills_up(config: Path) -> None:
    """A real one; what is committed stays whole."""
    small = config.parent / "small"
    with small_disk(small, megabytes=2):
        run = small / "run"
        ended = train(config, f"run.folder={run}", "checkpoint.failures=2")
        assert ended.codes == [3, 3]
        assert "free" in ended.said[0]
        kept = step_folders(run / "checkpoints")
        assert kept
        for one in kept:
            CheckpointReader(one).verify()


def test_a_background_write_that_fails_is_noticed(config: Path) -> None:
    run = config.parent / "run"
    ended = train(config, "checkpoint.background=true", "train.steps=40", "checkpoint.every=10", faults=_shards(1, 40))
    assert ended.codes == [0, 0]
    (event,) = _events(run, "save_failed")
    assert "on process 1, No space left on device" in event["error"]
    assert _steps(run)[-1] == 40
    for saved in _events(run, "checkpoint"):
        assert saved["stall_seconds"] > 0.0


def _shards(process: int, steps: int) -> str:
    """One full disk at the first shard that is written before the end."""
    return f"full@save.shard:{process}:10"


# Damage ---------------------------------------------------------------------------------------------------------------


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


DAMAGE = {
    "flipped": _flip,
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "empty": lambda path: path.write_bytes(b""),
    "missing": lambda path: path.unlink(),
}


@pytest.mark.parametrize("file", ["shard_000_00001.safetensors", "manifest.json"])
@pytest.mark.parametrize(
    "damage", ["flipped", *(pytest.param(one, marks=pytest.mark.slow) for one in list(DAMAGE)[1:])]
)
def test_a_damaged_checkpoint_is_passed_over(config: Path, undisturbed: Path, file: str, damage: str) -> None:
    run = config.parent / "run"
    train(config, faults="kill@step.forward:1:10")
    DAMAGE[damage](run / "checkpoints" / "step_000000009" / file)
    again = train(config)
    assert again.codes == [0, 0]
    assert "warning: " in again.stderr[0]
    assert "trying the one before" in again.stderr[0]
    assert "[resume] step 6" in again.stdout[0]
    _assert_same_end(run, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("pointer", [None, "", "garbage", "../elsewhere", "/etc"])
def test_the_pointer_is_never_trusted(config: Path, undisturbed: Path, pointer: str | None) -> None:
    run = config.parent / "run"
    train(config, faults="kill@step.forward:1:10")
    latest = run / "checkpoints" / "latest"
    latest.unlink()
    if pointer is not None:
        latest.write_text(pointer)
    assert train(config).codes == [0, 0]
    _assert_same_end(run, undisturbed)


def test_no_run_starts_over_by_itself(config: Path) -> None:
    run = config.parent / "run"
    train(config, faults="kill@step.forward:1:4")
    (run / "checkpoints" / "step_000000003" / "manifest.json").write_text("{}")
    ended = train(config)
    assert ended.codes == [3, 3]
    assert "format_version" in ended.said[0]


# Company --------------------------------------------------------------------------------------------------------------


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
    ended = started.end(40.0)
    assert ended.codes == [5, None]
    (sentence,) = ended.said
    assert "process 1 on " in sentence
    assert "stopped answering at " in sentence
    assert f"guard.hang_seconds is {HANG_SECONDS:g}" in sentence
    assert "most recent call first" in ended.stderr[0]
    assert train(config).codes == [0, 0]
    _assert_same_end(config.parent / "run", undisturbed)


def test_a_process_that_falls_behind_is_named(config: Path) -> None:
    """It lives, and sleeps for longer than it may."""
    ended = Started(config, ("guard.hang_seconds=1.5",), 2, "slow@step.forward:0:7", config.parent / "o").end(40.0)
    assert ended.codes == [5, 5]
    (sentence,) = ended.said
    assert "process 0 on " in sentence
    assert "hangs at step.forward of step 7, behind the others" in sentence


@pytest.mark.parametrize("action", ["raise", pytest.param("exit", marks=pytest.mark.slow)])
def test_nobody_waits_for_a_process_that_has_left(config: Path, action: str) -> None:
    ended = train(config, faults=f"{action}@step.forward:1:7")
    assert ended.codes == [5, 1 if action == "raise" else 0]
    assert "process 0 lost another one at " in ended.said[0]
    assert ended.seconds < 60.0
    if action == "raise":
        assert "RuntimeError: a fault on purpose" in ended.stderr[1]


# Numbers --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stage", [0, 1, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)]
)
def test_a_gradient_that_is_not_finite_on_one_process_is_skipped_by_all(config: Path, stage: int) -> None:
    run = config.parent / "run"
    ended = train(config, f"deepspeed.stage={stage}", faults="nan@step.loss:1:5")
    assert ended.codes == [0, 0]
    (skipped,) = _events(run, "skipped")
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
    (event,) = _events(run, "rollback")
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
    assert _steps(config.parent / "run") == [3, 6]


@pytest.mark.parametrize("action", ["warn", "rollback", pytest.param("stop", marks=pytest.mark.slow)])
def test_a_loss_that_leaps_is_seen(config: Path, action: str) -> None:
    run = config.parent / "run"
    spike = ",".join(f"spike@step.loss:{process}:10" for process in (0, 1))
    ended = train(
        config, "guard.spike_window=5", f"guard.on_spike={action}", "optimizer.learning_rate=1e-4", faults=spike
    )
    (event,) = _events(run, "spike")
    assert event["step"] == 11
    assert event["deviations"] > 12.0
    assert ended.codes == ([4, 4] if action == "stop" else [0, 0])
    assert len(_events(run, "rollback")) == (action == "rollback")


# Settings -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.hidden=64", "model.hidden is 32 there and 64 here"),
        ("run.seed=5", "run.seed"),
    ],
)
def test_what_a_resumed_run_may_not_change(config: Path, override: str, words: str) -> None:
    train(config, faults="kill@step.forward:0:4", processes=1)
    ended = train(config, override, processes=1)
    assert ended.codes[0] in (2, 3)
    assert words in ended.said[0]


def test_a_model_that_is_too_large_for_the_machine_is_refused(config: Path) -> None:
    dense = ("model.parametrization=dense", "rank.policy=fixed", "rank.events=[]")
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
