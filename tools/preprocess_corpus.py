"""Turns text into a corpus: a megatron-core indexed dataset (`P.bin`, `P.idx`) and the facts about it (`P.json`).

    python tools/preprocess_corpus.py --input stdlib --tokenizer-model tokenizer.model --append-eod \\
        --output-prefix corpus
    python tools/preprocess_corpus.py --input data/*.jsonl.zst --json-keys text --tokenizer-model tokenizer.model \\
        --append-eod --workers 16 --output-prefix corpora/web

Flags are named as in Megatron-LM's own tool. The output does not depend on the number of workers. A `.txt` or `.py`
file is one document and is held in memory as a whole.
"""

import argparse
import os
import signal
import tempfile
import threading
import time
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path

import numpy as np
from tqdm import tqdm

from pretrain.errors import DataError, EspalierError, run_command
from pretrain.index_check import CorpusFacts, files_of, read_facts, scan_index
from pretrain.sentencepiece_tokenizer import SPACE
from pretrain.tokenizer import Tokenizer, open_tokenizer
from tools.arguments import positive
from tools.documents import Document, find_files, read_documents, stored_bytes

BATCH_CHARACTERS = 1 << 20
"""Text handed to a worker at a time."""
BATCHES_AHEAD = 3
"""Batches in work or waiting, for each worker: bounds the memory."""


def main() -> None:
    arguments = _arguments()
    start = time.perf_counter()
    facts = preprocess(
        find_files(arguments.input),
        arguments.output_prefix,
        arguments.tokenizer_model,
        json_keys=arguments.json_keys,
        append_eod=arguments.append_eod,
        workers=arguments.workers,
        overwrite=arguments.overwrite,
    )
    seconds = time.perf_counter() - start
    print(
        f"{arguments.output_prefix}: {facts.documents:,} documents, {facts.tokens:,} tokens ({facts.token_type}), "
        f"{facts.text_bytes:,} bytes of text ({facts.text_bytes / facts.tokens:.2f} a token)\n"
        f"{seconds:.1f} s, {facts.tokens / seconds:,.0f} tokens/s with {arguments.workers} workers\n"
        f"{facts.round_trip_exceptions} documents hold U+2581, which decodes to a space; all else decodes to itself"
    )


def preprocess(
    files: Sequence[Path],
    prefix: Path,
    tokenizer_model: Path,
    *,
    json_keys: Sequence[str] = ("text",),
    append_eod: bool = True,
    workers: int = 1,
    overwrite: bool = False,
) -> CorpusFacts:
    """Writes the corpus of the documents in `files`; nothing is left behind if that fails."""
    tokenizer = open_tokenizer(tokenizer_model)
    _check_output(prefix, overwrite)
    documents = read_documents(files, json_keys)
    try:
        prefix.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=prefix.parent, prefix=f".{prefix.name}.") as staging:
            staged = Path(staging, "corpus")
            with tqdm(total=stored_bytes(files), unit="B", unit_scale=True, disable=None) as progress:
                facts = _write(staged, documents, tokenizer, append_eod, workers, progress)
            # The facts come last: together with the fingerprint in them they make the three files one corpus.
            for source, target in zip(files_of(staged), files_of(prefix), strict=True):
                source.replace(target)
            _flush_to_disk(prefix.parent)
    except OSError as error:
        raise DataError(
            f"the corpus {prefix} cannot be written ({error.strerror}): free space or change --output-prefix"
        ) from error
    return facts


def _check_output(prefix: Path, overwrite: bool) -> None:
    existing = [path for path in files_of(prefix) if path.exists()]
    if not existing:
        return
    try:
        read_facts(prefix)
    except DataError:
        raise DataError(
            f"{existing[0]} exists and was not written by this tool: remove it or change --output-prefix"
        ) from None
    if not overwrite:
        raise DataError(f"the corpus {prefix} exists: add --overwrite or change --output-prefix")


@dataclass(frozen=True)
class _Batch:
    """Documents on the way to a worker."""

    texts: list[str]
    stored_bytes_read: int


@dataclass(frozen=True)
class _Encoded:
    """Documents on the way back: all tokens, one document behind the other, and the tokens of each."""

    tokens: np.ndarray
    lengths: list[int]
    text_bytes: int
    round_trip_exceptions: int
    stored_bytes_read: int


def _write(
    staged: Path, documents: Iterator[Document], tokenizer: Tokenizer, append_eod: bool, workers: int, progress: tqdm
) -> CorpusFacts:
    """Writes the three files under another name."""
    # megatron-core takes seconds to import, which the workers should not wait for; what it warns of is no concern here.
    warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    token_type = DType.optimal_dtype(tokenizer.vocabulary)
    tokens_path, index_path, facts_path = files_of(staged)
    builder = IndexedDatasetBuilder(str(tokens_path), dtype=token_type)
    text_bytes = exceptions = tokens = written = 0
    for encoded in _encode_all(_batches(documents), tokenizer.path, append_eod, workers):
        first = 0
        for length in encoded.lengths:
            builder.add_document(encoded.tokens[first : first + length], [length])
            first += length
        written += len(encoded.lengths)
        tokens += first
        text_bytes += encoded.text_bytes
        exceptions += encoded.round_trip_exceptions
        progress.update(encoded.stored_bytes_read - progress.n)
        progress.set_postfix_str(f"{written} documents, {tokens / 1e6:.2f} M tokens", refresh=False)
    if not written:
        raise DataError("--input holds no text: every document is empty")
    builder.finalize(str(index_path))
    content = scan_index(staged, tokenizer.vocabulary)
    facts = CorpusFacts(
        documents=content.documents,
        tokens=content.tokens,
        text_bytes=text_bytes,
        token_type=np.dtype(token_type).name,
        vocabulary=tokenizer.vocabulary,
        tokenizer_fingerprint=tokenizer.fingerprint,
        end_of_document=append_eod,
        round_trip_exceptions=exceptions,
        fingerprint=content.fingerprint,
    )
    facts_path.write_text(facts.model_dump_json(indent=2) + "\n", encoding="utf-8")
    for path in files_of(staged):
        _flush_to_disk(path)
    return facts


def _batches(documents: Iterable[Document]) -> Iterator[_Batch]:
    """Documents in batches that depend on the text alone; empty documents are left out."""
    texts: list[str] = []
    characters = read = 0
    for document in documents:
        read = document.stored_bytes_read
        if document.text:
            texts.append(document.text)
            characters += len(document.text)
        if characters >= BATCH_CHARACTERS:
            yield _Batch(texts, read)
            texts, characters = [], 0
    if texts:
        yield _Batch(texts, read)


def _encode_all(batches: Iterator[_Batch], tokenizer_model: Path, append_eod: bool, workers: int) -> Iterator[_Encoded]:
    """Encodes batches on `workers` processes, in order; one worker is this process."""
    if workers == 1:
        encoder = _Encoder(tokenizer_model, append_eod)
        yield from map(encoder.encode, batches)
        return
    waiting: deque[Future[_Encoded]] = deque()
    with (
        _noted_interrupts() as interrupts,
        ProcessPoolExecutor(
            workers, get_context("spawn"), initializer=_start_worker, initargs=(tokenizer_model, append_eod)
        ) as executor,
    ):
        try:
            for batch in batches:
                with _interrupts_blocked():
                    waiting.append(executor.submit(_encode, batch))
                if len(waiting) == BATCHES_AHEAD * workers:
                    yield waiting.popleft().result()
                if interrupts:
                    raise KeyboardInterrupt
            while waiting:
                yield waiting.popleft().result()
                if interrupts:
                    raise KeyboardInterrupt
        except BrokenProcessPool as error:
            raise EspalierError("a worker process was killed, perhaps for want of memory: lower --workers") from error
        finally:
            for future in waiting:
                future.cancel()


@contextmanager
def _noted_interrupts() -> Iterator[list[int]]:
    """Ctrl-C is noted, for the caller to act on between two batches.

    A KeyboardInterrupt inside `Future.result` may leave the future's lock taken, and then the executor's own thread
    waits for it without end (seen with Python 3.11).
    """
    noted: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: noted.append(number))
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Processes started here never see Ctrl-C, not even while they start: it is the first process's, which ends
    them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Encoder:
    """What a worker does."""

    def __init__(self, tokenizer_model: Path, append_eod: bool) -> None:
        self._tokenizer = open_tokenizer(tokenizer_model)
        self._end = [self._tokenizer.end_of_document] if append_eod else []

    def encode(self, batch: _Batch) -> _Encoded:
        documents = [self._tokenizer.encode(text) + self._end for text in batch.texts]
        return _Encoded(
            tokens=np.array([token for document in documents for token in document], dtype=np.int32),
            lengths=list(map(len, documents)),
            text_bytes=sum(len(text.encode("utf-8")) for text in batch.texts),
            round_trip_exceptions=sum(SPACE in text for text in batch.texts),
            stored_bytes_read=batch.stored_bytes_read,
        )


_encoder: _Encoder | None = None
"""A worker process's own."""


def _start_worker(tokenizer_model: Path, append_eod: bool) -> None:
    global _encoder
    threading.Thread(target=_end_with_the_first_process, daemon=True).start()
    _encoder = _Encoder(tokenizer_model, append_eod)


def _end_with_the_first_process() -> None:
    """A worker whose parent is killed would wait for its next batch without end."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode(batch: _Batch) -> _Encoded:
    assert _encoder is not None
    return _encoder.encode(batch)


def _flush_to_disk(path: Path) -> None:
    """fsync of a file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Tokenize text into a megatron-core indexed dataset.")
    parser.add_argument("--input", nargs="+", required=True, help="files, folders, or stdlib (tools/documents.py)")
    parser.add_argument("--output-prefix", type=Path, required=True, help="writes PREFIX.bin, .idx and .json")
    parser.add_argument("--tokenizer-model", type=Path, required=True, help="written by tools/train_tokenizer.py")
    parser.add_argument("--json-keys", nargs="+", default=["text"], help="keys of the texts in .jsonl lines (text)")
    parser.add_argument("--append-eod", action="store_true", help="end each document with the end-of-document token")
    parser.add_argument("--workers", type=positive, default=1, help="processes that tokenize (1)")
    parser.add_argument("--overwrite", action="store_true", help="replace a corpus this tool wrote")
    return parser.parse_args()


if __name__ == "__main__":
    run_command(main)
