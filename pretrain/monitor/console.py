"""Prints a run's progress: one line that is redrawn, or without a terminal one line for each logged step."""

import sys
import time
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm


class Console:
    """Prints for process 0; prints nothing if `silent`."""

    def __init__(self, steps: int, resumed_step: int, *, silent: bool) -> None:
        self._steps, self._first_step, self._silent, self._began = steps, resumed_step, silent, time.monotonic()
        self._bar: tqdm | None = None
        if not silent and sys.stderr.isatty():
            self._bar = tqdm(total=steps, initial=resumed_step, unit="step", dynamic_ncols=True)

    def progress(self, step: int, shown: Mapping[str, str]) -> None:
        """Shows a logged step."""
        if self._bar is not None:
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update(step - self._bar.n)
            return
        pace = (time.monotonic() - self._began) / max(step - self._first_step, 1)
        left = int(pace * (self._steps - step))
        clock = f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"
        facts = "  ".join(f"{name} {value}" for name, value in shown.items())
        self.print(f"step {step}/{self._steps}  {facts}  left {clock}")

    def log_record(self, kind: str, step: int, facts: Mapping[str, Any]) -> None:
        shown = "  ".join(
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in facts.items()
        )
        self.print(f"[{kind}] step {step}  {shown}".rstrip())

    def print(self, text: str) -> None:
        if self._silent:
            return
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            print(text, flush=True)

    def close(self) -> None:
        """Ends the progress line."""
        if self._bar is not None:
            self._bar.close()
