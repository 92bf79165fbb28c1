"""Writes files and folders so that they reach the disk whole; reads foreign files strictly, and up to a size limit."""

import contextlib
import errno
import json
import math
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import xxhash
from safetensors import SafetensorError

from pretrain.errors import CheckpointError

CHUNK_BYTES = 8 * 2**20
_DISK_FAILURES = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}


def flush_to_disk(path: Path) -> None:
    """Waits until the disk has a file, or the names in a folder, so that both survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_blocks(path: Path, blocks: Iterable[bytes | memoryview]) -> tuple[int, str]:
    """Writes a new file and waits for the disk; its size in bytes and its checksum.

    The checksum is that of the blocks in memory, so a fault between memory and disk shows when the file is verified.
    """
    digest = xxhash.xxh3_128()
    size = 0
    with path.open("xb") as file:
        for block in blocks:
            digest.update(block)
            size += file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return size, digest.hexdigest()


def file_checksum(path: Path) -> str:
    """xxh3_128 of the file."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A name beside `path` for a new file. At the end it takes the place of `path`; if anything fails, it is
    removed."""
    staging = path.with_name(f".{path.name}.{os.getpid()}")
    staging.unlink(missing_ok=True)
    try:
        yield staging
        commit_files({staging: path})
    finally:
        staging.unlink(missing_ok=True)


def replace_bytes(path: Path, content: bytes) -> None:
    """Writes a whole file, or leaves the old one."""
    with new_file(path) as staging:
        write_blocks(staging, [content])


def replace_text(path: Path, text: str) -> None:
    """Writes a whole file, or leaves the old one."""
    replace_bytes(path, text.encode())


def commit_files(names: Mapping[Path, Path]) -> None:
    """Gives finished files the names they map to, in order and all in one folder, and waits for the disk."""
    for staged, path in names.items():
        flush_to_disk(staged)
        staged.replace(path)
    flush_to_disk(path.parent)


def commit_folder(staging: Path, target: Path, aside: Path, moved_aside: Callable[[], object] = lambda: None) -> None:
    """Gives the folder `staging` the name `target`.

    A folder that has this name already is moved to `aside`, and back if the renaming fails. `moved_aside` is called
    between the two renames. The caller removes `aside` afterwards.
    """
    flush_to_disk(staging)
    replaced = os.path.lexists(target)
    if replaced:
        os.rename(target, aside)
        moved_aside()
    try:
        os.rename(staging, target)
    except OSError:
        if replaced:
            os.rename(aside, target)
        raise
    flush_to_disk(target.parent)


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A new folder beside `output`. At the end it takes the name of `output`; if anything fails, it is removed.

    The caller checks before whether `output` may be replaced.
    """
    staging = output.with_name(f".{output.name}.partial")
    aside = output.with_name(f".{output.name}.replaced")
    try:
        if staging.exists():
            shutil.rmtree(staging)  # of a run that was killed
        staging.mkdir(parents=True)
        yield staging
        if aside.exists():
            shutil.rmtree(aside)
        commit_folder(staging, output, aside)
    except (OSError, SafetensorError) as error:
        if not _is_of_writing(error, staging, output, aside):
            raise CheckpointError(f"{output} is not made, since what goes into it cannot be read: {error}") from error
        raise CheckpointError(
            f"{output} could not be written ({error}): free space there, make it writable, or give another --output"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if output.exists():
            shutil.rmtree(aside, ignore_errors=True)


def _is_of_writing(error: Exception, *written: Path) -> bool:
    """Whether it is the disk, one of the `written` folders or one above that failed, and not something that was read. A
    write to a full disk names no file."""
    if not isinstance(error, OSError):
        return False
    named = [Path(os.fsdecode(name)) for name in (error.filename, error.filename2) if isinstance(name, (str, bytes))]
    return error.errno in _DISK_FAILURES or any(
        path.is_relative_to(folder) or folder.is_relative_to(path) for path in named for folder in written
    )


def plain_file_bytes(path: Path) -> int:
    """Size of a regular file; links are refused, as they may lead out of the folder."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path} is not a regular file (links are not followed)")
    return status.st_size


def read_limited(path: Path, limit_bytes: int) -> bytes:
    """The bytes of a regular file; CheckpointError if it has more than `limit_bytes`."""
    size = plain_file_bytes(path)
    if size > limit_bytes:
        raise CheckpointError(f"{path} has {size} bytes, and {limit_bytes} is the most such a file can have")
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error


def decode_json(data: bytes | str) -> dict[str, Any]:
    """A JSON object, without NaN, infinities, repeated keys or bottomless nesting; ValueError for anything else."""
    try:
        text = data.decode() if isinstance(data, bytes) else data
        content = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"it is not a JSON object but a {type(content).__name__}")
    return content


def read_json(path: Path, limit_bytes: int) -> dict[str, Any]:
    """The object in a regular JSON file; CheckpointError if it is none, or has more than `limit_bytes`."""
    data = read_limited(path, limit_bytes)
    try:
        return decode_json(data)
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be used: {error}") from error


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is too large for a number")
    return number


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r} occurs twice")
    return found


def json_text(value: Any, indent: int | None = None) -> str:
    """JSON for any reader: NaN and infinity, which JSON lacks, become null."""

    def finite(item: Any) -> Any:
        if isinstance(item, dict):
            return {key: finite(inner) for key, inner in item.items()}
        if isinstance(item, (list, tuple)):
            return [finite(inner) for inner in item]
        return None if isinstance(item, float) and not math.isfinite(item) else item

    return json.dumps(finite(value), indent=indent, allow_nan=False)


class JsonLines:
    """A file of one JSON object per line."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, record: dict[str, Any]) -> None:
        """Adds one line; after an OSError the file is as it was before."""
        line = json_text(record) + "\n"
        with self.path.open("ab", buffering=0) as file:
            before = file.tell()
            try:
                if file.write(line.encode()) < len(line.encode()):
                    raise OSError(f"{self.path} took only part of a line")
            except OSError:
                file.truncate(before)
                raise

    def read(self) -> list[dict[str, Any]]:
        """All records; lines that hold none, such as one torn by a kill, are left out."""
        if not self.path.exists():
            return []
        records = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError, RecursionError):
                record = json.loads(line)
                if isinstance(record, dict) and isinstance(record.get("step"), int):
                    records.append(record)
        return records

    def cut(self, last_step: int | None) -> None:
        """Drops torn lines, and lines whose step is after `last_step` (None: keeps all steps)."""
        if not self.path.exists():
            return
        kept = [record for record in self.read() if last_step is None or record["step"] <= last_step]
        replace_text(self.path, "".join(json_text(record) + "\n" for record in kept))
