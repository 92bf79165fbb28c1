"""Where this process is, marked by the code at every place that matters.

`heartbeat.at(place)` stands where a step, a save, an event or a resume gets to a new place
(`pretrain/resilience/fault_injection.py` lists them). It winds the watchdog up again, and a fault that was asked for at
this place happens there.
"""

import threading
import time

from pretrain.resilience.fault_injection import inject_fault


class Position:
    """The place of this process's main thread."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Begins anew, as a process does."""
        self.place, self.step, self.reached, self.since = "start", 0, 0, time.monotonic()

    def move(self, place: str, step: int) -> None:
        """Notes the place and the time."""
        self.place, self.step, self.since = place, step, time.monotonic()
        self.reached += not place.startswith("save.")  # to some of which process 0 alone comes


position = Position()


def at(place: str, step: int | None = None) -> None:
    """Marks that this process is at `place` of `step`; None: of the present one."""
    step = position.step if step is None else step
    if threading.current_thread() is threading.main_thread():
        position.move(place, step)
    inject_fault(place, step)


def place_and_step() -> str:
    """The place in words, for messages."""
    return f"{position.place} of step {position.step}"
