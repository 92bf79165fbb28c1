"""Which checkpoints stay, and how one takes the place of another."""

from pathlib import Path

import pytest

from pretrain.checkpoint.format import MANIFEST_NAME
from pretrain.checkpoint.reader import CheckpointReader, find_checkpoint
from pretrain.checkpoint.retention import Retention
from tests.support.checkpoint_cases import assert_holds, hidden_names, save


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


@pytest.mark.parametrize("keep", [2, 3])
def test_keep(tmp_path: Path, keep: int) -> None:
    for step in (10, 20, 30, 40):
        save(tmp_path, step, retention=Retention(keep))
    assert names(tmp_path) == ["latest", *[f"step_0000000{step}" for step in (10, 20, 30, 40)][-keep:]]


def test_multiples_of_a_step_stay(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40, 50, 60):
        save(tmp_path, step, retention=Retention(2, keep_every=20))
    assert names(tmp_path) == ["latest", *[f"step_0000000{step}" for step in (20, 40, 50, 60)]]


def test_invalid_folders_are_neither_counted_nor_touched(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save(tmp_path, step, retention=Retention(3))
    (tmp_path / "step_000000030" / MANIFEST_NAME).unlink()
    (tmp_path / "step_000000035").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "step_7").mkdir()
    save(tmp_path, 40, retention=Retention(2))
    assert names(tmp_path) == [
        "latest", "notes", "step_000000020", "step_000000030", "step_000000035", "step_000000040", "step_7"
    ]  # fmt: skip


def test_later_steps_belong_to_another_history(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save(tmp_path, step, retention=Retention(3))
    save(tmp_path, 15, retention=Retention(3))
    assert names(tmp_path) == ["latest", "step_000000010", "step_000000015"]
    assert find_checkpoint(tmp_path) == tmp_path / "step_000000015"


@pytest.mark.faults
def test_an_interrupted_prune_is_finished(tmp_path: Path) -> None:
    save(tmp_path, 10)
    save(tmp_path, 20)
    gone = tmp_path / ".removed_step_000000010"
    (tmp_path / "step_000000010").rename(gone)
    (gone / MANIFEST_NAME).unlink()
    assert find_checkpoint(tmp_path) == tmp_path / "step_000000020"
    save(tmp_path, 30)
    assert names(tmp_path) == ["latest", "step_000000020", "step_000000030"]


def test_the_same_step_again_replaces(tmp_path: Path) -> None:
    save(tmp_path, 10, state={"try": 1})
    save(tmp_path, 10, state={"try": 2})
    assert CheckpointReader(tmp_path / "step_000000010").state == {"try": 2}
    assert names(tmp_path) == ["latest", "step_000000010"]


@pytest.mark.faults
def test_kill_between_the_renames_of_a_replacement(tmp_path: Path) -> None:
    save(tmp_path, 10)
    aside = tmp_path / ".replaced_step_000000010"
    (tmp_path / "step_000000010").rename(aside)
    assert find_checkpoint(tmp_path) == aside
    assert_holds(aside, 10)
    save(tmp_path, 20)
    assert names(tmp_path) == ["latest", "step_000000010", "step_000000020"]
    assert_holds(tmp_path / "step_000000010", 10)


def test_leftovers_that_are_links_are_not_followed(tmp_path: Path) -> None:
    root, treasure = tmp_path / "checkpoints", tmp_path / "treasure"
    root.mkdir()
    treasure.mkdir()
    (treasure / "file").touch()
    (root / ".staging_step_000000001").symlink_to(treasure)
    save(root, 2)
    assert (treasure / "file").exists()
    assert hidden_names(root) == []
