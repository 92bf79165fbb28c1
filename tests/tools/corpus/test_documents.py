"""Documents come as they are, in a fixed order, and a bad file is named."""

import bz2
import gzip
import json
import lzma
from pathlib import Path

import pytest
import zstandard

from pretrain.errors import DataError
from tools.corpus.documents import find_files, read_documents, stored_bytes


def texts(inputs: list[Path], keys: tuple[str, ...] = ("text",)) -> list[str]:
    return [document.text for document in read_documents(find_files([str(path) for path in inputs]), keys)]


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def zstd(content: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(content)


CONTENT = "first\r\nsecond\n\n\tthird\r é😀 \ufeff".encode()


@pytest.mark.parametrize(
    ("suffix", "pack"), [("", bytes), (".gz", gzip.compress), (".xz", lzma.compress), (".zst", zstd)]
)
def test_text_is_read_byte_for_byte(tmp_path: Path, suffix: str, pack: type[bytes]) -> None:
    path = write(tmp_path / f"a.txt{suffix}", pack(CONTENT))
    assert texts([path]) == [CONTENT.decode()]
    lines = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in ("one", "two\nlines", ""))
    path = write(tmp_path / f"b.jsonl{suffix}", pack(lines))
    assert texts([path]) == ["one", "two\nlines", ""]


def test_large_and_joined_zstandard_frames(tmp_path: Path) -> None:
    large = "".join(f"line {n}\n" for n in range(200_000))
    path = write(tmp_path / "a.txt.zst", zstd(large.encode()) + zstd(b"") + zstd(b"tail"))
    assert texts([path]) == [large + "tail"]


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".xz", lzma.compress), (".zst", zstd)])
def test_damaged_compressed_files(tmp_path: Path, suffix: str, pack: type[bytes]) -> None:
    packed = pack(b"some text\n" * 5000)
    path = tmp_path / f"a.txt{suffix}"
    for damaged in (packed[:-3], packed[: len(packed) // 2], packed[:10], b"no such format at all"):
        write(path, damaged)
        with pytest.raises(DataError, match=rf"a\.txt\{suffix} cannot be read"):
            texts([path])
    write(path, bz2.compress(b"text"))
    with pytest.raises(DataError, match="cannot be read"):
        texts([path])


def test_folders_are_walked_in_order(tmp_path: Path) -> None:
    for name in ("b/2.txt", "b/10.txt", "a.txt", "b.txt", "c/x.py", "c/image.png", ".hidden/x.txt", "c/.x.txt"):
        write(tmp_path / name, name.encode())
    write(tmp_path / "c" / "y.jsonl.gz", gzip.compress(b'{"text": "c/y"}\n'))
    assert texts([tmp_path]) == ["a.txt", "b/10.txt", "b/2.txt", "b.txt", "c/x.py", "c/y"]
    assert texts([tmp_path / "c", tmp_path / "a.txt"]) == ["c/x.py", "c/y", "a.txt"]


def test_standard_library_is_the_interpreters_without_tests() -> None:
    files = find_files(["stdlib"])
    names = {path.name for path in files}
    assert {"argparse.py", "decoder.py", "base_events.py"} <= names
    assert len(files) > 500
    parts = {part for path in files for part in path.parts}
    assert not parts & {"test", "tests", "idle_test", "site-packages", "__pycache__"}
    assert not any(name.startswith("_sysconfigdata") for name in names)
    assert files == find_files(["stdlib"])
    assert sum(len(document.text) for document in read_documents(files, ["text"])) > 5_000_000


def test_several_keys_give_several_documents(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b'{"title": "T1", "body": "B1"}\n\n  \n{"body": "B2", "title": "T2"}')
    assert texts([path], ("title", "body")) == ["T1", "B1", "T2", "B2"]


def test_progress_ends_at_the_size_on_disk(tmp_path: Path) -> None:
    paths = [write(tmp_path / "a.txt", b"x" * 1000), write(tmp_path / "b.jsonl", b'{"text": "y"}\n' * 50)]
    paths.append(write(tmp_path / "c.txt.gz", gzip.compress(b"z" * 1000)))
    read = [document.stored_bytes_read for document in read_documents(paths, ["text"])]
    assert read == sorted(read)
    assert read[0] == 1000
    assert read[-1] == stored_bytes(paths)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', "is not JSON"),
        (b"not json", "is not JSON"),
        (b"[" * 200_000, "is not JSON"),
        (b'["text"]', "is no JSON object but list"),
        (b'"text"', "is no JSON object but str"),
        (b'{"texts": "a", "id": 1}', r"has no key 'text' .*'id', 'texts'.*--json-keys"),
        (b"{}", r"has no key 'text' .*none"),
        (b'{"text": 3}', "'text' is no text but int"),
        (b'{"text": null}', "'text' is no text but NoneType"),
        (b'{"text": "a\xff"}', "is not UTF-8 text at byte 11"),
        (b'{"text": "ab\\ud800c"}', "half of a surrogate pair at character 2"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: bytes, message: str) -> None:
    path = write(tmp_path / "a.jsonl", b'{"text": "good"}\n\n' + line + b'\n{"text": "good"}\n')
    with pytest.raises(DataError, match=rf"a\.jsonl, line 3: .*{message}"):
        texts([path])


def test_bad_inputs_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing\.txt does not exist: change --input"):
        find_files([str(tmp_path / "nothing.txt")])
    with pytest.raises(DataError, match=r"holds no \.txt, \.py, \.jsonl files"):
        find_files([str(tmp_path)])
    with pytest.raises(DataError, match=r"a\.parquet is of no known kind"):
        find_files([str(write(tmp_path / "a.parquet", b""))])
    with pytest.raises(DataError, match=r"b\.txt is not UTF-8 text at byte 3"):
        texts([write(tmp_path / "b.txt", b"abc\xe9def")])
