"""The runs of a race that are compared: methods, their runs of full length, and the curves of these."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tools.experiments.race_plan import Method, RaceConfig, loss_of, tuned_rate
from tools.experiments.race_speed import StepSeconds, seconds_until


@dataclass(frozen=True)
class Curve:
    """One run of full length, at its validations."""

    record: Mapping[str, Any]
    loss: list[float]
    flops: list[float]
    """Total, in units of 1e12."""
    seconds: list[float] | None
    """None: this kind of model was not timed."""


@dataclass(frozen=True)
class Entry:
    """One method with its runs of full length, by seed."""

    name: str
    method: Method
    rate: float
    curves: dict[int, Curve]

    @property
    def first(self) -> Curve:
        return next(iter(self.curves.values()))

    def losses(self) -> dict[int, float]:
        """Loss at the end by seed."""
        return {seed: loss_of(curve.record) for seed, curve in self.curves.items()}


def collect(race: RaceConfig, content: Mapping[str, Any]) -> dict[str, Entry]:
    """Methods that have at least one run of full length at their own learning rate, in the order of the race."""
    step_seconds = StepSeconds(content["speed"])
    entries = {}
    for name, method in race.methods.items():
        rate = tuned_rate(race, name, content["runs"])
        curves = {
            record["seed"]: _curve(record, step_seconds)
            for record in content["runs"].values()
            if (record["method"], record["learning_rate"], record["steps"]) == (name, rate, race.full_steps(name))
        }
        if rate is not None and curves:
            entries[name] = Entry(name, method, rate, dict(sorted(curves.items())))
    return entries


def _curve(record: Mapping[str, Any], step_seconds: StepSeconds) -> Curve:
    points = record["validation"]
    seconds = [seconds_until(point["step"], record, step_seconds) for point in points]
    known = [value for value in seconds if value is not None]
    return Curve(
        record,
        [point["loss"] for point in points],
        [point["flops"] / 1e12 for point in points],
        known if len(known) == len(points) else None,
    )
