"""Text documents from files, folders and the standard library, in an order that is the same on every machine.

| input | documents |
|---|---|
| `FILE.txt`, `FILE.py` | one: the file as it is, line ends included |
| `FILE.jsonl` | one for each line and key: the texts under `--json-keys` |
| folder | the files above in it and below it, sorted; hidden files and folders are left out |
| `stdlib` | the source of the interpreter's own standard library, without its tests (`./stdlib` is a folder) |

Each file may be compressed (`.gz`, `.xz`, `.zst`) and is read as UTF-8.
"""

import gzip
import io
import json
import lzma
import os
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import zstandard

from pretrain.errors import DataError

KINDS = (".txt", ".py", ".jsonl")
COMPRESSIONS = (".gz", ".xz", ".zst")
STANDARD_LIBRARY = "stdlib"
# Tests, other people's packages, and what the build of this interpreter left behind.
_NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_BUILD_LEFTOVERS = ("config-", "_sysconfigdata")
_BLOCK_BYTES = 1 << 18


@dataclass(frozen=True)
class Document:
    """One text."""

    text: str
    stored_bytes_read: int
    """Bytes on disk read so far, of all inputs, for a progress bar."""


def find_files(inputs: Sequence[str]) -> list[Path]:
    """The files the inputs stand for, in order."""
    files: list[Path] = []
    for name in inputs:
        path = Path(name)
        if name == STANDARD_LIBRARY:
            found = _standard_library()
        elif path.is_dir():
            found = [file for file in _walk(path) if _kind(file)]
        elif path.is_file():
            found = [path]
            if not _kind(path):
                raise DataError(
                    f"{path} is of no known kind: give --input files that end in {', '.join(KINDS)} (and perhaps in "
                    f"{', '.join(COMPRESSIONS)}), folders of them, or {STANDARD_LIBRARY}"
                )
        else:
            raise DataError(f"{path} does not exist: change --input")
        if not found:
            raise DataError(f"{path} holds no {', '.join(KINDS)} files: change --input")
        files += found
    return files


def stored_bytes(files: Sequence[Path]) -> int:
    """Size of the files on disk."""
    return sum(file.stat().st_size for file in files)


def read_documents(files: Sequence[Path], json_keys: Sequence[str]) -> Iterator[Document]:
    """The documents in the files, in order; DataError names the file, and the line, that is no good."""
    read_before = 0
    for path in files:
        try:
            with path.open("rb") as stored, _decompressed(stored, path.suffix) as content:
                texts = _json_texts(path, content, json_keys) if _kind(path) == ".jsonl" else _whole_text(path, content)
                for text in texts:
                    yield Document(text, read_before + stored.tell())
        except (OSError, EOFError, lzma.LZMAError, zlib.error, zstandard.ZstdError) as error:
            raise DataError(f"{path} cannot be read ({error}): mend the file or leave it out of --input") from error
        read_before += path.stat().st_size


def _kind(path: Path) -> str | None:
    """The suffix in front of the compression's, if it is one we read."""
    plain = path.with_suffix("") if path.suffix in COMPRESSIONS else path
    return plain.suffix if plain.suffix in KINDS else None


def _walk(folder: Path, left_out: frozenset[str] | set[str] = frozenset()) -> list[Path]:
    """Files below `folder`, sorted by their path parts."""
    files = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in left_out and not name.startswith(".")]
        files += [Path(parent, name) for name in names if not name.startswith(".")]
    return sorted((file for file in files if file.is_file()), key=lambda file: file.relative_to(folder).parts)


def _standard_library() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    return [
        file
        for file in _walk(root, _NOT_LIBRARY)
        if file.suffix == ".py" and not file.relative_to(root).parts[0].startswith(_BUILD_LEFTOVERS)
    ]


def _decompressed(stored: IO[bytes], suffix: str) -> IO[bytes]:
    if suffix == ".gz":
        return gzip.GzipFile(fileobj=stored)  # type: ignore[return-value]
    if suffix == ".xz":
        return lzma.LZMAFile(stored)
    if suffix == ".zst":
        return io.BufferedReader(_ZstandardFrames(stored))
    return stored


class _ZstandardFrames(io.RawIOBase):
    """Decompressed content of a file of Zstandard frames.

    zstandard's own reader takes a file that was cut off for a complete one.
    """

    def __init__(self, stored: IO[bytes]) -> None:
        self._stored = stored
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._frame_begun = False
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        while not self._ready:
            block = self._frame.unused_data or self._stored.read(_BLOCK_BYTES)
            if self._frame.eof:
                self._frame, self._frame_begun = zstandard.ZstdDecompressor().decompressobj(), False
            if not block:
                if self._frame_begun:
                    raise EOFError("the file ends inside a Zstandard frame")
                return 0
            self._ready, self._frame_begun = self._frame.decompress(block), True
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count


def _whole_text(path: Path, content: IO[bytes]) -> Iterator[str]:
    try:
        yield content.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text at byte {error.start}: convert it or leave it out") from error


def _json_texts(path: Path, content: IO[bytes], keys: Sequence[str]) -> Iterator[str]:
    for number, line in enumerate(content, start=1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            record = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise DataError(
                f"{place}: is not UTF-8 text at byte {error.start} of the line: convert the file"
            ) from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"{place}: is not JSON ({error}): mend or remove the line") from error
        if not isinstance(record, dict):
            raise DataError(f"{place}: is no JSON object but {type(record).__name__}: mend or remove the line")
        for key in keys:
            if key not in record:
                has = ", ".join(map(repr, sorted(record)[:8])) or "none"
                raise DataError(f"{place}: has no key {key!r} (it has {has}): name the text's key with --json-keys")
            text = record[key]
            if not isinstance(text, str):
                raise DataError(
                    f"{place}: {key!r} is no text but {type(text).__name__}: name the text's key with --json-keys"
                )
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                raise DataError(
                    f"{place}: {key!r} holds half of a surrogate pair at character {error.start}, which is no text: "
                    "mend or remove the line"
                ) from error
            yield text
