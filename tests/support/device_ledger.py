"""The record of what happened on a pretended GPU: mistakes, host waits, kernels, bytes across, each with its place.

A place is the innermost frame of the product's own code, behind it the innermost one of a library that it called:

    pretrain/trainer.py:139 self.engine.step() > deepspeed/runtime/zero/stage_1_and_2.py:2141 ...

Waits and kernels are kept by the part of a training step in which they happened (`Part`), so that `count()` before and
after some code, subtracted, says what that code cost.
"""

import linecache
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Part = Literal["forward and backward", "engine.step", "rest"]

_ROOT = f"{Path(__file__).resolve().parents[2]}/"
_OWN_FOLDERS = tuple(f"{_ROOT}{name}/" for name in ("model", "pretrain", "tools", "tests"))
_HIDDEN = tuple(f"{_ROOT}tests/support/{name}.py" for name in (
    "cuda_answers", "device_ledger", "device_marks", "device_modes", "pretended_cuda", "plain_step",
))  # fmt: skip
"""The pretended GPU's own files."""
_LIBRARIES = ("deepspeed", "megatron", "liger_kernel", "transformers")
_PASSED_THROUGH = "deepspeed/accelerator/"
"""A folder of functions that say nothing but `torch.cuda`'s."""
_LINE_WIDTH = 80


@dataclass(frozen=True)
class Count:
    """What was recorded up to now, or between two moments."""

    kernels: Counter[Part] = field(default_factory=Counter)
    operators: Counter[str] = field(default_factory=Counter)
    """Kernels by the name of the operator that launched them."""
    waits: Counter[tuple[Part, str]] = field(default_factory=Counter)
    """By part and by cause with its place."""
    copied_bytes: Counter[str] = field(default_factory=Counter)
    """By direction and place."""

    def __sub__(self, earlier: "Count") -> "Count":
        return Count(
            self.kernels - earlier.kernels,
            self.operators - earlier.operators,
            self.waits - earlier.waits,
            self.copied_bytes - earlier.copied_bytes,
        )

    def waits_of(self, part: Part) -> int:
        return sum(number for (where, _), number in self.waits.items() if where == part)

    def __str__(self) -> str:
        parts: tuple[Part, ...] = ("forward and backward", "engine.step", "rest")
        split = ", ".join(f"{part} {self.kernels[part]:,} and {self.waits_of(part)}" for part in parts)
        return f"{self.kernels.total():,} kernels and {self.waits.total()} host waits ({split})"


class Ledger:
    """The records of one pretended GPU."""

    def __init__(self) -> None:
        self.problems: Counter[str] = Counter()
        """What a GPU would have refused or got wrong, with places."""
        self._count = Count()
        self._part: Part = "rest"

    @property
    def kernels(self) -> int:
        """Kernels launched up to now."""
        return self._count.kernels.total()

    def problem(self, text: str) -> None:
        self.problems[f"{text}  at  {place()}"] += 1

    def wait(self, cause: str) -> None:
        """The host stands still until the device has done all it was asked for."""
        self._count.waits[self._part, f"{cause}  at  {place()}"] += 1

    def kernel(self, operator: str) -> None:
        self._count.kernels[self._part] += 1
        self._count.operators[operator] += 1

    def copied(self, direction: str, size_bytes: int) -> None:
        self._count.copied_bytes[f"{direction}  at  {place()}"] += size_bytes

    @contextmanager
    def part(self, part: Part) -> Iterator[None]:
        """Inside it everything is put down to `part`; the innermost one counts."""
        outside, self._part = self._part, part
        try:
            yield
        finally:
            self._part = outside

    def count(self) -> Count:
        """A copy of what was recorded up to now."""
        return self._count - Count()


def place() -> str:
    """Where the code stands that is to blame for what is recorded now."""
    library, frame = "", sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(_OWN_FOLDERS) and file not in _HIDDEN:
            return _line(file.removeprefix(_ROOT), file, frame.f_lineno) + library
        _, inside, rest = file.rpartition("/site-packages/")
        if inside and not library and rest.startswith(_LIBRARIES) and not rest.startswith(_PASSED_THROUGH):
            library = f" > {_line(rest, file, frame.f_lineno)}"
        frame = frame.f_back  # type: ignore[assignment]
    return library.removeprefix(" > ") or "?"


def _line(name: str, file: str, number: int) -> str:
    return f"{name}:{number} {linecache.getline(file, number).strip()[:_LINE_WIDTH]}"
