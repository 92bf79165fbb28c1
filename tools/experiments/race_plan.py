"""What a race consists of: its methods, the runs they need, and which of them are due.

A race compares methods of training one model on one text. Every method gets its own learning rate: the best of a grid,
tried at a fraction of the length, and the grid grows by its own factor until the best value has a neighbour on both
sides. Only runs of full length are compared; `check_rates` tells what another rate would have come to there.

A race is one YAML file. Settings of the runs are those of `pretrain.config.run`; there, a value written as `5%` is that
share of the run's steps (at least one), so that a schedule keeps its shape at every length.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from pretrain.config.files import explain, merge, read_settings
from pretrain.config.run import RunConfig, parse_config
from pretrain.errors import ConfigError, EspalierError

_SHARE = re.compile(r"^(\d+(?:\.\d+)?)%$")
_MOST_EXTENSIONS = 6


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class TextConfig(_Section):
    """What is read, and what is held out for validation."""

    files: tuple[str, ...] = Field((), description="where the text is, unless --text says so")
    held_out: tuple[str, ...] = Field(min_length=1, description="documents whose `source` begins with one of these")
    vocabulary: int = Field(1024, description="tokens of the tokenizer, trained on the training text alone")


class SwitchConfig(_Section):
    """A dense beginning: trained for a part of the run, then cut to factors by singular value decomposition."""

    share: float = Field(gt=0.0, lt=1.0, description="of the steps that are taken densely")
    settings: dict[str, dict[str, Any]] = Field({}, description="of the dense part, laid over all others")


class Method(_Section):
    """One entry of the comparison."""

    title: str = Field(min_length=1, description="name in the table")
    order: int = Field(1, description="methods of a lower order run first")
    group: str = Field("", description="heading under which it stands in the report")
    against: str | None = Field(None, description="the dense method it is measured against; none: the baseline")
    control: str | None = Field(None, description="the method of the same budget that decides nothing")
    length: float = Field(1.0, gt=0.0, description="steps, as a share of those of the race")
    settings: dict[str, dict[str, Any]] = Field({}, description="laid over the settings of the race")
    learning_rates: tuple[float, ...] = Field(min_length=2, description="the grid, ascending by one factor")
    check_rates: tuple[float, ...] = Field((), description="also run at full length, and reported beside the tuned one")
    seeds: tuple[int, ...] = Field((1,), min_length=1, description="of the runs of full length")
    switch: SwitchConfig | None = None

    @field_validator("learning_rates")
    @classmethod
    def _grid_has_one_factor(cls, rates: tuple[float, ...]) -> tuple[float, ...]:
        factors = [after / before for before, after in pairwise(rates) if before > 0.0]
        if (
            len(factors) < len(rates) - 1
            or factors[0] <= 1.0
            or not all(math.isclose(f, factors[0], rel_tol=1e-3) for f in factors)
        ):
            raise ValueError(
                f"learning_rates {', '.join(f'{rate:g}' for rate in rates)} do not ascend by one factor: "
                "write them as 1e-3, 2e-3, 4e-3"
            )
        return rates


class RaceConfig(_Section):
    """A whole race."""

    text: TextConfig
    steps: int = Field(ge=4, description="steps of the runs that are compared")
    tuning_steps: int = Field(ge=2, description="steps of the runs that choose the learning rate")
    tuning_seed: int = Field(1, ge=0, description="seed of the runs that choose the learning rate")
    final_rate: float = Field(0.1, ge=0.0, le=1.0, description="learning rate at the end, as a share of its peak")
    baseline: str = Field(description="the method that the others are measured against")
    frontier: tuple[str, ...] = Field((), description="fixed ranks, between which others are placed by their FLOPs")
    settings: dict[str, dict[str, Any]] = Field({}, description="of every run")
    tuning_settings: dict[str, dict[str, Any]] = Field({}, description="laid over them in runs that choose")
    speed_steps: int = Field(16, ge=4, description="steps of one timed run (--speed)")
    speed_repeats: int = Field(3, ge=1, description="timed runs of each kind, one kind after the other")
    speed_ranks: tuple[int, ...] = Field((8, 16, 32, 48), min_length=2, description="ranks that are timed")
    methods: dict[str, Method] = Field(min_length=1)

    @model_validator(mode="after")
    def _names_are_known(self) -> "RaceConfig":
        if self.baseline not in self.methods:
            raise ValueError(f"baseline {self.baseline} is no method: set it to one of {', '.join(self.methods)}")
        for name in self.frontier:
            if name not in self.methods:
                raise ValueError(f"frontier {name} is no method: set it to some of {', '.join(self.methods)}")
        for name, method in self.methods.items():
            if not re.fullmatch(r"[a-z0-9_]+", name):
                raise ValueError(f"method {name!r} is no plain name: use small letters, digits and _")
            for key, other in (("against", method.against), ("control", method.control)):
                if other is not None and other not in self.methods:
                    raise ValueError(
                        f"methods.{name}.{key} {other} is no method: set it to one of {', '.join(self.methods)}"
                    )
        if self.tuning_steps >= self.steps:
            raise ValueError(f"tuning_steps {self.tuning_steps} is not below steps {self.steps}: lower it")
        return self

    def full_steps(self, method: str) -> int:
        """Steps of a method's runs that are compared."""
        return round(self.methods[method].length * self.steps)

    def short_steps(self, method: str) -> int:
        """Steps of a method's runs that choose its learning rate."""
        return round(self.methods[method].length * self.tuning_steps)


@dataclass(frozen=True)
class Run:
    """One training run of a race."""

    method: str
    learning_rate: float
    seed: int
    steps: int

    @property
    def key(self) -> str:
        """Its name in the results, and its folder."""
        return f"{self.method}/lr{self.learning_rate:g}_seed{self.seed}_steps{self.steps}"


def load_race(path: Path) -> RaceConfig:
    """The race in a YAML file, with the settings of all its methods checked."""
    try:
        race = RaceConfig.model_validate(read_settings(path))
    except ValidationError as error:
        raise ConfigError(f"{path}: {explain(error, RaceConfig)}") from error
    for name, method in race.methods.items():
        for steps in (race.full_steps(name), race.short_steps(name)):
            run = Run(name, method.learning_rates[0], race.tuning_seed, steps)
            try:
                for settings in run_settings(race, run):
                    run_config(settings, {"prefix": "corpus", "tokenizer": "tokenizer.model"}, "run")
            except ConfigError as error:
                raise ConfigError(f"{path}: method {name}: {error}") from error
    return race


def run_settings(race: RaceConfig, run: Run) -> list[dict[str, Any]]:
    """The settings of a run, without the places of its files: one mapping for each part, in order.

    A method with a dense beginning has two parts, any other has one.
    """
    method = race.methods[run.method]
    settings = race.settings
    if run.steps == race.short_steps(run.method):
        settings = merge(settings, race.tuning_settings)
    rates = {"learning_rate": run.learning_rate, "minimum_learning_rate": race.final_rate * run.learning_rate}
    own = {"run": {"seed": run.seed}, "optimizer": rates}
    main = merge(merge(settings, method.settings), own)
    if method.switch is None:
        return [_resolved(main, run.steps)]
    begun = round(method.switch.share * run.steps)
    beginning = merge(merge(settings, own), method.switch.settings)
    return [_resolved(beginning, begun), _resolved(main, run.steps - begun)]


def _resolved(settings: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """Settings for a number of steps: shares such as `5%` become steps."""

    def number(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: number(inner) for key, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return [number(inner) for inner in value]
        share = _SHARE.match(value) if isinstance(value, str) else None
        return value if share is None else max(round(float(share[1]) / 100.0 * steps), 1)

    return merge(number(dict(settings)), {"train": {"steps": steps}})


def run_config(settings: Mapping[str, Any], data: Mapping[str, str], folder: str) -> RunConfig:
    """The config of a run with its data section and its folder."""
    return parse_config(merge(dict(settings), {"run": {"folder": folder}, "data": dict(data)}))


def loss_of(record: Mapping[str, Any]) -> float:
    """Validation loss at the end of a run; infinite when it diverged."""
    return math.inf if record["diverged"] else float(record["validation_loss"])


def tuning_losses(race: RaceConfig, method: str, records: Mapping[str, Mapping[str, Any]]) -> dict[float, float]:
    """Loss by learning rate, of the runs that chose so far."""
    return _losses(records, method, race.tuning_seed, race.short_steps(method))


def full_losses(race: RaceConfig, method: str, records: Mapping[str, Mapping[str, Any]]) -> dict[float, float]:
    """Loss by learning rate, of the runs of full length with the first seed."""
    return _losses(records, method, race.methods[method].seeds[0], race.full_steps(method))


def _losses(records: Mapping[str, Mapping[str, Any]], method: str, seed: int, steps: int) -> dict[float, float]:
    return {
        record["learning_rate"]: loss_of(record)
        for record in records.values()
        if (record["method"], record["seed"], record["steps"]) == (method, seed, steps)
    }


def missing_rates(grid: tuple[float, ...], losses: Mapping[float, float]) -> list[float]:
    """Learning rates still to be tried; none when the best one has been found.

    First the grid, then one value beyond the edge that the best one lies on.
    """
    missing = [rate for rate in grid if rate not in losses]
    if missing:
        return missing
    tried = sorted(losses)
    best = best_rate(losses)
    if best not in (tried[0], tried[-1]):
        return []
    if len(tried) >= len(grid) + _MOST_EXTENSIONS:
        raise EspalierError(
            f"the best learning rate is still at the edge of {tried[0]:g} to {tried[-1]:g} after {_MOST_EXTENSIONS} "
            "values beyond learning_rates: choose another grid"
        )
    factor = grid[1] / grid[0]
    return [float(f"{best / factor if best == tried[0] else best * factor:.4g}")]


def best_rate(losses: Mapping[float, float]) -> float:
    """The learning rate of the lowest loss, the lower one of two."""
    return min(sorted(losses), key=lambda rate: losses[rate])


def tuned_rate(race: RaceConfig, method: str, records: Mapping[str, Mapping[str, Any]]) -> float | None:
    """The learning rate that a method has been given, or None as long as that is open."""
    losses = tuning_losses(race, method, records)
    return None if missing_rates(race.methods[method].learning_rates, losses) else best_rate(losses)


def due_runs(race: RaceConfig, records: Mapping[str, Mapping[str, Any]]) -> list[Run]:
    """Runs that are not recorded and whose learning rate is known, first things first.

    By order: the runs that choose, then those of full length with the first seed; further seeds after everything else.
    """
    return [run for run in _runs(race, records) if run.key not in records]


def _runs(race: RaceConfig, records: Mapping[str, Mapping[str, Any]]) -> Iterator[Run]:
    rates = {name: rate for name in race.methods if (rate := tuned_rate(race, name, records)) is not None}
    for order in sorted({method.order for method in race.methods.values()}):
        group = {name: method for name, method in race.methods.items() if method.order == order}
        for name, method in group.items():
            for rate in missing_rates(method.learning_rates, tuning_losses(race, name, records)):
                yield Run(name, rate, race.tuning_seed, race.short_steps(name))
        for name in (name for name in group if name in rates):
            for rate in dict.fromkeys([rates[name], *group[name].check_rates]):
                yield Run(name, rate, group[name].seeds[0], race.full_steps(name))
    for name, rate in rates.items():
        for seed in race.methods[name].seeds[1:]:
            yield Run(name, rate, seed, race.full_steps(name))
