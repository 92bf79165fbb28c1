"""Reads checkpoints: any logical tensor, or any shard of it, whatever parallel layout wrote it.

The one reader of resume, consolidate, inspect and export. It needs no process group and imports neither DeepSpeed nor
megatron-core. Sizes are checked before anything is allocated: the manifest against itself and against the sizes of the
files when it is opened, every file's header against the manifest before the file is read. Only `verify` reads all
bytes, and finds a flipped bit.
"""

import logging
import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.sharding import TensorLayout
from pretrain.checkpoint.format import (
    KEYS,
    MANIFEST_LIMIT_BYTES,
    MANIFEST_NAME,
    STEP_PATTERN,
    Manifest,
    ShardRecord,
    decode_manifest,
    fragment_name,
    open_tensors,
    step_name,
)
from pretrain.disk import file_checksum, plain_file_bytes, read_limited
from pretrain.errors import CheckpointError
from pretrain.tokenizer.base import FILE_NAMES, main_file

_log = logging.getLogger(__name__)

ASIDE_PATTERN = re.compile(r"\.replaced_(step_[0-9]{9,12})")
"""A checkpoint that was moved aside for a new one of the same step; it counts while there is no new one."""


def read_manifest(folder: Path) -> Manifest:
    """The manifest of one step's folder, checked against itself and against the sizes of the files beside it."""
    if folder.is_symlink():
        raise CheckpointError(f"{folder} is a symbolic link, which is not followed: give the checkpoint folder itself")
    path = folder / MANIFEST_NAME
    data = read_limited(path, MANIFEST_LIMIT_BYTES)
    try:
        manifest = decode_manifest(data)
    except CheckpointError as error:
        raise CheckpointError(f"{path} cannot be used: {error}") from error
    if STEP_PATTERN.fullmatch(folder.name) and folder.name != step_name(manifest.step):
        raise CheckpointError(f"{path} is of step {manifest.step}, which is not what its folder is called")
    for record in manifest.files:
        size = plain_file_bytes(folder / record.file)
        if size != record.bytes:
            raise CheckpointError(f"{folder / record.file} has {size} bytes and should have {record.bytes}")
    return manifest


class CheckpointReader:
    """One step's checkpoint, open for reading; a folder that cannot be trusted is refused with a `CheckpointError`."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self.layouts, self.frozen = self.manifest.layouts, self.manifest.frozen
        self._pieces: dict[tuple[str, str, int], list[tuple[ShardRecord, int, int]]] = {}
        for shard in self.manifest.shards:
            for piece in shard.fragments:
                where = (piece.parameter, piece.key, shard.tensor_index)
                self._pieces.setdefault(where, []).append((shard, piece.start, piece.length))
        # Open files cost address space and no descriptors, so all of them may stay open.
        self._handles: dict[str, Any] = {}

    @property
    def step(self) -> int:
        return self.manifest.step

    @property
    def state(self) -> dict[str, Any]:
        """What the trainer put beside the tensors."""
        return self.manifest.state

    @property
    def tensor_size(self) -> int:
        """Tensor-parallel processes of the run that wrote it."""
        return self.manifest.tensor_size

    @property
    def extra_files(self) -> set[str]:
        """Names of the files that were given to the writer as they are."""
        return {record.file for record in self.manifest.extra_files}

    def extra_file(self, name: str) -> Path:
        """Path of a file that was given to the writer as it is, such as `tokenizer.model`."""
        if name not in self.extra_files:
            raise CheckpointError(f"{self.folder} holds no {name}")
        return self.folder / name

    def tokenizer_files(self) -> dict[str, Path]:
        """What is kept of the run's tokenizer, by `Tokenizer.files`'s names; the first one is to be opened."""
        main = main_file(self.extra_files)
        if main is None:
            raise CheckpointError(f"{self.folder} holds no tokenizer")
        return {name: self.folder / name for name in [main, *sorted(self.extra_files & set(FILE_NAMES) - {main})]}

    def close(self) -> None:
        """Lets go of the files, which may then be removed on any file system; they are opened anew where needed."""
        self._handles.clear()

    def verify(self, index: int = 0, processes: int = 1) -> None:
        """Reads all files again and compares their checksums; of `processes` readers, that number `index` takes its
        share of the files."""
        for record in self.manifest.files[index::processes]:
            path = self.folder / record.file
            plain_file_bytes(path)
            try:
                checksum = file_checksum(path)
            except OSError as error:
                raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
            if checksum != record.checksum:
                raise CheckpointError(f"{path} is damaged: its checksum is {checksum} and should be {record.checksum}")
            if isinstance(record, ShardRecord):
                self._handle(record)

    def read(self, name: str, key: str = "master") -> Tensor:
        """The logical tensor `(full_shape)` of a parameter, fp32 and in memory of its own."""
        layout = self._layout(name, key)
        indices = range(1 if layout.dim is None else self.tensor_size)
        return layout.unshard([self._read_written_shard(name, key, index) for index in indices])

    def read_shard(self, name: str, key: str, index: int, processes: int) -> Tensor:
        """The shard that tensor-parallel process `index` of `processes` holds, contiguous, in memory of its own."""
        layout = self._layout(name, key)
        if not 0 <= index < processes:
            raise ValueError(f"there is no tensor-parallel index {index} among {processes}")
        if layout.dim is None:
            return self.read(name, key)
        if processes == self.tensor_size:
            return self._read_written_shard(name, key, index)
        if layout.full_shape[layout.dim] % (layout.stride * processes):
            raise CheckpointError(
                f"dimension {layout.dim} of {name} {layout.full_shape} does not divide into {layout.stride} blocks "
                f"over {processes} tensor-parallel processes: change parallel.tensor"
            )
        full = self.read(name, key)
        if processes == 1:
            return full
        # A view would keep the whole tensor in memory.
        return layout.shard(full, index, processes).clone(memory_format=torch.contiguous_format)

    def _layout(self, name: str, key: str) -> TensorLayout:
        if name not in self.layouts:
            raise CheckpointError(f"{self.folder} holds no parameter {name}")
        if key not in KEYS:
            raise ValueError(f"{key!r} is none of {KEYS}")
        if key != "master" and name in self.frozen:
            raise CheckpointError(f"{self.folder} holds no {key} of {name}, which was frozen")
        return self.layouts[name]

    def _handle(self, shard: ShardRecord) -> Any:
        """The open file, its header checked against the manifest."""
        handle = self._handles.get(shard.file)
        if handle is None:
            path = self.folder / shard.file
            handle, found = open_tensors(path)
            expected = {fragment_name(p.parameter, p.key, p.start): (p.length,) for p in shard.fragments}
            if found != expected:
                name = min(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
                raise CheckpointError(
                    f"{path} holds {name!r} with shape {found.get(name)}, and the manifest says {expected.get(name)}"
                )
            self._handles[shard.file] = handle
        return handle

    def _read_written_shard(self, name: str, key: str, index: int) -> Tensor:
        """A shard of the tensor layout in the files, put together from its fragments."""
        pieces = self._pieces[name, key, index]
        handles = [self._handle(shard) for shard, _, _ in pieces]
        shape = self.layouts[name].shard_shape(self.tensor_size)
        flat = torch.empty(math.prod(shape), dtype=torch.float32)
        for handle, (_, start, length) in zip(handles, pieces, strict=True):
            flat[start : start + length] = handle.get_tensor(fragment_name(name, key, start))
        return flat.view(shape)


def step_folders(root: Path) -> list[Path]:
    """What looks like a checkpoint in `root`, newest step first; nothing is said about its content.

    A folder that a save of the same step had moved aside stands in for it until the new one has its name.
    """
    if not root.is_dir():
        return []
    found = {path.name: path for path in root.iterdir() if STEP_PATTERN.fullmatch(path.name)}
    for path in root.iterdir():
        if match := ASIDE_PATTERN.fullmatch(path.name):
            found.setdefault(match[1], path)
    return [found[name] for name in sorted(found, key=lambda name: int(name.removeprefix("step_")), reverse=True)]


def find_checkpoint(root: Path, *, verify: bool = False) -> Path | None:
    """Folder of the newest valid checkpoint in `root`; None only where there is none at all, valid or not.

    All steps are looked at, newest first, and the `latest` file is not: a kill between commit and pointer leaves it
    behind. Invalid ones are passed over with a warning. With `verify`, checksums count as well.
    """
    reasons = []
    for folder in step_folders(Path(root)):
        try:
            reader = CheckpointReader(folder)
            if verify:
                reader.verify()
        except CheckpointError as error:
            _log.warning("passing over a checkpoint: %s", error)
            reasons.append(str(error))
            continue
        return folder
    if reasons:
        raise CheckpointError(
            f"none of the {len(reasons)} checkpoints in {root} is valid ({'; '.join(reasons)}): restore one of them, "
            "or set another run.folder to start from scratch"
        )
    return None


def locate_checkpoint(path: Path, *, verify: bool = False) -> Path:
    """The checkpoint a user means: a step's folder itself, or the newest valid one of a checkpoints or run folder."""
    path = Path(path)
    if STEP_PATTERN.fullmatch(path.resolve().name) or (path / MANIFEST_NAME).exists():
        if verify:
            CheckpointReader(path).verify()
        return path
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    found = find_checkpoint(root, verify=verify)
    if found is None:
        raise CheckpointError(
            f"there is no checkpoint in {root}: give a run folder, its checkpoints folder, or the folder of one step"
        )
    return found
