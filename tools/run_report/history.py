"""What a run left in its folder, read back for pictures: settings, curves, ranks, events, singular values, summary.

The files may come from anywhere: what is no number where a number belongs is left out, and text stays text.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from model.config import factored_projections
from pretrain.config.run import RunConfig
from pretrain.disk import JsonLines, plain_file_bytes
from pretrain.errors import CheckpointError, ConfigError
from pretrain.monitor.board import UNMARKED
from pretrain.monitor.monitor import SPECTRA_FILE
from pretrain.monitor.run_folder import recorded_config


@dataclass(frozen=True)
class Point:
    """A loss, and what had been spent when it was reached."""

    step: int
    flops: float
    seconds: float
    lm_loss: float


_EARLIER_KINDS = {"augmentation": "growth"}
"""Kinds of records as version 0.1 wrote them."""


class RunHistory:
    """One run folder; ConfigError if it is none."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.name = folder, folder.resolve().name
        self.config: RunConfig = recorded_config(folder)
        self.events = [
            {**event, "event": _EARLIER_KINDS.get(event["event"], event["event"])}
            for event in JsonLines(folder / "events.jsonl").read()
            if isinstance(event.get("event"), str)
        ]
        self._metrics = JsonLines(folder / "metrics.jsonl").read()
        self.summary = _json_object(folder / "summary.json")

    @cached_property
    def training(self) -> list[Point]:
        """The loss of each logged step."""
        points = []
        for line in self._metrics:
            values = [number(line.get(key)) for key in ("training_flops", "training_seconds", "lm_loss")]
            if None not in values:
                points.append(Point(line["step"], *values))  # type: ignore[arg-type]
        return points

    @cached_property
    def validation(self) -> list[Point]:
        """The newest validation of each step, at what the nearest logged step before it had spent."""
        points: dict[int, Point] = {}
        for event in self.events:
            loss = number(event.get("lm_loss"))
            before = [point for point in self.training if point.step <= event["step"]]
            if event["event"] == "validation" and loss is not None and before:
                points[event["step"]] = Point(event["step"], before[-1].flops, before[-1].seconds, loss)
        return [points[step] for step in sorted(points)]

    @cached_property
    def ranks(self) -> list[tuple[int, dict[str, int]]]:
        """The steps at which ranks changed, and the ranks from there on; empty for a dense model.

        What happened after the step at which a run was taken up again, or began again, is undone.
        """
        names = {projection.name for projection in factored_projections(self.config.model)}
        grown: list[tuple[int, dict[str, int], dict[str, int]]] = []
        for event in self.events:
            if event["event"] in ("growth", "resume", "rollback"):
                grown = [one for one in grown if one[0] < event["step"]]
            if event["event"] == "growth":
                before, after = (_ranks(event.get(side), names) for side in ("before", "after"))
                grown.append((event["step"], before, after))
        if not names:
            return []
        start = self.config.initial_ranks()
        for _, before, _ in reversed(grown):
            start |= before
        history = [(0, start)]
        for step, _, after in grown:
            history.append((step, history[-1][1] | after))
        return history

    @cached_property
    def spectra(self) -> tuple[int, dict[str, list[float]]] | None:
        """The newest singular values by `Projection.name`, and their step."""
        content = _json_object(self.folder / SPECTRA_FILE)
        values, step = content.get("singular_values"), content.get("step")
        if not isinstance(values, dict) or not isinstance(step, int):
            return None
        found = {}
        for projection in factored_projections(self.config.model):
            spectrum = [number(value) for value in _list(values.get(projection.label))]
            if spectrum and None not in spectrum:
                found[projection.name] = [value for value in spectrum if value is not None]
        return (step, found) if found else None

    @property
    def last_step(self) -> int:
        return max((line["step"] for line in self._metrics), default=0)

    def marks(self) -> list[dict[str, Any]]:
        """Events that a picture marks."""
        return [event for event in self.events if event["event"] not in UNMARKED]


def number(value: object) -> float | None:
    """A finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _ranks(value: object, names: set[str]) -> dict[str, int]:
    """The ranks of layers that the model has."""
    found: Mapping[object, object] = value if isinstance(value, dict) else {}
    return {
        str(name): rank
        for name, rank in found.items()
        if name in names and isinstance(rank, int) and not isinstance(rank, bool) and 0 < rank < 2**31
    }


def _list(value: object) -> Sequence[object]:
    return value if isinstance(value, list) else []


def _json_object(path: Path) -> dict[str, Any]:
    """A file of one JSON object; what is not there is empty."""
    if not path.exists():
        return {}
    try:
        plain_file_bytes(path)
        content = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (CheckpointError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read ({error}): remove it, or give another --run") from error
    return content if isinstance(content, dict) else {}
