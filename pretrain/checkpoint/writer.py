"""Writes a checkpoint so that a kill, a full disk or a failing process never costs an earlier one.

All processes of the default group call `write_checkpoint` together, or the parts of `CheckpointWrite`; without a group
one process writes alone:

    begin    process 0 clears what earlier kills left and makes the staging folder `.staging_step_...`    vote
    write    every process writes its fragments and waits for the disk
    commit                                                                                                vote
             process 0 writes the manifest, checks that nothing is missing, renames the folder            vote
             process 0 moves the `latest` pointer, then removes what need not stay                        vote

`write` is no collective and may run beside the training; `commit` raises its errors.

After a vote either all processes go on, or all raise the same `CheckpointError`. The rename is the commit: before it
there is no new checkpoint, after it there is one.
"""

import errno
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
import xxhash
from pydantic import ValidationError
from torch import Tensor

from model.sharding import TensorLayout
from pretrain.checkpoint.format import (
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
    shard_name,
    step_name,
    write_tensors,
)
from pretrain.checkpoint.reader import read_manifest
from pretrain.checkpoint.retention import FEWEST, Retention, clear_leftovers, discard, prune, remove
from pretrain.disk import CHUNK_BYTES, commit_folder, replace_bytes, write_blocks
from pretrain.distributed import gather, gather_to_first, process_number, vote
from pretrain.errors import CheckpointError
from pretrain.resilience import heartbeat

SPACE_MARGIN_BYTES = 2**20
"""Bytes for headers and the manifest."""

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
    retention: Retention,
    extra_files: Mapping[str, Path],
    frozen: Collection[str] = (),
) -> Path:
    """Writes and commits one checkpoint in `root`, and returns its folder: all parts of `CheckpointWrite`."""
    content = Content(Path(root), step, layouts, state, tensor_index, tensor_size, extra_files, frozen)
    write = CheckpointWrite(content, retention)
    write.write(fragments)
    return write.commit()


@dataclass(frozen=True)
class Content:
    """What a checkpoint holds beside its fragments, and the folder `root` in which it is written.

    Parameters named in `frozen` have no moments. `state` and `extra_files` (name in the checkpoint: source) are taken
    from process 0.
    """

    root: Path
    step: int
    layouts: Mapping[str, TensorLayout]
    state: dict[str, Any]
    tensor_index: int
    tensor_size: int
    extra_files: Mapping[str, Path]
    frozen: Collection[str] = ()

    @property
    def staging(self) -> Path:
        return self.root / f".staging_{step_name(self.step)}"

    @property
    def target(self) -> Path:
        return self.root / step_name(self.step)


class CheckpointWrite:
    """One checkpoint in progress. A `CheckpointError` is the same on all processes, and earlier checkpoints stay."""

    def __init__(self, content: Content, retention: Retention) -> None:
        """Begins the checkpoint; all processes call it together."""
        self.content, self.retention = content, retention
        self._shard: ShardRecord | None = None
        self._failure: Exception | None = None
        self.committed = False
        """Whether the checkpoint exists, whatever fails afterwards."""
        self.fragments_written = 0
        """Count of this process's fragments that are written, which shows that a write goes on."""
        self._outcome = f"the checkpoint of step {content.step} was not saved, earlier ones are as they were"
        facts = gather((content.step, content.tensor_size, _digest(content.layouts)))
        with self._cleaned_up(), _vote(self._outcome, content.root):
            _check_arguments(content, retention)
            if any(theirs != facts[0] for theirs in facts):
                raise CheckpointError(
                    f"the processes disagree on (step, tensor-parallel size, parameters): {sorted(set(facts))}"
                )
            heartbeat.at("save.begin", self.content.step)
            if process_number() == 0:
                _manifest(content, [], [])
                _prepare(content)
                heartbeat.at("save.staging", self.content.step)

    def fail(self, error: Exception) -> None:
        """Notes an error from before `write`, which `commit` then raises on all processes."""
        self._failure = error

    def write(self, fragments: Iterable[Fragment]) -> None:
        """Writes this process's fragments, which are iterated once. Of replicated parameters only those of tensor index
        0 are written."""
        try:
            self._shard = _write_shard(self.content, fragments, self._count_fragment)
            heartbeat.at("save.written", self.content.step)
        except Exception as error:
            self._failure = self._failure or error

    def _count_fragment(self) -> None:
        self.fragments_written += 1

    def commit(self) -> Path:
        """Commits the checkpoint and returns its folder; all processes call it together, each after its `write`.
        Earlier checkpoints stay as far as `retention` keeps them."""
        content, first = self.content, process_number() == 0
        with self._cleaned_up():
            with _vote(self._outcome, content.staging):
                if self._failure is not None:
                    raise self._failure
            shards = gather_to_first(self._shard)
            with _vote(self._outcome, content.staging):
                if first:
                    extra = [_copy(source, content.staging / name) for name, source in content.extra_files.items()]
                    written = [record for record in shards if record is not None]
                    write_blocks(content.staging / MANIFEST_NAME, [_manifest(content, written, extra)])
                    read_manifest(content.staging)  # raises if the reader would refuse the checkpoint
                    heartbeat.at("save.manifest", self.content.step)
                    aside = _aside(content.target)
                    commit_folder(content.staging, content.target, aside, partial(heartbeat.at, "save.aside"))
        self.committed = True
        with _vote(f"the checkpoint of step {content.step} is saved, but what follows failed", content.root):
            if first:
                heartbeat.at("save.renamed", self.content.step)
                replace_bytes(content.root / LATEST_NAME, f"{content.target.name}\n".encode())
                heartbeat.at("save.pointer", self.content.step)
                if os.path.lexists(_aside(content.target)):
                    discard(_aside(content.target))
                prune(content.root, content.step, self.retention)
        return content.target

    @contextmanager
    def _cleaned_up(self) -> Iterator[None]:
        try:
            yield
        except CheckpointError:
            if process_number() == 0:
                # A second error must not hide the first; the next save clears what is left.
                shutil.rmtree(self.content.staging, ignore_errors=True)
            raise


def _vote(outcome: str, folder: Path) -> AbstractContextManager[None]:
    """Runs its body on all processes. If it failed on any, all raise the error of the first that failed, in the same
    words."""

    def explained(error: Exception) -> CheckpointError:
        process, reason = process_number(), _reason(error, folder)
        return CheckpointError(f"{outcome}: on process {process}, {reason}")

    return vote(explained)


def _reason(error: Exception, folder: Path) -> str:
    """What went wrong and what to do about it, in words."""
    if isinstance(error, CheckpointError):
        return str(error)
    if isinstance(error, OSError) and error.errno is not None:
        advice = f": {ADVICE[error.errno]}" if error.errno in ADVICE else ""
        return f"{os.strerror(error.errno)} ({error.filename or folder}){advice}"
    return f"{type(error).__name__}: {error}"


def _check_arguments(content: Content, retention: Retention) -> None:
    if not 0 <= content.step <= LARGEST_STEP:
        raise ValueError(f"step {content.step} is not between 0 and {LARGEST_STEP}")
    if not 0 <= content.tensor_index < content.tensor_size:
        raise ValueError(f"there is no tensor-parallel index {content.tensor_index} among {content.tensor_size}")
    if retention.keep < FEWEST:
        raise CheckpointError(f"{retention.keep} checkpoints are too few to keep: set checkpoint.keep to {FEWEST}")


def _digest(layouts: Mapping[str, TensorLayout]) -> str:
    """Checksum of all parameters' names and tensor layouts."""
    return xxhash.xxh3_64_hexdigest(repr(sorted((name, repr(layout)) for name, layout in layouts.items())).encode())


def _manifest(content: Content, shards: list[ShardRecord], extra_files: list[FileRecord]) -> bytes:
    """The manifest file's bytes."""
    try:
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            step=content.step,
            tensor_size=content.tensor_size,
            parameters={
                name: ParameterRecord(
                    shape=list(layout.full_shape), dim=layout.dim, stride=layout.stride, frozen=name in content.frozen
                )
                for name, layout in content.layouts.items()
            },
            shards=shards,
            extra_files=extra_files,
            state=content.state,
        )
    except ValidationError as error:
        raise CheckpointError(f"the manifest cannot hold {first_validation_error(error)}") from error
    return encode_manifest(manifest)


def _prepare(content: Content) -> None:
    """Clears leftovers, checks that there is enough room, and makes the staging folder."""
    root, extra_files = content.root, content.extra_files
    for name in extra_files:
        if not re.fullmatch(FILE_PATTERN, name):
            raise ValueError(f"the extra file {name!r} does not have a plain name")
    root.mkdir(parents=True, exist_ok=True)
    clear_leftovers(root)
    kept = {name: 1 if name in content.frozen else len(KEYS) for name in content.layouts}
    numbers = sum(prod(layout.full_shape) * kept[name] for name, layout in content.layouts.items())
    needed_bytes = FP32_BYTES * numbers + SPACE_MARGIN_BYTES
    needed_bytes += sum(source.stat().st_size for source in extra_files.values())
    free_bytes = shutil.disk_usage(root).free
    if free_bytes < needed_bytes:
        raise CheckpointError(
            f"{root} has {free_bytes / 1e9:.3f} GB free and a checkpoint takes {needed_bytes / 1e9:.3f} GB: "
            f"{ADVICE[errno.ENOSPC]}"
        )
    if content.staging.exists():  # left by a kill, and could not be removed
        remove(content.staging)
    content.staging.mkdir()


def _write_shard(
    content: Content, fragments: Iterable[Fragment], count_fragment: Callable[[], None]
) -> ShardRecord | None:
    """Writes this process's file, unless it owns nothing; calls `count_fragment` after each fragment."""
    staging, layouts, tensor_index = content.staging, content.layouts, content.tensor_index
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
    file = shard_name(tensor_index, process_number())
    shapes = {name: tuple(values.shape) for name, values in tensors.items()}
    size, checksum = write_tensors(staging / file, shapes, _in_fp32(tensors.values(), content.step, count_fragment))
    return ShardRecord(file=file, bytes=size, checksum=checksum, tensor_index=tensor_index, fragments=records)


def _in_fp32(tensors: Collection[Tensor], step: int, count_fragment: Callable[[], None]) -> Iterator[Tensor]:
    """The tensors in fp32, one at a time: copies of all frozen weights of a 16-bit run would be twice its model."""
    for number, values in enumerate(tensors):
        if number == len(tensors) // 2:
            heartbeat.at("save.shard", step)
        yield values.float()
        count_fragment()


def _copy(source: Path, target: Path) -> FileRecord:
    """Copies a file into the checkpoint."""
    with source.open("rb") as file:
        size, checksum = write_blocks(target, iter(lambda: file.read(CHUNK_BYTES), b""))
    return FileRecord(file=target.name, bytes=size, checksum=checksum)


def _aside(target: Path) -> Path:
    """Path of a checkpoint that is moved aside while a new one of the same step takes its place."""
    return target.with_name(f".replaced_{target.name}")
