"""Ends a process that does not go on, so that no process waits for ever.

The watchdog is a thread of every process. If its process had no heartbeat (`pretrain/resilience/heartbeat.py`) for
`guard.hang_seconds`, it finds out which process holds the others up, prints that and the stacks, and ends the process
with exit code 5. A process that waits for another inside a collective cannot end itself. Each process writes a pulse,
with the place where it is, into a small store that process 0 serves.
"""

import faulthandler
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch.distributed as dist

from pretrain.errors import HangError
from pretrain.resilience.fault_injection import forget_faults, plan_faults
from pretrain.resilience.heartbeat import place_and_step, position

_STORE_SECONDS = 5.0
_SLOWEST_PULSE_SECONDS = 10.0


@dataclass(frozen=True)
class Pulse:
    """What one process reports about itself."""

    beat: int
    """Counter that rises as long as the process lives, whatever its main thread does."""
    reached: int
    """Number of places reached so far, without those of saves: the same on all processes when all wait for each
    other."""
    place: str
    step: int
    host: str


class Watchdog(threading.Thread):
    """Ends this process when it, or one it waits for, has stopped."""

    def __init__(self, hang_seconds: float) -> None:
        """Connects to the store, which process 0 serves; a collective."""
        super().__init__(name="watchdog", daemon=True)
        self.hang_seconds = hang_seconds
        self.pulse_seconds = min(hang_seconds / 5, _SLOWEST_PULSE_SECONDS)
        self.process, self.processes, self.host = dist.get_rank(), dist.get_world_size(), socket.gethostname()
        self.store = self._meet()
        self.ended = threading.Event()
        self.pulses_left, self.served_at = 0, time.monotonic()

    def _meet(self) -> dist.TCPStore:
        address, timeout = os.environ["MASTER_ADDR"], timedelta(seconds=_STORE_SECONDS)
        store = None
        port: list[int | None] = [None]
        if self.process == 0:
            store = dist.TCPStore(address, 0, is_master=True, wait_for_workers=False, timeout=timeout)
            port = [store.port]
        dist.broadcast_object_list(port, src=0)
        return store or dist.TCPStore(address, int(port[0] or 0), wait_for_workers=False, timeout=timeout)

    def run(self) -> None:
        # If the link is down, the store neither answers nor raises for a quarter of an hour.
        threading.Thread(target=self._leave_pulses, name="pulses", daemon=True).start()
        while not self.ended.wait(self.pulse_seconds):
            idle = time.monotonic() - position.since
            if idle > self.hang_seconds:
                self._end(idle)

    def _leave_pulses(self) -> None:
        while not self.ended.wait(self.pulse_seconds):
            self.pulses_left += 1
            pulse = Pulse(
                self.pulses_left,
                position.reached,
                position.place,
                position.step,
                self.host,
            )
            with suppress(RuntimeError):  # torch's DistError family: process 0 does not serve the store any more
                self.store.set(str(self.process), json.dumps(asdict(pulse)))
                self.served_at = time.monotonic()

    @property
    def _served(self) -> bool:
        return time.monotonic() - self.served_at < 3 * self.pulse_seconds

    def _pulses(self) -> dict[int, Pulse]:
        found = {}
        for process in range(self.processes):
            if self.store.check([str(process)]):
                found[process] = Pulse(**json.loads(self.store.get(str(process))))
        return found

    def _end(self, idle: float) -> None:
        blamed, speaks = "process 0, which serves the watchdogs, does not answer", True
        if self._served:
            try:
                before = self._pulses()
                time.sleep(3 * self.pulse_seconds)
                now = self._pulses()
            except RuntimeError:  # process 0 has found the cause itself, printed it and ended
                speaks = False
            else:
                blamed = diagnosis(before, now, self.process, self.processes)
                alive = [process for process, pulse in now.items() if pulse != before.get(process)]
                speaks = self.process == min([*alive, self.process])
        if speaks:
            print(
                f"error: {blamed}; process {self.process} has been at {place_and_step()} for {idle:.0f} s, and "
                f"guard.hang_seconds is {self.hang_seconds:g}: the run ends, and goes on from its newest checkpoint "
                "when it is started again (raise guard.hang_seconds if all was well)",
                file=sys.stderr,
            )
            faulthandler.dump_traceback(all_threads=True)
        sys.stderr.flush()
        os._exit(HangError.exit_code)


def diagnosis(before: Mapping[int, Pulse], now: Mapping[int, Pulse], observer: int, processes: int) -> str:
    """Which process holds the others up, in words: one without a pulse, or the one that is furthest behind."""
    unheard = [process for process in range(processes) if process not in now]
    if unheard:
        return f"process {unheard[0]} has never answered"
    silent = [process for process in now if process != observer and now[process] == before.get(process)]
    for process in silent[:1]:
        pulse = now[process]
        more = f" (and {len(silent) - 1} others)" if len(silent) > 1 else ""
        return f"process {process}{more} on {pulse.host} stopped answering at {pulse.place} of step {pulse.step}"
    last = min(now, key=lambda process: now[process].reached)
    pulse = now[last]
    if pulse.reached < max(other.reached for other in now.values()):
        return f"process {last} on {pulse.host} hangs at {pulse.place} of step {pulse.step}, behind the others"
    return f"all processes wait at {pulse.place} of step {pulse.step}"


_LOST = re.compile(r"closed by peer|reset by peer|Broken pipe|[Tt]imed out|NCCL error|Read error|Connection refused")


@contextmanager
def lost_peers_reported() -> Iterator[None]:
    """Turns the error that torch raises when another process is gone into a `HangError` of one sentence; leaves other
    errors as they are."""
    try:
        yield
    except RuntimeError as error:  # gloo has no class of its own
        if not _LOST.search(str(error)):
            raise
        raise HangError(
            f"process {dist.get_rank()} lost another one at {place_and_step()}, whose own message says why: start the "
            "run again to go on from its newest checkpoint"
        ) from error


@contextmanager
def watched(hang_seconds: float) -> Iterator[None]:
    """Context in which planned faults happen and hangs end after `hang_seconds` (0: never); all processes enter it
    together."""
    position.restart()
    plan_faults(dist.get_rank())
    watchdog = Watchdog(hang_seconds) if hang_seconds else None
    if watchdog is not None:
        watchdog.start()
    try:
        yield
    finally:
        forget_faults()
        if watchdog is not None:
            watchdog.ended.set()
            watchdog.join()
