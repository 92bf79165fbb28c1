"""Tables and progress on the console, alike in all tools."""

import io
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

_WIDEST = 1000
"""Width of the page that tables are laid out on: nothing is cut or folded, and a pipe gets the same text."""


def table_lines(head: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> list[str]:
    """A table as lines of text: the first `left` columns flush left, the others, which hold figures, flush right."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for place, name in enumerate(head):
        table.add_column(Text(name), justify="left" if place < left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))
    page = io.StringIO()
    Console(file=page, width=_WIDEST, color_system=None).print(table)
    return [line.rstrip() for line in page.getvalue().splitlines()]


class Bar:
    """The bar of one piece of work."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task

    def advance(self, done: float = 1.0) -> None:
        """Moves the bar on by `done`."""
        self._progress.advance(self._task, done)

    def stand(self, done: float, note: str) -> None:
        """Sets the bar to `done` altogether, and shows `note` behind it."""
        self._progress.update(self._task, completed=done, note=note)


@contextmanager
def progress(what: str, total: float | None = None, *, unit: Literal["count", "bytes"] = "count") -> Iterator[Bar]:
    """Shows a bar on standard error, if that is a terminal; `total` None: nobody knows how much there is."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn() if unit == "bytes" else MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as shown:
        yield Bar(shown, shown.add_task(what, total=total, note=""))
