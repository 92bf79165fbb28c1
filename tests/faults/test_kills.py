"""Runs that are killed at every place of a step, a save, an event and a resume: nothing that was committed is lost."""

import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from pretrain.checkpoint.reader import step_folders
from tests.support.fault_runs import Started, assert_same_end, steps_of, train
from tests.support.training_runs import write_config

pytestmark = pytest.mark.faults


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
IN_CI = {"save.shard", "event.changed"}


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
    assert steps_of(run)[-1] == committed
    again = train(config)
    assert again.codes == [0, 0]
    assert f"[resume] step {committed}" in again.stdout[0]
    assert_same_end(run, undisturbed)
    assert [path.name for path in (run / "checkpoints").iterdir() if path.name.startswith(".")] == []


@pytest.mark.slow
@pytest.mark.parametrize("place", ["resume.opened", "resume.built", "resume.restored"])
def test_a_kill_while_resuming_leaves_the_checkpoint(config: Path, undisturbed: Path, place: str) -> None:
    run = config.parent / "run"
    train(config, faults="kill@step.forward:1:7")
    killed = train(config, faults=f"kill@{place}:1:6")
    assert killed.codes == [5, -signal.SIGKILL]
    assert train(config).codes == [0, 0]
    assert_same_end(run, undisturbed)


@pytest.mark.slow
def test_a_kill_while_a_checkpoint_of_the_same_step_is_replaced(config: Path, undisturbed: Path) -> None:
    """A run that went back past a damaged checkpoint writes that step anew."""
    run = config.parent / "run"
    train(config, faults="kill@step.forward:1:7")
    (run / "checkpoints" / "step_000000006" / "shard_000_00000.safetensors").write_bytes(b"")
    killed = train(config, faults="kill@save.aside:0:6")
    assert killed.codes == [-signal.SIGKILL, 5]
    assert train(config).codes == [0, 0]
    assert_same_end(run, undisturbed)


@pytest.mark.slow
def test_fifty_kills_at_random_times(folder: Path, tmp_path: Path) -> None:
    """500 steps and several growths; every life makes at least one commit."""
    steps, kills = 500, 50
    settings: dict[str, Any] = {
        "train": {"steps": steps},
        "rank": {"schedule": [{"step": 100, "rank": 6}, {"step": 250, "rank": 8}, {"step": 400, "rank": 10}]},
        "checkpoint": {"every": 4, "keep": 2, "background": True},
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
        time.sleep(draw.uniform(0.0, 0.1))
        if not started.processes[0].is_alive():
            break
        started.signal(draw.randrange(2), signal.SIGKILL)
        started.end()
        done += 1
    assert train(config).codes == [0, 0]
    print(f"{done} kills")
    assert_same_end(tmp_path / "run", tmp_path / "quiet")
    assert done >= kills


def _newest(run: Path) -> str:
    found = step_folders(run / "checkpoints")
    return found[0].name if found else ""
