"""Disks that fill up and files that are damaged: what is committed stays, and what is damaged is passed over."""

import os
import shutil
from pathlib import Path

import pytest

from pretrain.checkpoint.reader import CheckpointReader, step_folders
from tests.support.fault_runs import assert_same_end, events_of, small_disk, steps_of, train

pytestmark = pytest.mark.faults

NOT_SAVED = "was not saved, earlier ones are as they were"


@pytest.mark.parametrize(
    "fault", ["full@save.shard:1:6", pytest.param("readonly@save.manifest:0:6", marks=pytest.mark.slow)]
)
def test_a_save_that_fails_is_reported_and_training_goes_on(config: Path, undisturbed: Path, fault: str) -> None:
    run = config.parent / "run"
    ended = train(config, faults=fault)
    assert ended.codes == [0, 0]
    (event,) = events_of(run, "save_failed")
    assert event["step"] == 6
    assert NOT_SAVED in event["error"]
    assert steps_of(run) == [3, 9, 12]
    assert_same_end(run, undisturbed)


@pytest.mark.slow
def test_saves_that_fail_in_a_row_end_the_run(config: Path) -> None:
    ended = train(config, "checkpoint.failures=2", faults="full@save.shard:1:6,full@save.shard:1:9")
    assert ended.codes == [3, 3]
    (sentence,) = ended.said
    assert "on process 1, No space left on device" in sentence
    assert "set run.folder to a larger disk" in sentence
    assert steps_of(config.parent / "run") == [3]


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("background", ["true", "false"])
def test_everybody_waits_for_a_slow_writer(config: Path, undisturbed: Path, background: str) -> None:
    ended = train(config, f"checkpoint.background={background}", faults="slow@save.shard:1:6")
    assert ended.codes == [0, 0]
    assert_same_end(config.parent / "run", undisturbed)


def test_a_background_write_that_fails_is_noticed(config: Path) -> None:
    run = config.parent / "run"
    ended = train(config, "checkpoint.background=true", "train.steps=40", "checkpoint.every=10", faults=_shards(1, 40))
    assert ended.codes == [0, 0]
    (event,) = events_of(run, "save_failed")
    assert "on process 1, No space left on device" in event["error"]
    assert steps_of(run)[-1] == 40
    for saved in events_of(run, "checkpoint"):
        assert saved["stall_seconds"] > 0.0


def _shards(process: int, steps: int) -> str:
    """One full disk at the first shard that is written before the end."""
    return f"full@save.shard:{process}:10"


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


@pytest.mark.parametrize("file", ["shard_000_00001.safetensors", pytest.param("manifest.json", marks=pytest.mark.slow)])
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
    assert_same_end(run, undisturbed)


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
    assert_same_end(run, undisturbed)


def test_what_fails_after_the_commit_is_no_failed_save(config: Path, undisturbed: Path) -> None:
    run = config.parent / "run"
    ended = train(config, "checkpoint.failures=1", faults="full@save.renamed:0:6,full@save.pointer:0:12")
    assert ended.codes == [0, 0]
    untidy = events_of(run, "save_untidy")
    assert [event["step"] for event in untidy] == [6, 12]
    assert "the checkpoint of step 6 is saved, but what follows failed" in untidy[0]["error"]
    assert steps_of(run) == [3, 6, 9, 12]
    assert_same_end(run, undisturbed)


@pytest.mark.slow
def test_resuming_twice_from_one_checkpoint_gives_the_same(config: Path, undisturbed: Path) -> None:
    run, copy = config.parent / "run", config.parent / "copy"
    train(config, faults="kill@step.forward:1:8")
    shutil.copytree(run, copy)
    before = _content(run / "checkpoints" / "step_000000006")
    for folder in (run, copy):
        assert train(config, f"run.folder={folder}").codes == [0, 0]
        assert _content(folder / "checkpoints" / "step_000000006") == before
        assert_same_end(folder, undisturbed)


def _content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.slow
def test_no_run_starts_over_by_itself(config: Path) -> None:
    run = config.parent / "run"
    train(config, faults="kill@step.forward:1:4")
    (run / "checkpoints" / "step_000000003" / "manifest.json").write_text("{}")
    ended = train(config)
    assert ended.codes == [3, 3]
    assert "format_version" in ended.said[0]
