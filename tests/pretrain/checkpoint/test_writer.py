"""Saved checkpoints can be read back in any parallel layout, and nothing that happens during a save costs an earlier
one."""

import contextlib
import errno
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open

from model.sharding import TensorLayout
from pretrain.checkpoint.format import KEYS, MANIFEST_NAME, Fragment
from pretrain.checkpoint.reader import CheckpointReader, find_checkpoint, step_folders
from pretrain.checkpoint.retention import Retention
from pretrain.checkpoint.saver import Saver
from pretrain.checkpoint.writer import CheckpointWrite, Content
from pretrain.errors import CheckpointError
from tests.support.checkpoint_cases import LAYOUTS, STATE, hidden_names, logical, own_fragments, save
from tests.support.distributed import run

OWN_SAVE_SECONDS = 60.0


def assert_holds(folder: Path, step: int) -> None:
    """Asserts that the checkpoint is whole, and that every logical tensor and every shard of other layouts is right to
    the bit."""
    reader = CheckpointReader(folder)
    reader.verify()
    assert reader.step == step
    assert reader.state == STATE | {"step": step}
    assert reader.layouts == LAYOUTS
    for name, layout in LAYOUTS.items():
        for key in KEYS:
            expected = logical(name, key, step)
            assert torch.equal(reader.read(name, key), expected)
            for processes in (1, 2, 4):
                for index in range(processes):
                    shard = reader.read_shard(name, key, index, processes)
                    assert shard.is_contiguous()
                    assert torch.equal(shard, layout.shard(expected, index, processes))


@pytest.mark.parametrize(("processes", "tensor_size"), [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)])
def test_round_trip(tmp_path: Path, processes: int, tensor_size: int) -> None:
    folders = run(save, processes, tmp_path, 7, tensor_size)
    assert folders == [tmp_path / "step_000000007"] * processes
    assert_holds(folders[0], 7)
    reader = CheckpointReader(folders[0])
    assert reader.tensor_size == tensor_size
    assert len(reader.manifest.shards) == processes
    assert (tmp_path / "latest").read_text() == "step_000000007\n"
    assert hidden_names(tmp_path) == []


def _saved_beside(root: Path, values: torch.Tensor) -> list[dict[str, Any]]:
    """Reports of a save beside the training whose only fragment is `values`."""
    reported: list[dict[str, Any]] = []

    def begin(resources: contextlib.ExitStack) -> tuple[CheckpointWrite, list[Fragment]]:
        write = CheckpointWrite(Content(root, 1, LAYOUTS, STATE, 0, 1, {}), Retention(2))
        return write, [Fragment("embedding.weight", "master", 0, values)]

    saver = Saver(beside=True, failures=2, report=lambda kind, step, **facts: reported.append({"kind": kind, **facts}))
    saver.save(begin, 1)
    saver.finish()
    return reported


def test_a_copy_for_which_there_is_no_memory_is_a_failed_save(tmp_path: Path) -> None:
    (failed,) = _saved_beside(tmp_path, torch.zeros(1).expand(2**48))
    assert failed["kind"] == "save_failed"
    assert "host memory does not hold a copy (" in failed["error"]
    assert "set checkpoint.background=false" in failed["error"]


def test_a_copy_that_fails_in_another_way_is_no_lack_of_memory(tmp_path: Path) -> None:
    """A failed device raises such an error; here a tensor without numbers cannot be copied."""
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        _saved_beside(tmp_path, torch.zeros(4, device="meta"))


def test_a_write_counts_its_fragments(tmp_path: Path) -> None:
    write = CheckpointWrite(Content(tmp_path, 1, LAYOUTS, STATE, 0, 1, {}), Retention(2))
    write.write(own_fragments(1, 1))
    assert write.fragments_written == len(KEYS) * len(LAYOUTS)
    assert CheckpointReader(write.commit()).layouts == LAYOUTS


def test_without_a_process_group(tmp_path: Path) -> None:
    tokenizer = tmp_path / "bpe.model"
    tokenizer.write_bytes(bytes(range(256)))
    folder = save(tmp_path / "new" / "checkpoints", 3, extra_files={"tokenizer.model": tokenizer})
    assert_holds(folder, 3)
    assert CheckpointReader(folder).extra_file("tokenizer.model").read_bytes() == tokenizer.read_bytes()


def test_replicated_parameters_are_kept_once(tmp_path: Path) -> None:
    folder = run(save, 4, tmp_path, 1, 2)[0]
    pieces = [
        (shard.tensor_index, piece.length)
        for shard in CheckpointReader(folder).manifest.shards
        for piece in shard.fragments
        if piece.parameter == "fc1.norm_weight" and piece.key == "master"
    ]
    assert {index for index, _ in pieces} == {0}
    assert sum(length for _, length in pieces) == 5


def test_files_are_plain_safetensors_with_the_usual_permissions(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    path = folder / "shard_000_00000.safetensors"
    with safe_open(path, framework="pt") as file:
        assert torch.equal(file.get_tensor("fc1.bias|exp_avg|0"), logical("fc1.bias", "exp_avg", 1))
    other = tmp_path / "other"
    other.touch()
    assert path.stat().st_mode == other.stat().st_mode


def test_a_fragment_may_be_a_strided_view(tmp_path: Path) -> None:
    wide = torch.arange(12.0).view(6, 2)
    layouts = {"w": TensorLayout((6,))}
    fragments = [Fragment("w", key, 0, wide[:, column]) for key, column in zip(KEYS, (0, 1, 0), strict=True)]
    reader = CheckpointReader(save(tmp_path, 1, fragments=fragments, layouts=layouts))
    assert torch.equal(reader.read("w", "exp_avg"), wide[:, 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_frozen_parameter_is_kept_without_moments(tmp_path: Path, dtype: torch.dtype) -> None:
    values = torch.linspace(-1, 1, 6).to(dtype)
    layouts = {"w": TensorLayout((6,)), "trained": TensorLayout((2,))}
    trained = [Fragment("trained", key, 0, torch.zeros(2)) for key in KEYS]
    frozen = Fragment("w", "master", 0, values)
    reader = CheckpointReader(save(tmp_path, 1, fragments=[*trained, frozen], layouts=layouts, frozen={"w"}))
    reader.verify()
    assert reader.frozen == {"w"}
    assert torch.equal(reader.read("w"), values.float())
    with pytest.raises(CheckpointError, match="holds no exp_avg of w, which was frozen"):
        reader.read("w", "exp_avg")
    with pytest.raises(CheckpointError, match=r"exp_avg of w .* has 0 numbers and should have 6"):
        save(tmp_path, 2, fragments=[*trained, frozen], layouts=layouts)


# Failures that a process survives -------------------------------------------------------------------------------------


def try_to_save(root: Path, step: int, tensor_size: int, changes: Mapping[int, Mapping[str, object]]) -> str:
    """The message of the CheckpointError on this process; `changes`: other content of single processes."""
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
    """All fragments, and at the end one more of `fc1.bias`, whose numbers are there already or do not exist."""

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
    """Fragments that come after another process has filled the disk."""

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


# Kills ----------------------------------------------------------------------------------------------------------------


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
    """Extra files that kill the process when they are copied, after all shards were written."""

    def items(self) -> NoReturn:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("unreachable")


def start(function: Callable[..., object], *args: object) -> BaseProcess:
    """Starts a new process. All but the first start fast, forked from a process that has imported torch."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.checkpoint_cases"])
    process = context.Process(target=function, args=args, daemon=True)
    process.start()
    return process


def save_and_die(root: Path, meeting_point: Path, process: int) -> None:
    """Saves as one of two processes, of which number 1 is killed."""
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
    """Saves every step twice, so that the second save replaces the first, and reports each save."""
    while True:
        for _ in range(2):
            save(root, step)
            connection.send(step)
        step += 1


@pytest.mark.faults
def test_kills_at_any_moment(tmp_path: Path) -> None:
    """Twelve kills at random times of saving without pause: no checkpoint that was reported as saved is lost."""
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


# Keeping and replacing ------------------------------------------------------------------------------------------------


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
