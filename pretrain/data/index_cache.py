"""The folder with the order of the samples: written once, by the first process, and read by all.

megatron-core builds the indices on the first process, and unpickles on all processes what it finds in its cache. So the
folder is made anew at every start, only this user can enter it, and nothing that was found there is ever used.
Nodes that do not see the first process's folder get a copy of its files, written by one process of each.
"""

import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from pretrain.distributed import together
from pretrain.errors import DataError

INDEX_FOLDER = "sample_indices"
_MARK = "mark"
_CHUNK_BYTES = 1 << 24

Datasets = TypeVar("Datasets")
Build = Callable[[Path, Callable[[], bool]], Datasets]
"""Builds megatron-core's datasets with the indices in the given folder; the second argument says whether this process
builds any. A collective."""


def build_in_order(cache: Path, needed_bytes: int, build: Build[Datasets]) -> Datasets:
    """Writes the indices below `cache`, and returns the datasets that use them; a collective of the default process
    group, if there is one."""
    folder = cache / INDEX_FOLDER
    if not dist.is_initialized():
        _make_folder(folder, needed_bytes)
        return build(folder, lambda: True)
    is_first = dist.get_rank() == 0
    together(lambda: _make_folder(folder, needed_bytes) if is_first else None)
    marks: list[Any] = [_mark(folder) if is_first else None]
    dist.broadcast_object_list(marks, src=0)
    sees = _mark(folder) == marks[0]
    seeing: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(seeing, sees)
    if not all(seeing):
        # In megatron-core only the first process builds; the others look into their folder right after that.
        build(folder, lambda: is_first)
        place = dist.get_node_local_rank(fallback_rank=0)
        copy = folder if sees else cache / f"{INDEX_FOLDER}_of_process_{dist.get_rank() - place}"
        copies = not sees and place == 0
        together(lambda: _make_folder(copy, needed_bytes) if copies else None)
        _send_files(folder if is_first else None, copy if copies else None)
        folder = copy
    return build(folder, lambda: True)


def _send_files(source: Path | None, target: Path | None) -> None:
    """Copies the files of the first process's `source` to `target` on processes that give one; a collective."""
    pieces = _pieces(source) if source is not None else None
    while True:
        sent: list[Any] = [next(pieces, None) if pieces is not None else None]
        dist.broadcast_object_list(sent, src=0)
        if sent[0] is None:
            return
        together(lambda piece=sent[0]: _append(target, *piece))  # type: ignore[misc]


def _pieces(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Name and next bytes of every file."""
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            while content := file.read(_CHUNK_BYTES):
                yield path.name, content


def _append(folder: Path | None, name: str, content: bytes) -> None:
    if folder is None:
        return
    try:
        with (folder / name).open("ab") as file:
            file.write(content)
    except OSError as error:
        raise DataError(
            f"{folder / name} cannot be written ({error.strerror}): free space or set data.cache to another folder"
        ) from error


def _mark(folder: Path) -> str | None:
    """The mark of a folder, which tells it from others of the same path; None if there is no folder here."""
    try:
        return (folder / _MARK).read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return None


def _make_folder(folder: Path, needed_bytes: int) -> None:
    """Makes an empty folder that only this user can enter, with a mark that tells it from others of the same path. An
    error if the disk has no room for the indices."""
    try:
        if folder.is_symlink() or folder.is_file():
            folder.unlink()
        elif folder.exists():
            shutil.rmtree(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700)
        free_bytes = shutil.disk_usage(folder).free
        (folder / _MARK).write_text(secrets.token_hex(16), encoding="ascii")
    except OSError as error:
        raise DataError(
            f"{error.filename or folder} cannot be made anew ({error.strerror}): set data.cache to a folder of your own"
        ) from error
    if free_bytes < needed_bytes:
        raise DataError(
            f"{folder} has no space left for the order of the samples: {free_bytes:,} bytes are free and about "
            f"{needed_bytes:,} are needed; free some or set data.cache"
        )
