"""Marks where this process is: the heartbeat of the watchdog.

`heartbeat.at(place)` is called where a step, a save, a growth event or a resume comes to a new place; the places are
listed in `pretrain/resilience/fault_injection.py`. It restarts the watchdog's time, and makes a fault happen that was
asked for at this place.
"""

import threading
import time

from pretrain.resilience.fault_injection import inject_fault


class Position:
    """The place of this process's main thread."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Goes back to the position of a new process."""
        self.place, self.step, self.reached, self.since = "start", 0, 0, time.monotonic()

    def move(self, place: str, step: int) -> None:
        """Notes the place and the time."""
        self.place, self.step, self.since = place, step, time.monotonic()
        self.reached += not place.startswith("save.")  # process 0 alone comes to some places of a save


position = Position()


def at(place: str, step: int | None = None) -> None:
    """Marks that this process is at `place` of `step`; None: of the same step as before."""
    step = position.step if step is None else step
    if threading.current_thread() is threading.main_thread():
        position.move(place, step)
    inject_fault(place, step)


def place_and_step() -> str:
    """The place and the step in words, for messages."""
    return f"{position.place} of step {position.step}"
