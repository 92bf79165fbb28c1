"""Every field of an index that says something wrong is found before megatron-core reads it."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pretrain.data import index_check
from pretrain.data.index_check import HEADER, check_index, files_of, scan_index
from pretrain.errors import DataError
from tests.support.small_corpus import SmallCorpus, small_corpus

Edit = Callable[[bytearray, int], None]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> SmallCorpus:
    return small_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def prefix(pristine: SmallCorpus, tmp_path: Path) -> Path:
    """A copy of the corpus, to damage."""
    copy = tmp_path / "corpus"
    for source, target in zip(files_of(pristine.prefix), files_of(copy), strict=True):
        shutil.copyfile(source, target)
    return copy


def check(prefix: Path, corpus: SmallCorpus) -> index_check.CorpusFacts:
    return check_index(prefix, corpus.tokenizer.vocabulary, corpus.tokenizer.fingerprint)


def test_an_intact_corpus_passes(pristine: SmallCorpus) -> None:
    facts = check(pristine.prefix, pristine)
    assert facts == pristine.facts
    assert facts.documents == len(pristine.texts)
    assert facts.text_bytes == sum(len(text.encode()) for text in pristine.texts)
    assert facts.tokens * 2 == files_of(pristine.prefix)[0].stat().st_size


def put(at: int, form: str, value: int) -> Edit:
    return lambda index, sequences: struct.pack_into(form, index, at, value)


def put_length(sequence: int, value: int) -> Edit:
    return lambda index, sequences: struct.pack_into("<i", index, HEADER.size + 4 * sequence, value)


def put_pointer(sequence: int, value: int) -> Edit:
    return lambda index, sequences: struct.pack_into("<q", index, HEADER.size + 4 * sequences + 8 * sequence, value)


def put_boundary(boundary: int, value: int) -> Edit:
    return lambda index, sequences: struct.pack_into(
        "<q", index, HEADER.size + 12 * sequences + 8 * (boundary % (sequences + 1)), value
    )


def keep(count: int) -> Edit:
    """Keeps the first `count` bytes of the file; for a negative `count`, all but the last ones."""

    def edit(index: bytearray, sequences: int) -> None:
        del index[count:]

    return edit


@pytest.mark.parametrize(
    ("edit", "field"),
    [
        (put(0, "B", 0), "magic"),
        (put(9, "<Q", 2), "version: 2"),
        (put(17, "B", 1), "token type: code 1"),
        (put(17, "B", 4), "pointer: sequence 1"),
        (put(17, "B", 77), "token type: code 77"),
        (put(18, "<Q", 2**60), "counts: 1152921504606846976 sequences"),
        (put(18, "<Q", 2**64 - 1), "counts"),
        (put(18, "<Q", 0), "counts"),
        (put(26, "<Q", 2**64 - 1), "counts"),
        (put_length(3, -200), "length: sequence 3 has -200 tokens"),
        (put_length(3, 2**31 - 1), "pointer: sequence 4"),
        (put_length(0, 0), "pointer: sequence 1"),
        (put_pointer(0, -8), "pointer: sequence 0 begins at byte -8"),
        (put_pointer(5, 0), "pointer: sequence 5"),
        (put_pointer(5, 2**62), "pointer: sequence 5"),
        (put_boundary(0, 1), "document index: the first boundary is 1"),
        (put_boundary(4, 1), "document index: boundary 4 falls to 1"),
        (put_boundary(4, -1), "document index: boundary 4 falls to -1"),
        (put_boundary(-1, 2**40), "document index: the last boundary is 1099511627776"),
        (keep(-1), "counts"),
        (lambda index, sequences: index.extend(b"\0" * sequences), "counts"),
        (keep(20), "header: the file has 20 bytes"),
        (keep(0), "header: the file has 0 bytes"),
    ],
)
def test_damaged_index(pristine: SmallCorpus, prefix: Path, edit: Edit, field: str) -> None:
    path = files_of(prefix)[1]
    content = bytearray(path.read_bytes())
    edit(content, pristine.facts.documents)
    path.write_bytes(content)
    with pytest.raises(DataError) as raised:
        check(prefix, pristine)
    assert str(raised.value).startswith(f"{path}: {field}")
    assert "tools/preprocess_corpus.py" in str(raised.value) or "data.prefix" in str(raised.value)


@pytest.mark.parametrize("block", [7, 1 << 20], ids=["small blocks", "large blocks"])
@pytest.mark.parametrize("sequence", [6, 7, 13, 30])
def test_damage_is_found_at_the_edges_of_blocks(
    pristine: SmallCorpus, prefix: Path, monkeypatch: pytest.MonkeyPatch, block: int, sequence: int
) -> None:
    monkeypatch.setattr(index_check, "BLOCK", block)
    assert scan_index(prefix, 600).fingerprint == pristine.facts.fingerprint
    path = files_of(prefix)[1]
    intact = path.read_bytes()
    for edit, message in (
        (put_length(sequence, -1), f"length: sequence {sequence} has -1"),
        (put_pointer(sequence, 1), f"pointer: sequence {sequence} begins at byte 1"),
        (put_boundary(sequence, 0), f"document index: boundary {sequence} falls to 0"),
    ):
        content = bytearray(intact)
        edit(content, pristine.facts.documents)
        path.write_bytes(content)
        with pytest.raises(DataError, match=message):
            scan_index(prefix, 600)


def test_short_and_long_token_files(pristine: SmallCorpus, prefix: Path) -> None:
    path = files_of(prefix)[0]
    content = path.read_bytes()
    for changed in (content[:-1], content[: len(content) // 2], b"", content + b"\0", content + b"\0\0"):
        path.write_bytes(changed)
        with pytest.raises(DataError, match=rf"last end: .* {len(content)}, .* has {len(changed)} bytes"):
            check(prefix, pristine)


def test_token_outside_the_vocabulary(pristine: SmallCorpus, prefix: Path) -> None:
    path = files_of(prefix)[0]
    tokens = np.fromfile(path, dtype=np.uint16)
    tokens[1234] = pristine.tokenizer.vocabulary
    tokens.tofile(path)
    with pytest.raises(DataError, match=r"corpus\.bin: token 1234 is 600, and the vocabulary has 600 tokens"):
        check(prefix, pristine)


def test_one_changed_token_is_found(pristine: SmallCorpus, prefix: Path) -> None:
    path = files_of(prefix)[0]
    tokens = np.fromfile(path, dtype=np.uint16)
    tokens[1234] ^= 1
    tokens.tofile(path)
    with pytest.raises(DataError, match="was changed after it was written"):
        check(prefix, pristine)


def test_another_tokenizer(pristine: SmallCorpus) -> None:
    vocabulary, fingerprint = pristine.tokenizer.vocabulary, pristine.tokenizer.fingerprint
    with pytest.raises(DataError, match=r"tokenizer of 600 tokens .* data\.tokenizer has 601"):
        check_index(pristine.prefix, vocabulary + 1, fingerprint)
    with pytest.raises(DataError, match=r"data\.tokenizer has 600 \(sha256 000000"):
        check_index(pristine.prefix, vocabulary, "0" * 64)


def test_missing_files(pristine: SmallCorpus, prefix: Path) -> None:
    for path in files_of(prefix):
        content = path.read_bytes()
        path.unlink()
        with pytest.raises(DataError, match=path.name):
            check(prefix, pristine)
        path.write_bytes(content)
    assert check(prefix, pristine) == pristine.facts


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"documents": 3}, "holds documents .* says 3"),
        ({"tokens": 3}, "holds tokens .* says 3"),
        ({"token_type": "int32"}, "holds token_type uint16, .* says int32"),
        ({"fingerprint": "0"}, "was changed after it was written"),
        ({"format_version": 2}, "format_version"),
        ({"tokens": -1}, "tokens"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_facts_that_do_not_fit(pristine: SmallCorpus, prefix: Path, change: dict[str, object], message: str) -> None:
    path = files_of(prefix)[2]
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match=message):
        check(prefix, pristine)


def test_facts_that_are_no_json(pristine: SmallCorpus, prefix: Path) -> None:
    for content in (b"", b"{", b"[]", b"\xff", b"[" * 70_000):
        files_of(prefix)[2].write_bytes(content)
        with pytest.raises(DataError, match=r"corpus\.json: "):
            check(prefix, pristine)
