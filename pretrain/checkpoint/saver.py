"""Saves a run's checkpoints, in the foreground or beside the training, and reports the cost of each save.

    foreground    begin, write, commit: training stands still until the checkpoint is there
    beside        begin, copy this process's fragments into host memory, go on; a thread writes the copy, and when all
                  processes have written theirs, all commit between two steps

The copy takes as much host memory as the process's masters and moments. One save is on its way at a time: the next one,
a signal and the end of the run wait for it. A save that fails is reported and training goes on, until
`checkpoint.failures` in a row have failed.
"""

import threading
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from pretrain.checkpoint.format import Fragment
from pretrain.checkpoint.writer import CheckpointWrite
from pretrain.errors import CheckpointError
from pretrain.resilience import heartbeat

_NO_HOST_MEMORY = "DefaultCPUAllocator"
"""Word in torch's message when the host has no memory left. torch raises a plain RuntimeError then, as it does when a
device fails."""
Report = Callable[..., None]
"""Type of `Monitor.log_record`: `report(kind, step, **facts)`."""


class _Pending:
    """A checkpoint whose fragments a thread writes."""

    def __init__(self, write: CheckpointWrite, fragments: Iterable[Fragment], resources: ExitStack) -> None:
        self.write, self.resources = write, resources
        copies: list[Fragment] = []
        try:
            copies = [replace(one, values=one.values.detach().to("cpu", copy=True)) for one in fragments]
        except (RuntimeError, MemoryError) as error:
            if isinstance(error, RuntimeError) and _NO_HOST_MEMORY not in str(error):
                raise
            reason = next(iter(str(error).splitlines()), "MemoryError")
            write.fail(CheckpointError(f"host memory does not hold a copy ({reason}): set checkpoint.background=false"))
        self.began = time.perf_counter()
        self.written_seconds = 0.0
        self.thread = threading.Thread(target=self._run, args=(copies,), name="checkpoint", daemon=True)
        self.thread.start()

    def _run(self, copies: list[Fragment]) -> None:
        self.write.write(copies)  # keeps an error for `commit` to raise
        self.written_seconds = time.perf_counter() - self.began


class Saver:
    """Saves the checkpoints of one run; all processes call its methods together."""

    def __init__(self, *, beside: bool, failures: int, report: Report) -> None:
        self.beside, self.failures, self.report = beside, failures, report
        self.newest: Path | None = None
        self._failed_in_a_row = 0
        self._pending: _Pending | None = None
        self._stall_seconds = 0.0

    @property
    def writing(self) -> bool:
        """Whether this process still writes its part of a checkpoint."""
        return self._pending is not None and self._pending.thread.is_alive()

    def save(
        self,
        begin: Callable[[ExitStack], tuple[CheckpointWrite, Iterable[Fragment]]],
        step: int,
        *,
        final: bool = False,
    ) -> None:
        """Saves the present step. `begin` opens the files that the save needs on an `ExitStack`, which is closed after
        the save. A `final` save is complete when this method returns; if it fails, the method raises."""
        self.finish()
        start = time.perf_counter()
        resources = ExitStack()
        try:
            write, fragments = begin(resources)
        except CheckpointError as error:
            resources.close()
            self._count_failure(error, step, final)
            return
        if self.beside and not final:
            self._pending = _Pending(write, fragments, resources)
            self._stall_seconds = time.perf_counter() - start
            return
        with resources:
            write.write(fragments)
            written_seconds = time.perf_counter() - start
            if self._commit(write, final):
                self._succeeded(step, time.perf_counter() - start, written_seconds)

    def commit_if_written(self, written: bool) -> None:
        """Commits the save in progress if there is one; `written`: whether every process has written its part."""
        if self._pending is not None and written:
            self._commit_pending()

    def finish(self) -> None:
        """Waits for the save in progress and commits it. Progress of the write is a heartbeat, so the watchdog ends a
        write that stands still, as on storage that is gone."""
        if self._pending is None:
            return
        start = time.perf_counter()
        pending, seen = self._pending, -1
        while pending.thread.is_alive():
            if pending.write.fragments_written > seen:
                seen = pending.write.fragments_written
                heartbeat.at("save.waiting")
            pending.thread.join(1.0)
        heartbeat.at("save.waiting")
        self._stall_seconds += time.perf_counter() - start
        self._commit_pending()

    def _commit_pending(self) -> None:
        pending, start = self._pending, time.perf_counter()
        assert pending is not None
        self._pending = None
        with pending.resources:
            committed = self._commit(pending.write, final=False)
        if committed:
            stall_seconds = self._stall_seconds + time.perf_counter() - start
            self._succeeded(pending.write.content.step, stall_seconds, pending.written_seconds)

    def _commit(self, write: CheckpointWrite, final: bool) -> bool:
        """Commits a checkpoint; whether it exists now. An error after it exists is reported, but the save did not
        fail."""
        step = write.content.step
        try:
            write.commit()
        except CheckpointError as error:
            if not write.committed:
                self._count_failure(error, step, final)
                return False
            self.report("save_untidy", step, error=str(error))
        self.newest = write.content.target
        return True

    def _succeeded(self, step: int, stall_seconds: float, write_seconds: float) -> None:
        self._failed_in_a_row = 0
        self.report(
            "checkpoint", step, folder=str(self.newest), stall_seconds=stall_seconds, write_seconds=write_seconds
        )

    def _count_failure(self, error: CheckpointError, step: int, final: bool) -> None:
        self._failed_in_a_row += 1
        if final or self._failed_in_a_row >= self.failures:
            raise error
        self.report("save_failed", step, error=str(error), in_a_row=self._failed_in_a_row)
