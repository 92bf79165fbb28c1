"""Prints a run's progress: a bar that is redrawn, or without a terminal one line for each logged step."""

import sys
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console as Terminal
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text


class Console:
    """Prints for process 0; prints nothing if `silent`."""

    def __init__(self, steps: int, resumed_step: int, *, silent: bool) -> None:
        self._steps, self._first_step, self._silent, self._began = steps, resumed_step, silent, time.monotonic()
        self._bar: Progress | None = None
        if not silent and sys.stderr.isatty():
            self._bar = _open_bar(steps, resumed_step)

    def progress(self, step: int, shown: Mapping[str, str]) -> None:
        """Shows a logged step."""
        pace = (time.monotonic() - self._began) / max(step - self._first_step, 1)
        left = int(pace * (self._steps - step))
        clock = f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"
        facts = "  ".join(f"{name} {value}" for name, value in shown.items())
        line = f"step {step}/{self._steps}  {facts}  left {clock}"
        if self._bar is None:
            self.print(line)
        else:
            self._bar.update(self._bar.task_ids[0], completed=step, description=line, refresh=True)

    def log_record(self, kind: str, step: int, facts: Mapping[str, Any]) -> None:
        shown = "  ".join(
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in facts.items()
        )
        self.print(f"[{kind}] step {step}  {shown}".rstrip())

    def print(self, text: str) -> None:
        if self._silent:
            return
        if self._bar is not None:
            self._bar.console.print(Text(text), soft_wrap=True)
        else:
            print(text, flush=True)

    def close(self) -> None:
        """Ends the progress line."""
        if self._bar is not None:
            self._bar.stop()


def _open_bar(steps: int, resumed_step: int) -> Progress:
    """A bar on standard error, drawn when a step is logged and never by a thread of its own, which would take time from
    training."""
    bar = Progress(
        BarColumn(),
        TextColumn("{task.description}", markup=False),
        console=Terminal(stderr=True),
        auto_refresh=False,
        redirect_stdout=False,
        redirect_stderr=False,
    )
    bar.add_task(f"step {resumed_step}/{steps}", total=steps, completed=resumed_step)
    bar.start()
    bar.console.show_cursor(True)  # a process that is killed could not bring it back
    return bar
