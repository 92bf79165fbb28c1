"""A corpus on disk, and its complete check before anything trusts it.

A corpus is three files: `P.bin` (token ids), `P.idx` (megatron-core's index) and `P.json` (`CorpusFacts`).
megatron-core does not check an index: a negative length returns the rest of the file, a wrong type code other tokens,
both without an error. So every number of the index is compared here with the sizes it implies, and every token with the
vocabulary:

    .idx = magic (9) version (8) type (1) sequences n (8) documents d (8) lengths (4n) pointers (8n) documents (8d)
    pointers[i] = itemsize * sum(lengths[:i]),   itemsize * sum(lengths) = size of .bin

The files are read in blocks, so a check needs little memory whatever their size or the counts they claim.
"""

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pretrain.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
TOKEN_TYPES: dict[int, type[np.uint16] | type[np.int32]] = {8: np.uint16, 4: np.int32}
BLOCK = 1 << 20
"""Count of numbers that are read at a time."""
REBUILD = "write the corpus anew with tools/preprocess_corpus.py --overwrite"


class CorpusFacts(BaseModel):
    """What `P.json` says about a corpus."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: Literal[1] = 1
    documents: int = Field(ge=1)
    tokens: int = Field(ge=1)
    text_bytes: int = Field(ge=0, description="of the documents, in UTF-8")
    token_type: Literal["uint16", "int32"]
    vocabulary: int = Field(ge=1)
    tokenizer_fingerprint: str
    end_of_document: bool = Field(description="a token that ends the document follows each one")
    round_trip_exceptions: int = Field(ge=0, description="documents with U+2581, which decodes to a space")
    fingerprint: str = Field(description="of .idx and .bin")


@dataclass(frozen=True)
class IndexContent:
    """What `P.idx` and `P.bin` themselves hold."""

    documents: int
    tokens: int
    token_type: str
    fingerprint: str


def files_of(prefix: Path) -> tuple[Path, Path, Path]:
    """The .bin, .idx and .json of a corpus."""
    return Path(f"{prefix}.bin"), Path(f"{prefix}.idx"), Path(f"{prefix}.json")


def check_index(prefix: Path, vocabulary: int, tokenizer_fingerprint: str) -> CorpusFacts:
    """Checks all of a corpus, and that it was written with this tokenizer; DataError otherwise."""
    facts = read_facts(prefix)
    tokens_path, index_path, facts_path = files_of(prefix)
    if facts.tokenizer_fingerprint != tokenizer_fingerprint or facts.vocabulary != vocabulary:
        raise DataError(
            f"{facts_path}: the corpus was written with a tokenizer of {facts.vocabulary} tokens "
            f"(sha256 {facts.tokenizer_fingerprint[:12]}), and data.tokenizer has {vocabulary} "
            f"(sha256 {tokenizer_fingerprint[:12]}): set data.tokenizer to the corpus's own, or {REBUILD}"
        )
    content = scan_index(prefix, vocabulary)
    for name in ("documents", "tokens", "token_type"):
        recorded, found = getattr(facts, name), getattr(content, name)
        if recorded != found:
            raise DataError(f"{index_path}: holds {name} {found}, and {facts_path.name} says {recorded}: {REBUILD}")
    if content.fingerprint != facts.fingerprint:
        raise DataError(
            f"{tokens_path} or {index_path.name} was changed after it was written: its fingerprint is "
            f"{content.fingerprint}, and {facts_path.name} says {facts.fingerprint}: {REBUILD}"
        )
    return facts


def read_facts(prefix: Path) -> CorpusFacts:
    """Reads `P.json`; DataError if it is missing or wrong."""
    path = files_of(prefix)[2]
    try:
        with path.open("rb") as file:
            return CorpusFacts.model_validate_json(file.read(1 << 16))
    except FileNotFoundError as error:
        raise DataError(
            f"there is no corpus {prefix} ({path} is missing): set data.prefix to what "
            "tools/preprocess_corpus.py wrote with --output-prefix"
        ) from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): make it readable or change data.prefix") from error
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "content"
        raise DataError(f"{path}: {field}: {first['msg']}: {REBUILD}") from error


def scan_index(prefix: Path, vocabulary: int) -> IndexContent:
    """Checks `P.idx` and `P.bin` against each other and against the vocabulary, and takes their fingerprint."""
    tokens_path, index_path, _ = files_of(prefix)
    digest = xxhash.xxh3_128()
    try:
        tokens_size = tokens_path.stat().st_size
        with index_path.open("rb") as file:
            code, sequences, documents = _check_header(index_path, file)
            token_type = TOKEN_TYPES[code]
            file.seek(0)
            digest.update(file.read(HEADER.size))
            tokens = _check_sequences(index_path, file, sequences, np.dtype(token_type).itemsize, tokens_size, digest)
            _check_documents(index_path, file, documents, sequences, digest)
        _check_tokens(tokens_path, token_type, vocabulary, digest)
    except OSError as error:
        raise DataError(f"{error.filename or prefix} cannot be read ({error.strerror}): {REBUILD}") from error
    return IndexContent(documents - 1, tokens, token_type.__name__, digest.hexdigest())


def _check_header(path: Path, file: BinaryIO) -> tuple[int, int, int]:
    """Type code, and numbers of sequences and of document boundaries, from the header; checked against the file's
    size."""
    size = os.fstat(file.fileno()).st_size
    header = file.read(HEADER.size)
    if len(header) < HEADER.size:
        raise DataError(f"{path}: header: the file has {size} bytes, and a header alone has {HEADER.size}: {REBUILD}")
    magic, version, code, sequences, documents = HEADER.unpack(header)
    if magic != MAGIC:
        raise DataError(f"{path}: magic: {magic!r} is not {MAGIC!r}, so this is no index: change data.prefix")
    if version != 1:
        raise DataError(f"{path}: version: {version} is not 1, the only one known: {REBUILD}")
    if code not in TOKEN_TYPES:
        raise DataError(f"{path}: token type: code {code} is neither 8 (uint16) nor 4 (int32): {REBUILD}")
    expected = HEADER.size + 12 * sequences + 8 * documents
    if size != expected:
        raise DataError(
            f"{path}: counts: {sequences} sequences and {documents} document boundaries need {expected} bytes, "
            f"and the file has {size}: {REBUILD}"
        )
    if sequences < 1 or documents < 2:
        raise DataError(f"{path}: counts: {sequences} sequences in {documents - 1} documents are no corpus: {REBUILD}")
    return code, sequences, documents


def _check_sequences(
    path: Path, file: BinaryIO, sequences: int, itemsize: int, tokens_size: int, digest: "xxhash.xxh3_128"
) -> int:
    """Checks lengths and pointers side by side; the number of all tokens."""
    end = 0
    pointers_at = HEADER.size + 4 * sequences
    for first in range(0, sequences, BLOCK):
        count = min(BLOCK, sequences - first)
        file.seek(HEADER.size + 4 * first)
        lengths = _read(file, np.dtype("<i4"), count)
        file.seek(pointers_at + 8 * first)
        pointers = _read(file, np.dtype("<i8"), count)
        digest.update(lengths.data)  # the pointers follow from them
        negative = np.flatnonzero(lengths < 0)
        if negative.size:
            i = int(negative[0])
            raise DataError(f"{path}: length: sequence {first + i} has {lengths[i]} tokens: {REBUILD}")
        ends = end + itemsize * np.cumsum(lengths, dtype=np.int64)
        expected = np.concatenate([[end], ends[:-1]])
        wrong = np.flatnonzero(pointers != expected)
        if wrong.size:
            i = int(wrong[0])
            raise DataError(
                f"{path}: pointer: sequence {first + i} begins at byte {pointers[i]}, and the sequences before it end "
                f"at byte {expected[i]}: {REBUILD}"
            )
        end = int(ends[-1])
    if end != tokens_size:
        raise DataError(
            f"{path}: last end: the sequences end at byte {end}, and {path.with_suffix('.bin').name} has "
            f"{tokens_size} bytes: {REBUILD}"
        )
    return end // itemsize


def _check_documents(path: Path, file: BinaryIO, documents: int, sequences: int, digest: "xxhash.xxh3_128") -> None:
    """Checks that document boundaries rise from 0 to the number of sequences."""
    file.seek(HEADER.size + 12 * sequences)
    last = 0
    for first in range(0, documents, BLOCK):
        boundaries = _read(file, np.dtype("<i8"), min(BLOCK, documents - first))
        digest.update(boundaries.data)
        if first == 0 and boundaries[0] != 0:
            raise DataError(f"{path}: document index: the first boundary is {boundaries[0]} and not 0: {REBUILD}")
        falling = np.flatnonzero(np.diff(boundaries, prepend=last) < 0)
        if falling.size:
            i = int(falling[0])
            raise DataError(f"{path}: document index: boundary {first + i} falls to {boundaries[i]}: {REBUILD}")
        last = int(boundaries[-1])
    if last != sequences:
        raise DataError(
            f"{path}: document index: the last boundary is {last}, and there are {sequences} sequences: {REBUILD}"
        )


def _check_tokens(path: Path, token_type: type[np.generic], vocabulary: int, digest: "xxhash.xxh3_128") -> None:
    """Checks every token id against the vocabulary."""
    kind = np.dtype(token_type).newbyteorder("<")
    with path.open("rb") as file:
        first = 0
        while (tokens := _read(file, kind, BLOCK)).size:
            digest.update(tokens.data)
            if tokens.max() >= vocabulary or tokens.min() < 0:
                i = int(np.flatnonzero((tokens >= vocabulary) | (tokens < 0))[0])
                raise DataError(
                    f"{path}: token {first + i} is {tokens[i]}, and the vocabulary has {vocabulary} tokens "
                    f"(0 to {vocabulary - 1}): {REBUILD}"
                )
            first += tokens.size


def _read(file: BinaryIO, kind: np.dtype, count: int) -> np.ndarray:
    return np.frombuffer(file.read(count * kind.itemsize), dtype=kind)
