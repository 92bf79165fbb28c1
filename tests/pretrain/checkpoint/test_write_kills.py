"""Kills while a checkpoint is written cost no earlier one."""

import contextlib
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NoReturn

import pytest
import torch
import torch.distributed as dist

from pretrain.checkpoint.format import Fragment
from pretrain.checkpoint.reader import CheckpointReader, find_checkpoint, step_folders
from tests.support.checkpoint_cases import assert_holds, hidden_names, logical, own_fragments, save
from tests.support.distributed import run

OWN_SAVE_SECONDS = 60.0


class KillsWhenOthersAreDone:
    """Fragments that kill their process once another process's file is written."""

    def __init__(self, other: Path) -> None:
        self.other = other

    def __iter__(self) -> Iterator[Fragment]:
        yield next(own_fragments(2, 2))
        while not self.other.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)


class KillsBeforeTheManifest(dict[str, Path]):
    """Extra files that kill the process when they are copied, which is after all shards were written."""

    def items(self) -> NoReturn:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("unreachable")


def start(function: Callable[..., object], *args: object) -> BaseProcess:
    """A process of its own; those after the first start fast, as they are forked from one that has imported torch."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.checkpoint_cases"])
    process = context.Process(target=function, args=args, daemon=True)
    process.start()
    return process


def save_and_die(root: Path, meeting_point: Path, process: int) -> None:
    """One of two processes, of which number 1 is killed."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{meeting_point}", rank=process, world_size=2)
    staging = root / ".staging_step_000000002"
    save(
        root,
        2,
        2,
        **({"fragments": KillsWhenOthersAreDone(staging / "shard_000_00000.safetensors")} if process else {}),
    )


@pytest.mark.faults
def test_kill_of_one_process_among_two(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    run(save, 2, root, 1, 2)
    pair = [start(save_and_die, root, tmp_path / "meeting_point", process) for process in range(2)]
    for process in pair:
        process.join(OWN_SAVE_SECONDS)
    assert pair[1].exitcode == -signal.SIGKILL
    assert pair[0].exitcode == 1
    assert hidden_names(root) == [".staging_step_000000002"]
    assert (root / ".staging_step_000000002" / "shard_000_00000.safetensors").exists()
    assert find_checkpoint(root, verify=True) == root / "step_000000001"
    run(save, 2, root, 3, 1)
    assert hidden_names(root) == []
    assert_holds(root / "step_000000003", 3)


@pytest.mark.faults
def test_kill_before_the_manifest(tmp_path: Path) -> None:
    save(tmp_path, 1)
    process = start(save_with_deadly_files, tmp_path)
    process.join(OWN_SAVE_SECONDS)
    assert process.exitcode == -signal.SIGKILL
    staging = tmp_path / ".staging_step_000000002"
    assert [path.name for path in staging.iterdir()] == ["shard_000_00000.safetensors"]
    assert find_checkpoint(tmp_path) == tmp_path / "step_000000001"
    assert_holds(save(tmp_path, 2), 2)
    assert hidden_names(tmp_path) == []


def save_with_deadly_files(root: Path) -> None:
    save(root, 2, extra_files=KillsBeforeTheManifest({"tokenizer.model": Path(__file__)}))


def save_for_ever(root: Path, step: int, connection: Connection) -> None:
    """Saves every step twice, so that the second replaces the first, and tells what is done."""
    while True:
        for _ in range(2):
            save(root, step)
            connection.send(step)
        step += 1


@pytest.mark.faults
def test_kills_at_any_moment(tmp_path: Path) -> None:
    """Twelve kills at random moments of saving without a pause: nothing that was reported as saved is ever lost."""
    moments = random.Random(1)
    step = 0
    for _ in range(12):
        ours, theirs = multiprocessing.Pipe(duplex=False)
        process = start(save_for_ever, tmp_path, step + 1, theirs)
        theirs.close()
        done = ours.recv()
        time.sleep(moments.uniform(0.0, 0.08))
        process.kill()
        process.join()
        with contextlib.suppress(EOFError):
            while True:
                done = ours.recv()
        found = find_checkpoint(tmp_path, verify=True)
        assert found is not None
        reader = CheckpointReader(found)
        assert reader.step in (done, done + 1)
        assert torch.equal(reader.read("fc1.B"), logical("fc1.B", "master", reader.step))
        if reader.step > 1:
            earlier = [path for path in step_folders(tmp_path) if path != found]
            assert any(CheckpointReader(path).step == reader.step - 1 for path in earlier)
        step = reader.step
    save(tmp_path, step + 1)
    assert hidden_names(tmp_path) == []
    assert [path.name for path in step_folders(tmp_path)] == [f"step_{step + 1:09d}", f"step_{step:09d}"]
