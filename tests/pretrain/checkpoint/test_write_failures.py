"""Failures that a process survives cost no earlier checkpoint, and are one sentence of all processes."""

import contextlib
import errno
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from model.sharding import TensorLayout
from pretrain.checkpoint.format import Fragment
from pretrain.checkpoint.reader import find_checkpoint
from pretrain.checkpoint.retention import Retention
from pretrain.errors import CheckpointError
from tests.support.checkpoint_cases import assert_holds, hidden_names, own_fragments, save
from tests.support.distributed import run


def try_to_save(root: Path, step: int, tensor_size: int, changes: Mapping[int, Mapping[str, object]]) -> str:
    """The sentence of the CheckpointError on this process; `changes` are those of single processes."""
    try:
        save(root, step, tensor_size, **changes.get(dist.get_rank(), {}))
    except CheckpointError as error:
        return str(error)
    return "no error"


class FailsMidway:
    """Fragments whose source fails after the second one."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __iter__(self) -> Iterator[Fragment]:
        fragments = own_fragments(9, 2)
        yield next(fragments)
        yield next(fragments)
        raise self.error


class Doubled:
    """Fragments whose last one, of another name than any other, comes with one number too many."""

    def __init__(self, start: int, length: int) -> None:
        self.start, self.length = start, length

    def __iter__(self) -> Iterator[Fragment]:
        yield from own_fragments(9, 2)
        yield Fragment("fc1.bias", "master", self.start, torch.zeros(self.length))


class Without:
    """Fragments of all parameters but one."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __iter__(self) -> Iterator[Fragment]:
        return (fragment for fragment in own_fragments(9, 2) if fragment.name != self.name)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"fragments": FailsMidway(OSError(errno.ENOSPC, "full", "/some/disk"))},
            "No space left on device (/some/disk)",
        ),
        ({"fragments": FailsMidway(OSError(errno.EIO, "broken"))}, "Input/output error"),
        ({"fragments": FailsMidway(RuntimeError("no such luck"))}, "RuntimeError: no such luck"),
        ({"fragments": Without("fc1.B")}, "fc1.B (tensor-parallel index 1) has 0 numbers and should have 24"),
        ({"fragments": Doubled(1, 2)}, "the numbers from 1 to 3 are there twice"),
        ({"fragments": Doubled(6, 2)}, "the numbers from 4 to 6 are missing"),
        ({"layouts": {"w": TensorLayout((1,))}}, "disagree"),
        ({"tensor_size": 1}, "disagree"),
        ({"retention": Retention(1)}, "set checkpoint.keep"),
    ],
)
def test_a_failure_of_one_process_is_everybodys(tmp_path: Path, change: dict[str, object], words: str) -> None:
    run(save, 2, tmp_path, 8, 2)
    sentences = run(try_to_save, 2, tmp_path, 9, 2, {1: change})
    assert sentences[0] == sentences[1]
    assert words in sentences[0]
    assert "\n" not in sentences[0]
    assert "step 9" in sentences[0]
    assert hidden_names(tmp_path) == []
    assert find_checkpoint(tmp_path) == tmp_path / "step_000000008"
    assert_holds(tmp_path / "step_000000008", 8)
    run(save, 2, tmp_path, 9, 2)
    assert_holds(tmp_path / "step_000000009", 9)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"state": {"rate": float("nan")}}, "NaN"),
        ({"state": {"rate": float("inf")}}, "infinity"),
        ({"state": {"generator": (1, 2)}}, "state.generator"),
        ({"state": {"by_layer": {3: 1}}}, "state.by_layer"),
        ({"extra_files": {"../tokenizer.model": Path(__file__)}}, "../tokenizer.model"),
        ({"extra_files": {"tokenizer.model": Path("/nowhere/x")}}, "/nowhere/x"),
        ({"extra_files": {"manifest.json": Path(__file__)}}, "File exists"),
        ({"fragments": [Fragment("fc1.bias", "master", 0, torch.zeros(8).double())]}, "not 1-D float32"),
        ({"fragments": [Fragment("fc1.bias", "master", 0, torch.zeros(2, 4))]}, "not 1-D float32"),
        ({"fragments": [Fragment("fc1.bias", "momentum", 0, torch.zeros(8))]}, "fc1.bias|momentum|0"),
        ({"fragments": [Fragment("other", "master", 0, torch.zeros(8))]}, "other|master|0"),
        ({"fragments": [Fragment("fc1.bias", "master", 0, torch.zeros(8))] * 2}, "given twice"),
    ],
)
def test_what_cannot_be_kept_is_refused(tmp_path: Path, change: dict[str, object], words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        save(tmp_path, 5, **change)
    assert words in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.faults
def test_folders_that_are_not_shared(tmp_path: Path) -> None:
    sentences = run(save_at_home, 2, tmp_path)
    assert sentences[0] == sentences[1]
    assert "set run.folder to a file system that all processes share" in sentences[0]


def save_at_home(root: Path) -> str:
    return try_to_save(root / str(dist.get_rank()), 1, 2, {})


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 2 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() != 0 or not shutil.which("mount"):
        pytest.skip("only root can mount a disk")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


class FillsTheDisk:
    """Fragments that come after somebody else took the last room."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __iter__(self) -> Iterator[Fragment]:
        with self.path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(4096)):
                pass
        assert shutil.disk_usage(self.path.parent).free == 0
        yield from own_fragments(2, 1)


@pytest.mark.faults
def test_full_and_read_only_disks(small_disk: Path) -> None:
    root = small_disk / "checkpoints"
    save(root, 1)
    with pytest.raises(CheckpointError, match=r"No space left on device .*checkpoints/.*free space there"):
        save(root, 2, fragments=FillsTheDisk(small_disk / "filler"))
    assert_holds(root / "step_000000001", 1)
    assert hidden_names(root) == []
    with pytest.raises(CheckpointError, match=r"GB free and a checkpoint takes 0.001 GB: free space there"):
        save(root, 2)
    (small_disk / "filler").unlink()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(CheckpointError, match=r"Read-only file system .*: make it writable, or change run.folder"):
        save(root, 2)
    assert find_checkpoint(root) == root / "step_000000001"
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    assert_holds(save(root, 2), 2)


@pytest.mark.faults
def test_a_fault_after_the_commit_leaves_the_new_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "latest").unlink()
    (tmp_path / "latest").mkdir()
    with pytest.raises(CheckpointError, match="step 2 is saved, but what follows failed"):
        save(tmp_path, 2)
    assert find_checkpoint(tmp_path) == tmp_path / "step_000000002"
    assert_holds(tmp_path / "step_000000001", 1)
    (tmp_path / "latest").rmdir()
    save(tmp_path, 3)
    assert (tmp_path / "latest").read_text() == "step_000000003\n"
