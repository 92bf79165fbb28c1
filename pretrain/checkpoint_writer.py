"""Writes a checkpoint so that a kill, a full disk or a failing process never costs an earlier one.

All processes of the default group call `write_checkpoint` together; without a group one process writes alone:

    process 0 clears what earlier kills left and makes the staging folder `.staging_step_...`    vote
    every process writes its fragments and waits for the disk                                    vote
    process 0 writes the manifest, checks that nothing is missing, renames the folder            vote
    process 0 moves the `latest` pointer, then removes what is more than `keep`                  vote

A vote ends either with everybody going on or with everybody raising the same `CheckpointError`. The rename is the
commit: before it there is no new checkpoint, after it there is one. Folders to be removed are renamed first, so that a
kill during removal leaves none that is half there under a valid name.
"""

import errno
import os
import re
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from pydantic import ValidationError
from torch import Tensor

from model.sharding import TensorLayout
from pretrain.checkpoint_format import (
    CHUNK_BYTES,
    FILE_PATTERN,
    FORMAT_VERSION,
    FP32_BYTES,
    KEYS,
    LARGEST_STEP,
    LATEST_NAME,
    MANIFEST_NAME,
    FileRecord,
    Fragment,
    FragmentRecord,
    Manifest,
    ParameterRecord,
    ShardRecord,
    encode_manifest,
    first_validation_error,
    fragment_name,
    replace_file,
    shard_name,
    step_name,
    sync_folder,
    write_blocks,
    write_tensors,
)
from pretrain.checkpoint_reader import ASIDE_PATTERN, read_manifest, step_folders
from pretrain.errors import CheckpointError

LEFTOVER_PATTERN = re.compile(r"\.(staging|removed)_step_[0-9]{9,12}")
SPACE_MARGIN_BYTES = 2**20
"""Room for headers and the manifest."""

ADVICE = {
    errno.ENOSPC: "free space there, lower checkpoint.keep, or set run.folder to a larger disk",
    errno.EDQUOT: "free space there, lower checkpoint.keep, or set run.folder to a larger disk",
    errno.EROFS: "make it writable, or change run.folder",
    errno.EACCES: "make it writable, or change run.folder",
    errno.EPERM: "make it writable, or change run.folder",
}


def write_checkpoint(
    root: Path,
    step: int,
    fragments: Iterable[Fragment],
    layouts: Mapping[str, TensorLayout],
    state: dict[str, Any],
    *,
    tensor_index: int,
    tensor_size: int,
    keep: int,
    extra_files: Mapping[str, Path],
    frozen: Collection[str] = (),
) -> Path:
    """Commits one checkpoint in `root` and returns its folder; called by all processes, each with its own fragments.

    `fragments` is read once, after the staging folder is there. Of replicated parameters those of tensor index 0 count;
    parameters named in `frozen` have a master alone.
    `state` and `extra_files` (name in the checkpoint: source) are taken from process 0. Afterwards `root` holds the new
    checkpoint and at most `keep` - 1 valid earlier ones; later steps, which belong to a history that the run has left,
    are removed like surplus ones. A `CheckpointError` is the same on all processes and leaves what was there.
    """
    root = Path(root)
    first = _process() == 0
    staging, target = root / f".staging_{step_name(step)}", root / step_name(step)
    outcome = f"the checkpoint of step {step} was not saved, earlier ones are as they were"
    facts = _gather((step, tensor_size, _digest(layouts)))
    try:
        with _vote(outcome, root):
            _check_arguments(step, tensor_index, tensor_size, keep)
            if any(theirs != facts[0] for theirs in facts):
                raise CheckpointError(
                    f"the processes disagree on (step, tensor-parallel size, parameters): {sorted(set(facts))}"
                )
            if first:
                _manifest(step, tensor_size, layouts, frozen, state, [], [])
                _prepare(root, staging, layouts, frozen, extra_files)
        with _vote(outcome, staging):
            shard = _write_shard(staging, fragments, layouts, tensor_index)
        shards = _gather_to_first(shard)
        with _vote(outcome, staging):
            if first:
                extra = [_copy(source, staging / name) for name, source in extra_files.items()]
                written = [record for record in shards if record is not None]
                manifest = _manifest(step, tensor_size, layouts, frozen, state, written, extra)
                write_blocks(staging / MANIFEST_NAME, [manifest])
                read_manifest(staging)  # what the reader would refuse is not committed
                _commit(staging, target)
    except CheckpointError:
        if first:
            # The reason of the failure must not be lost to a second one; the next save clears what stays behind.
            shutil.rmtree(staging, ignore_errors=True)
        raise
    with _vote(f"the checkpoint of step {step} is saved, but what follows failed", root):
        if first:
            replace_file(root / LATEST_NAME, f"{target.name}\n".encode())
            if os.path.lexists(_aside(target)):
                _discard(_aside(target))
            _prune(root, step, keep)
    return target


def _process() -> int:
    """Number of this process in the default group."""
    return dist.get_rank() if dist.is_initialized() else 0


def _gather(value: Any) -> list[Any]:
    """Everybody's value, at everybody's."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _gather_to_first(value: Any) -> list[Any]:
    """Everybody's value at process 0, nothing elsewhere."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size() if _process() == 0 else None
    dist.gather_object(value, values)
    return values or []


@contextmanager
def _vote(outcome: str, folder: Path) -> Iterator[None]:
    """Runs its body on all processes; where it failed on one, all raise the first one's error in the same words."""
    cause = None
    try:
        yield
    except Exception as error:
        cause = error
    for process, reason in enumerate(_gather(None if cause is None else _reason(cause, folder))):
        if reason is not None:
            failure = CheckpointError(f"{outcome}: on process {process}, {reason}")
            failure.agreed = True
            raise failure from cause


def _reason(error: Exception, folder: Path) -> str:
    """What went wrong and what to do about it, for people."""
    if isinstance(error, CheckpointError):
        return str(error)
    if isinstance(error, OSError) and error.errno is not None:
        advice = f": {ADVICE[error.errno]}" if error.errno in ADVICE else ""
        return f"{os.strerror(error.errno)} ({error.filename or folder}){advice}"
    return f"{type(error).__name__}: {error}"


def _check_arguments(step: int, tensor_index: int, tensor_size: int, keep: int) -> None:
    if not 0 <= step <= LARGEST_STEP:
        raise ValueError(f"step {step} is not between 0 and {LARGEST_STEP}")
    if not 0 <= tensor_index < tensor_size:
        raise ValueError(f"there is no tensor-parallel index {tensor_index} among {tensor_size}")
    if keep < 1:
        raise CheckpointError(f"{keep} checkpoints cannot be kept: set checkpoint.keep to 1 or more")


def _digest(layouts: Mapping[str, TensorLayout]) -> str:
    """Short for all parameters and their layouts."""
    return xxhash.xxh3_64_hexdigest(repr(sorted((name, repr(layout)) for name, layout in layouts.items())).encode())


def _manifest(
    step: int,
    tensor_size: int,
    layouts: Mapping[str, TensorLayout],
    frozen: Collection[str],
    state: dict[str, Any],
    shards: list[ShardRecord],
    extra_files: list[FileRecord],
) -> bytes:
    """The manifest file's bytes."""
    try:
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            step=step,
            tensor_size=tensor_size,
            parameters={
                name: ParameterRecord(
                    shape=list(layout.full_shape), dim=layout.dim, stride=layout.stride, frozen=name in frozen
                )
                for name, layout in layouts.items()
            },
            shards=shards,
            extra_files=extra_files,
            state=state,
        )
    except ValidationError as error:
        raise CheckpointError(f"the manifest cannot hold {first_validation_error(error)}") from error
    return encode_manifest(manifest)


def _prepare(
    root: Path,
    staging: Path,
    layouts: Mapping[str, TensorLayout],
    frozen: Collection[str],
    extra_files: Mapping[str, Path],
) -> None:
    """Clears leftovers, looks for enough room, and makes the staging folder."""
    for name in extra_files:
        if not re.fullmatch(FILE_PATTERN, name):
            raise ValueError(f"the extra file {name!r} does not have a plain name")
    root.mkdir(parents=True, exist_ok=True)
    for path in list(root.iterdir()):
        if LEFTOVER_PATTERN.fullmatch(path.name):
            _remove(path)
        elif match := ASIDE_PATTERN.fullmatch(path.name):
            # A kill between the two renames of `_commit` left the old one aside and no new one.
            if (root / match[1]).exists():
                _remove(path)
            else:
                os.rename(path, root / match[1])
    numbers = sum(prod(layout.full_shape) * (1 if name in frozen else len(KEYS)) for name, layout in layouts.items())
    needed_bytes = FP32_BYTES * numbers + SPACE_MARGIN_BYTES
    needed_bytes += sum(source.stat().st_size for source in extra_files.values())
    free_bytes = shutil.disk_usage(root).free
    if free_bytes < needed_bytes:
        raise CheckpointError(
            f"{root} has {free_bytes / 1e9:.3f} GB free and a checkpoint takes {needed_bytes / 1e9:.3f} GB: "
            f"{ADVICE[errno.ENOSPC]}"
        )
    staging.mkdir()


def _write_shard(
    staging: Path, fragments: Iterable[Fragment], layouts: Mapping[str, TensorLayout], tensor_index: int
) -> ShardRecord | None:
    """Writes this process's file, unless it owns nothing."""
    if not staging.is_dir():
        raise CheckpointError(
            f"{staging}, made by process 0, is not there: set run.folder to a file system that all processes share"
        )
    records: list[FragmentRecord] = []
    tensors: dict[str, Tensor] = {}
    for fragment in fragments:
        name = fragment_name(fragment.name, fragment.key, fragment.start)
        values = fragment.values
        if fragment.name not in layouts or fragment.key not in KEYS:
            raise ValueError(f"the fragment {name} belongs to nothing that the checkpoint keeps")
        if values.dim() != 1 or values.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"the fragment {name} is {values.dtype} {tuple(values.shape)} and not 1-D float32")
        if len(values) == 0 or (tensor_index > 0 and layouts[fragment.name].dim is None):
            continue
        if name in tensors:
            raise ValueError(f"the fragment {name} was given twice")
        tensors[name] = values
        records.append(
            FragmentRecord.model_validate(
                {"parameter": fragment.name, "key": fragment.key, "start": fragment.start, "length": len(values)}
            )
        )
    if not records:
        return None
    file = shard_name(tensor_index, _process())
    shapes = {name: tuple(values.shape) for name, values in tensors.items()}
    # One at a time: fp32 copies of all frozen weights of a 16-bit run would be twice its model.
    size, checksum = write_tensors(staging / file, shapes, (values.float() for values in tensors.values()))
    return ShardRecord(file=file, bytes=size, checksum=checksum, tensor_index=tensor_index, fragments=records)


def _copy(source: Path, target: Path) -> FileRecord:
    """Copies a file into the checkpoint."""
    with source.open("rb") as file:
        size, checksum = write_blocks(target, iter(lambda: file.read(CHUNK_BYTES), b""))
    return FileRecord(file=target.name, bytes=size, checksum=checksum)


def _aside(target: Path) -> Path:
    """Where a checkpoint waits while a new one of the same step takes its place."""
    return target.with_name(f".replaced_{target.name}")


def _commit(staging: Path, target: Path) -> None:
    """Gives the staging folder its name; an older checkpoint of the same step is moved aside until that is done."""
    sync_folder(staging)
    aside = _aside(target)
    replaced = os.path.lexists(target)
    if replaced:
        os.rename(target, aside)
    try:
        os.rename(staging, target)
    except OSError:
        if replaced:
            os.rename(aside, target)
        raise
    sync_folder(target.parent)


def _prune(root: Path, step: int, keep: int) -> None:
    """Leaves the newest `keep` valid checkpoints up to `step`; invalid folders are neither counted nor touched."""
    valid = []
    for folder in step_folders(root):
        try:
            valid.append((read_manifest(folder).step, folder))
        except CheckpointError:
            continue
    kept = [folder for number, folder in valid if number <= step][:keep]
    for _, folder in valid:
        if folder not in kept:
            _discard(folder)


def _discard(folder: Path) -> None:
    """Takes a folder out of sight, then removes it."""
    gone = folder.with_name(f".removed_{folder.name.removeprefix('.replaced_')}")
    os.rename(folder, gone)
    _remove(gone)


def _remove(path: Path) -> None:
    """Removes a folder, or a link or file in its place; what a link points to stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
