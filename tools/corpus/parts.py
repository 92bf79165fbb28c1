"""A corpus on its way: complete parts, so that a tool that was ended goes on, and several nodes share the work.

Input files are taken together to units of some size, in order. A unit becomes one or more parts, each a small indexed
dataset of its own in `PREFIX.parts`:

    0f3c...e1_00000.bin  .idx  .json        the name begins with a digest of all that decides about the unit's tokens

The `.json` comes last and makes the part count. A unit whose files or settings have changed has another digest, so what
is found there is either right or not looked at. Parts are joined in the order of units: the corpus does not depend on
who made which part, nor when.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pretrain.data.index_check import files_of, scan_index
from pretrain.disk import commit_files
from pretrain.errors import DataError
from tools.corpus.documents import read_documents
from tools.corpus.encoding import Batch, Encoded

BATCH_CHARACTERS = 1 << 20
"""Text handed to a worker at a time."""
PART_CHARACTERS = 1 << 25
"""Text of a part; at most so much is tokenized twice by a tool that was killed."""
UNIT_BYTES = 1 << 26
"""Input files are taken together up to this size on disk."""


class PartFacts(BaseModel):
    """What is known of a part that is complete."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    documents_read: int = Field(ge=0, description="of the unit up to the end of this part, empty ones included")
    documents: int = Field(ge=0)
    text_bytes: int = Field(ge=0)
    round_trip_exceptions: int = Field(ge=0)
    ends_unit: bool


@dataclass(frozen=True)
class Unit:
    """Input files that become parts together."""

    files: tuple[Path, ...]
    digest: str
    stored_bytes: int


def plan_units(files: Sequence[Path], settings: dict[str, Any]) -> list[Unit]:
    """All units, in order; they depend on the files and the `settings` of the tokenization alone."""
    groups: list[list[Path]] = []
    size = UNIT_BYTES
    for path in files:
        if size >= UNIT_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(path)
        size += path.stat().st_size
    units = []
    for number, group in enumerate(groups):
        stats = [path.stat() for path in group]
        described = [[str(path), stat.st_size, stat.st_mtime_ns] for path, stat in zip(group, stats, strict=True)]
        text = json.dumps({**settings, "unit": number, "files": described}, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:32]
        units.append(Unit(tuple(group), digest, sum(stat.st_size for stat in stats)))
    return units


class PartFolder:
    """`PREFIX.parts`; made with the first part, and taken away by `clear`."""

    def __init__(self, prefix: Path) -> None:
        self.path = prefix.with_name(f"{prefix.name}.parts")

    @contextmanager
    def held(self, node: int, nodes: int) -> Iterator[None]:
        """Inside it no other process works for the same node; for the only node, none at all."""
        self.path.mkdir(parents=True, exist_ok=True)
        own = self.path / f"node_{node}_of_{nodes}.lock"
        others = sorted(self.path.glob("node_*.lock")) if nodes == 1 else []
        try:
            with ExitStack() as locks:
                for path in dict.fromkeys([own, *others]):
                    try:
                        locks.enter_context(FileLock(path, blocking=False, fallback_to_soft=False))
                    except Timeout:
                        raise DataError(
                            f"{path} is held by another process that writes this corpus: wait until it has ended"
                        ) from None
                yield
        finally:
            self._remove_if_empty()

    def complete_parts(self, unit: Unit) -> list[tuple[Path, PartFacts]]:
        """Prefix and facts of the unit's parts, without a gap from the first."""
        parts = []
        for number in count():
            prefix = self._prefix(unit, number)
            path = files_of(prefix)[2]
            try:
                facts = PartFacts.model_validate_json(path.read_bytes())
            except FileNotFoundError:
                break
            except ValidationError as error:
                raise DataError(f"{path} is damaged: remove the folder {self.path}, and start again") from error
            parts.append((prefix, facts))
        return parts

    def write(self, encoded: Iterable[Encoded], units: Sequence[Unit], token_type: Any) -> Iterator[Encoded]:
        """Writes parts as they come, and hands everything on; what is no whole part is lost if this ends early."""
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

        with tempfile.TemporaryDirectory(dir=self.path, prefix=".") as staging:
            staged = Path(staging, "part")
            tokens_path, index_path, _ = files_of(staged)
            builder, documents, text_bytes, exceptions = None, 0, 0, 0
            for piece in encoded:
                builder = builder or IndexedDatasetBuilder(str(tokens_path), dtype=token_type)
                first = 0
                for length in piece.lengths:
                    builder.add_document(piece.tokens[first : first + length], [length])
                    first += length
                documents += len(piece.lengths)
                text_bytes += piece.text_bytes
                exceptions += piece.round_trip_exceptions
                if piece.batch.ends_part:
                    unit = units[piece.batch.unit]
                    builder.finalize(str(index_path))
                    facts = PartFacts(
                        documents_read=piece.batch.documents_read,
                        documents=documents,
                        text_bytes=text_bytes,
                        round_trip_exceptions=exceptions,
                        ends_unit=piece.batch.ends_unit,
                    )
                    self._commit(staged, self._prefix(unit, len(self.complete_parts(unit))), facts)
                    builder, documents, text_bytes, exceptions = None, 0, 0, 0
                yield piece

    def join(self, units: Sequence[Unit], target: Path, token_type: Any, vocabulary: int) -> list[PartFacts]:
        """Writes the `.bin` and `.idx` of all parts, one behind the other; DataError if a part is missing or
        damaged."""
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

        tokens_path, index_path, _ = files_of(target)
        builder, joined = IndexedDatasetBuilder(str(tokens_path), dtype=token_type), []
        for unit in units:
            parts = self.complete_parts(unit)
            if not parts or not parts[-1][1].ends_unit:
                raise DataError(f"{self.path} lacks parts of {unit.files[0]}: the input changed meanwhile, start again")
            for prefix, facts in parts:
                if facts.documents:
                    scan_index(prefix, vocabulary)  # megatron-core would take any bytes
                    builder.add_index(str(prefix))
                joined.append(facts)
        if not any(facts.documents for facts in joined):
            self.clear()
            raise DataError("--input holds no text: every document is empty")
        builder.finalize(str(index_path))
        return joined

    def clear(self) -> None:
        """Takes all parts away."""
        shutil.rmtree(self.path)

    def _prefix(self, unit: Unit, number: int) -> Path:
        return self.path / f"{unit.digest}_{number:05d}"

    def _commit(self, staged: Path, prefix: Path, facts: PartFacts) -> None:
        files_of(staged)[2].write_text(facts.model_dump_json() + "\n", encoding="utf-8")
        commit_files(dict(zip(files_of(staged), files_of(prefix), strict=True)))  # the .json comes last

    def _remove_if_empty(self) -> None:
        if self.path.is_dir() and all(path.suffix == ".lock" for path in self.path.iterdir()):
            shutil.rmtree(self.path)


def batches(units: Sequence[tuple[int, Unit, int]], json_keys: Sequence[str]) -> Iterator[Batch]:
    """The documents of units that are not complete, each given with its number and the documents that are done; which
    documents share a batch depends on the text alone, and empty ones are left out."""
    stored_before = 0
    for number, unit, done in units:
        texts: list[str] = []
        characters = part_characters = read = 0
        read, stored = done, stored_before
        for document in islice(read_documents(unit.files, json_keys), done, None):
            read, stored = read + 1, stored_before + document.stored_bytes_read
            if document.text:
                texts.append(document.text)
                characters += len(document.text)
            if characters >= BATCH_CHARACTERS:
                part_characters += characters
                ends_part = part_characters >= PART_CHARACTERS
                yield Batch(texts, number, read, ends_part, False, stored)
                texts, characters = [], 0
                part_characters = 0 if ends_part else part_characters
        stored_before += unit.stored_bytes
        yield Batch(texts, number, read, True, True, stored_before)


def token_type_of(vocabulary: int) -> type[np.uint16] | type[np.int32]:
    """The smallest type of megatron-core's for ids below `vocabulary`."""
    from megatron.core.datasets.indexed_dataset import DType

    kind: type[np.uint16] | type[np.int32] = DType.optimal_dtype(vocabulary)
    return kind
