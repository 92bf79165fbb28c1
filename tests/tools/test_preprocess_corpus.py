"""The corpus tool: the same files whatever the workers, nothing half-written, refusals in one sentence."""

import argparse
import contextlib
import errno
import fcntl
import gzip
import inspect
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from pretrain.data.index_check import check_index, files_of
from pretrain.errors import ConfigError, DataError
from pretrain.tokenizer.base import Tokenizer
from tests.support.small_corpus import small_tokenizer
from tools import preprocess_corpus as tool
from tools.corpus import parts
from tools.corpus.documents import find_files
from tools.corpus.parts import PartFolder
from tools.preprocess_corpus import Job, preprocess

TEXTS = ["def f():\r\n\treturn 1\n", "a\u2581b", "", "é😀\n\n  x", "</s> <0x0A> <|end of document|>", "\u2581"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    path = tmp_path / "in" / "texts.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr("sys.argv", ["preprocess_corpus.py", *map(str, arguments)])
    tool.main()


def documents_of(prefix: Path) -> list[list[int]]:
    dataset = IndexedDataset(str(prefix))
    return [dataset[n].tolist() for n in range(len(dataset))]


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_corpus_holds_the_documents(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    tokenizer: Tokenizer,
    lines: Path,
) -> None:
    prefix = tmp_path / "out" / "deep" / "corpus"
    flags = ("--input", lines, "--output-prefix", prefix, "--tokenizer-model", tokenizer.path)
    call(monkeypatch, *flags, "--append-eod")
    end = tokenizer.end_of_document
    kept = [text for text in TEXTS if text]
    assert documents_of(prefix) == [[*tokenizer.encode(text), end] for text in kept]
    facts = check_index(prefix, tokenizer.vocabulary, tokenizer.fingerprint)
    assert facts.documents == len(kept)
    assert facts.text_bytes == sum(len(text.encode()) for text in kept)
    assert facts.round_trip_exceptions == 2
    assert facts.end_of_document
    assert names_in(prefix.parent) == ["corpus.bin", "corpus.idx", "corpus.json"]
    report = capsys.readouterr().out
    assert f"{facts.documents} documents, {facts.tokens} tokens (uint16)" in report
    assert "tokens/s" in report
    assert "2 documents do not decode to themselves" in report
    call(monkeypatch, *flags, "--overwrite")
    assert documents_of(prefix) == [tokenizer.encode(text) for text in kept]


def test_output_does_not_depend_on_workers_batches_or_compression(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    files = find_files(["stdlib"])[::40]
    packed = []
    for path in files:
        packed.append(tmp_path / "packed" / f"{path.stem}.py.gz")
        packed[-1].parent.mkdir(exist_ok=True)
        packed[-1].write_bytes(gzip.compress(path.read_bytes()))
    preprocess(files, tmp_path / "one", tokenizer.path)
    expected = [path.read_bytes() for path in files_of(tmp_path / "one")]
    monkeypatch.setattr(parts, "BATCH_CHARACTERS", 30_000)
    preprocess(files, tmp_path / "three", tokenizer.path, workers=3)
    assert [path.read_bytes() for path in files_of(tmp_path / "three")] == expected
    preprocess(packed, tmp_path / "packed_corpus", tokenizer.path)
    assert [path.read_bytes() for path in files_of(tmp_path / "packed_corpus")] == expected


def test_an_existing_corpus_is_kept_without_overwrite(tmp_path: Path, tokenizer: Tokenizer, lines: Path) -> None:
    prefix = tmp_path / "corpus"
    preprocess([lines], prefix, tokenizer.path)
    before = [path.read_bytes() for path in files_of(prefix)]
    with pytest.raises(DataError, match=r"corpus exists: add --overwrite or change --output-prefix"):
        preprocess([lines], prefix, tokenizer.path, append_eod=False)
    assert [path.read_bytes() for path in files_of(prefix)] == before


@pytest.mark.parametrize("name", ["corpus.bin", "corpus.idx", "corpus.json"])
def test_foreign_files_are_never_overwritten(tmp_path: Path, tokenizer: Tokenizer, lines: Path, name: str) -> None:
    (tmp_path / name).write_text("someone's own")
    with pytest.raises(DataError, match=rf"{name} exists and was not written by this tool"):
        preprocess([lines], tmp_path / "corpus", tokenizer.path, overwrite=True)
    assert (tmp_path / name).read_text() == "someone's own"


def twenty_files(folder: Path) -> list[Path]:
    """Documents of 20,000 characters each, no two alike."""
    text = "".join(Path(str(module.__file__)).read_text(encoding="utf-8") for module in (argparse, inspect, tarfile))
    assert len(text) > 20 * 6_000
    folder.mkdir()
    files = [folder / f"{number:02d}.py" for number in range(20)]
    for number, path in enumerate(files):
        path.write_text(f"# {number}\n" + text[number * 6_000 : number * 6_000 + 20_000], encoding="utf-8")
    return files


def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many units of many parts, out of little text."""
    monkeypatch.setattr(parts, "UNIT_BYTES", 40_000)
    monkeypatch.setattr(parts, "BATCH_CHARACTERS", 5_000)
    monkeypatch.setattr(parts, "PART_CHARACTERS", 15_000)


def test_the_same_command_goes_on_where_it_was_ended(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    """Whatever part was the last one, and it does not tokenize again what is there."""
    files = twenty_files(tmp_path / "files")
    preprocess(files, tmp_path / "whole", tokenizer.path)
    expected = [path.read_bytes() for path in files_of(tmp_path / "whole")]
    small_parts(monkeypatch)
    prefix, commit, done = tmp_path / "corpus", PartFolder._commit, list[str | None]()

    def commit_three_and_end(folder: PartFolder, *arguments: Any) -> None:
        if len(done) % 4 == 3:
            done.append(None)
            raise KeyboardInterrupt
        commit(folder, *arguments)
        done.append(arguments[1].name)

    monkeypatch.setattr(PartFolder, "_commit", commit_three_and_end)
    interruptions = 0
    while True:
        try:
            preprocess(files, prefix, tokenizer.path)
        except KeyboardInterrupt:
            assert (tmp_path / "corpus.parts").is_dir()
            interruptions += 1
            continue
        break
    assert interruptions > 3
    names = [name for name in done if name is not None]
    assert len(names) == len(set(names)) > 10
    assert [path.read_bytes() for path in files_of(prefix)] == expected
    assert not (tmp_path / "corpus.parts").exists()


def test_a_changed_file_is_tokenized_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    small_parts(monkeypatch)
    files = twenty_files(tmp_path / "files")
    job = Job(files, tmp_path / "corpus", tokenizer, ("text",), True, 1, False)
    job.tokenize(0, 1)
    files[3].write_text("x = 1\n", encoding="utf-8")
    job.tokenize(0, 1)
    job.join()
    assert [*tokenizer.encode("x = 1\n"), tokenizer.end_of_document] in documents_of(tmp_path / "corpus")
    preprocess(files, tmp_path / "anew", tokenizer.path)
    assert documents_of(tmp_path / "corpus") == documents_of(tmp_path / "anew")


def test_nodes_share_the_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tokenizer: Tokenizer) -> None:
    files = twenty_files(tmp_path / "files")
    preprocess(files, tmp_path / "one", tokenizer.path)
    small_parts(monkeypatch)
    flags = ["--input", *files, "--output-prefix", tmp_path / "corpus", "--tokenizer-model", tokenizer.path]
    for node in (2, 0, 1):
        call(monkeypatch, *flags, "--append-eod", "--nodes", 3, "--node", node)
    tokenized = sorted(path.name for path in (tmp_path / "corpus.parts").glob("*.json"))
    assert len(tokenized) > 10
    with (tmp_path / "corpus.parts" / "node_1_of_3.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DataError, match=r"node_1_of_3\.lock is held by another process"):
            call(monkeypatch, *flags, "--append-eod")
    monkeypatch.setattr(PartFolder, "_commit", None)  # nothing is left to be made
    call(monkeypatch, *flags, "--append-eod")
    assert [path.read_bytes() for path in files_of(tmp_path / "corpus")] == [
        path.read_bytes() for path in files_of(tmp_path / "one")
    ]
    with pytest.raises(ConfigError, match=r"--node is 3, and --nodes 3: number the nodes from 0 to 2"):
        call(monkeypatch, *flags, "--nodes", 3, "--node", 3)


def test_a_damaged_part_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tokenizer: Tokenizer) -> None:
    files = find_files(["stdlib"])[::40]
    job = Job(files, tmp_path / "corpus", tokenizer, ("text",), True, 1, False)
    job.tokenize(0, 1)
    (tokens,) = (tmp_path / "corpus.parts").glob("*.bin")
    tokens.write_bytes(tokens.read_bytes()[:-2])
    with pytest.raises(DataError, match=r"last end: the sequences end at byte"):
        job.join()
    assert not (tmp_path / "corpus.bin").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_nothing_is_left_behind_by_a_bad_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tokenizer: Tokenizer, lines: Path, workers: int
) -> None:
    monkeypatch.setattr(parts, "BATCH_CHARACTERS", 5)
    with lines.open("a") as file:
        file.write('{"text": "good"}\nbad\n')
    before = names_in(tmp_path)
    with pytest.raises(DataError, match=r"texts\.jsonl, line 8: is not JSON"):
        preprocess([lines], tmp_path / "corpus", tokenizer.path, workers=workers)
    assert names_in(tmp_path) == before


def test_full_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tokenizer: Tokenizer, lines: Path) -> None:
    preprocess([lines], tmp_path / "corpus", tokenizer.path)
    before = {path: path.read_bytes() for path in files_of(tmp_path / "corpus")}
    listed = names_in(tmp_path)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match=r"cannot be written \(No space left on device\): free space or change --out"):
        preprocess([lines], tmp_path / "corpus", tokenizer.path, append_eod=False, overwrite=True)
    assert names_in(tmp_path) == listed
    assert {path: path.read_bytes() for path in before} == before


def test_no_text_at_all(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "empty.txt").touch()
    with pytest.raises(DataError, match="holds no text: every document is empty"):
        preprocess([tmp_path / "empty.txt"], tmp_path / "corpus", tokenizer.path)
    assert names_in(tmp_path) == ["empty.txt"]


def test_a_large_vocabulary_takes_int32(tmp_path: Path, lines: Path) -> None:
    """Some 70,000 characters make a vocabulary that uint16 cannot number."""
    from tools.train_tokenizer import train_tokenizer, write_tokenizer

    characters = [chr(code) for code in range(0x10000, 0x30000) if chr(code).isprintable()][:66_000]
    assert len(characters) == 66_000
    text = tmp_path / "characters.txt"
    text.write_text("".join(character * 2 for character in characters))
    model = train_tokenizer([text], vocabulary=66_600)
    tokenizer = write_tokenizer(model, tmp_path / "large.model")
    facts = preprocess([text], tmp_path / "corpus", tokenizer.path)
    assert facts.token_type == "int32"
    tokens = np.fromfile(tmp_path / "corpus.bin", dtype=np.int32).tolist()
    assert max(tokens) > 65_535
    assert tokenizer.decode(tokens) == text.read_text()


@pytest.fixture
def busy_tool(tmp_path: Path, tokenizer: Tokenizer) -> Iterator[subprocess.Popen[bytes]]:
    """The tool with two workers in a session of its own, in the middle of its work; it writes to `tmp_path/out`."""
    folder = tmp_path / "out"
    command = [sys.executable, "-m", "tools.preprocess_corpus", "--input", *(["stdlib"] * 30), "--workers", "2"]
    command += ["--output-prefix", str(folder / "corpus"), "--tokenizer-model", str(tokenizer.path)]
    process = subprocess.Popen(
        command,
        cwd=Path(tool.__file__).parent.parent,
        start_new_session=True,
        # A shell that starts the tests in its background has them ignore Ctrl-C, and so would the tool.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        deadline = time.monotonic() + 120
        while not any(path.stat().st_size for path in folder.glob("corpus.parts/.*/part.bin")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield process
    finally:
        for member in session_members(process.pid):
            member.kill()
        process.wait()


def session_members(session: int) -> list[psutil.Process]:
    """All processes of a session, whoever their parent is by now."""
    members = []
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                members.append(process)
    return members


def test_interrupt_leaves_nothing_behind(tmp_path: Path, busy_tool: subprocess.Popen[bytes]) -> None:
    """Ctrl-C reaches the tool and its workers while they work."""
    os.killpg(busy_tool.pid, signal.SIGINT)
    assert busy_tool.wait(timeout=60) == 130
    assert names_in(tmp_path / "out") == []


@pytest.mark.slow
def test_workers_end_with_a_killed_tool(busy_tool: subprocess.Popen[bytes]) -> None:
    assert len(session_members(busy_tool.pid)) > 2
    busy_tool.kill()
    busy_tool.wait()
    deadline = time.monotonic() + 60
    while session_members(busy_tool.pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)
