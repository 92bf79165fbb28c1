"""Tests of how files reach the disk and are read."""

import errno
import json
import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from safetensors import SafetensorError

from pretrain.disk import JsonLines, decode_json, new_folder, replace_bytes, replace_text, write_blocks
from pretrain.errors import CheckpointError


@contextmanager
def files_up_to(size_bytes: int) -> Iterator[None]:
    """Limits the size of files, in place of a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ('{"a": NaN}', "NaN"),
        ('{"a": -Infinity}', "-Infinity"),
        ('{"a": 1e999}', "1e999"),
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "'c' occurs twice"),
        ("[" * 200_000, "not valid JSON"),
        ("[1]", "not a JSON object but a list"),
        ('{"a": ' + "9" * 10_000 + "}", "not valid JSON"),
    ],
)
def test_json_that_is_refused(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        decode_json(text.encode())


def test_bytes_that_are_no_text() -> None:
    with pytest.raises(ValueError, match="not valid JSON"):
        decode_json(b"\xff\xfe{}")


def test_files_are_never_overwritten_in_place(tmp_path) -> None:
    path = tmp_path / "file"
    write_blocks(path, [b"old"])
    with pytest.raises(FileExistsError):
        write_blocks(path, [b"new"])
    replace_bytes(path, json.dumps({"new": 1}).encode())
    assert json.loads(path.read_bytes()) == {"new": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_failed_replacement_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        replace_text(path, "new \ud800")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_lines_of_later_steps_and_a_torn_one_are_cut(tmp_path):
    lines = JsonLines(tmp_path / "metrics.jsonl")
    lines.cut(5)
    for step in (1, 5, 10):
        lines.append({"step": step})
    with lines.path.open("a") as file:
        file.write('{"step": 1')
    lines.cut(5)
    assert lines.path.read_text() == '{"step": 1}\n{"step": 5}\n'
    lines.cut(None)
    assert [record["step"] for record in lines.read()] == [1, 5]


def test_numbers_that_json_lacks_become_null(tmp_path):
    lines = JsonLines(tmp_path / "metrics.jsonl")
    lines.append({"loss": float("nan"), "inner": {"norm": [float("inf"), 1.0]}})
    assert json.loads(lines.path.read_text()) == {"loss": None, "inner": {"norm": [None, 1.0]}}


def test_a_line_that_did_not_fit_leaves_the_file_as_it_was(tmp_path):
    lines = JsonLines(tmp_path / "metrics.jsonl")
    lines.append({"step": 1})
    with files_up_to(40), pytest.raises(OSError, match="took only part of a line"):
        lines.append({"step": 2, "text": 100 * "x"})
    assert lines.path.read_text() == '{"step": 1}\n'


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "out could not be written .*: free space there"),
        (FileNotFoundError(errno.ENOENT, "No such file", "/in/a.model"), "out is not made, .* read: .*/in/a.model"),
        (SafetensorError("invalid header"), "out is not made, .* cannot be read: invalid header"),
    ],
)
def test_a_new_folder_tells_what_is_read_from_what_is_written(tmp_path: Path, error: Exception, words: str) -> None:
    with pytest.raises(CheckpointError, match=words), new_folder(tmp_path / "out"):
        raise error
    assert not list(tmp_path.iterdir())


def test_a_new_folder_where_a_file_stands_is_not_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="out could not be written"), new_folder(tmp_path / "file" / "out"):
        pass
