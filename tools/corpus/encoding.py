"""Documents to token ids, on several worker processes and in order."""

import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context, parent_process
from pathlib import Path

import numpy as np

from pretrain.errors import EspalierError
from pretrain.tokenizer.load import open_tokenizer

BATCHES_AHEAD = 3
"""Batches in work or waiting, for each worker: bounds the memory."""


@dataclass(frozen=True)
class Batch:
    """Documents on the way to a worker, none of them empty."""

    texts: list[str]
    unit: int
    documents_read: int
    """Documents of the unit that were read up to the end of this batch, empty ones included."""
    ends_part: bool
    ends_unit: bool
    stored_bytes_read: int


@dataclass(frozen=True)
class Encoded:
    """A batch on the way back: all tokens, one document behind the other, and the tokens of each."""

    batch: Batch
    tokens: np.ndarray
    lengths: list[int]
    text_bytes: int
    round_trip_exceptions: int


def encode_all(batches: Iterable[Batch], tokenizer: Path, append_eod: bool, workers: int) -> Iterator[Encoded]:
    """Encodes batches on `workers` processes, in order; one worker is this process."""
    if workers == 1:
        yield from map(_Encoder(tokenizer, append_eod).encode, batches)
        return
    waiting: deque[Future[Encoded]] = deque()
    with (
        _noted_interrupts() as interrupts,
        ProcessPoolExecutor(
            workers, get_context("spawn"), initializer=_start_worker, initargs=(tokenizer, append_eod)
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

    def __init__(self, tokenizer: Path, append_eod: bool) -> None:
        self._tokenizer = open_tokenizer(tokenizer)
        self._end = [self._tokenizer.end_of_document] if append_eod else []

    def encode(self, batch: Batch) -> Encoded:
        documents = [self._tokenizer.encode(text) for text in batch.texts]
        came_back = map(self._tokenizer.comes_back, batch.texts, documents)
        return Encoded(
            batch=replace(batch, texts=[]),
            tokens=np.array([token for document in documents for token in (*document, *self._end)], dtype=np.int32),
            lengths=[len(document) + len(self._end) for document in documents],
            text_bytes=sum(len(text.encode("utf-8")) for text in batch.texts),
            round_trip_exceptions=sum(not same for same in came_back),
        )


_encoder: _Encoder | None = None
"""A worker process's own."""


def _start_worker(tokenizer: Path, append_eod: bool) -> None:
    global _encoder
    threading.Thread(target=_end_with_the_first_process, daemon=True).start()
    _encoder = _Encoder(tokenizer, append_eod)


def _end_with_the_first_process() -> None:
    """A worker whose parent is killed would wait for its next batch without end."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode(batch: Batch) -> Encoded:
    assert _encoder is not None
    return _encoder.encode(batch)
