"""Seconds of a race: measured apart from its runs, which share their machine with whatever else goes on.

`--speed` times short runs, dense and at several ranks, one kind after the other and all of them again, on a machine
that should be idle. The seconds of a run are then

    Σ over its steps  t(parameters of its blocks at that step)  +  Σ over its events  their own seconds

where t is linear between the ranks that were timed and dense models have a time of their own. Events (growth; decisions
with what their probed steps took more than the steps between) carry the seconds they took in the run itself, on
whatever else the machine did.
"""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from model.config import ModelConfig, factored_projections
from pretrain.config.files import merge
from pretrain.disk import JsonLines
from tools.experiments.race_plan import RaceConfig, Run, run_config, run_settings
from tools.experiments.race_results import Results
from tools.experiments.race_runs import Runner

_WARM_UP_SHARE = 0.25
_NO_FILES = {"prefix": "corpus", "tokenizer": "tokenizer.model"}


@dataclass(frozen=True)
class Timing:
    """One kind of model that is timed."""

    kind: str
    """Architecture and parametrization, see `kind_of`."""
    rank: int | None
    settings: dict[str, Any]

    def key(self, repeat: int) -> str:
        """Name in the results, and folder."""
        rank = "" if self.rank is None else f" rank {self.rank}"
        return f"{self.kind}{rank} #{repeat}"


def kind_of(model: ModelConfig) -> str:
    """Models of one kind differ in rank alone: `llama 4x128 factored`, `gpt2 4x128 factored mlp`."""
    layers = " mlp" if model.parametrization != "dense" and model.factored_layers == "mlp" else ""
    return f"{model.family} {model.layers}x{model.hidden} {model.parametrization}{layers}"


def timings(race: RaceConfig) -> list[Timing]:
    """Everything that the methods of a race need timed, in order."""
    found: dict[str, list[Timing]] = {}
    for name, method in race.methods.items():
        run = Run(name, method.learning_rates[0], race.tuning_seed, race.full_steps(name))
        for part in run_settings(race, run):
            model = run_config(part, _NO_FILES, "run").model
            kind = kind_of(model)
            if kind not in found:
                found[kind] = [
                    Timing(kind, rank, _timed_settings(race, part, rank)) for rank in _timed_ranks(race, model)
                ]
    return [timing for group in found.values() for timing in group]


def _timed_ranks(race: RaceConfig, model: ModelConfig) -> Sequence[int | None]:
    layers = factored_projections(model)
    if not layers:
        return [None]
    cap = min(layer.break_even_rank for layer in layers)
    return [rank for rank in race.speed_ranks if rank <= cap]


def _timed_settings(race: RaceConfig, part: Mapping[str, Any], rank: int | None) -> dict[str, Any]:
    train = {"steps": race.speed_steps, "validate_every": 0, "validation_sequences": 0, "log_every": 1}
    settings = {
        **{section: part[section] for section in ("model", "optimizer", "deepspeed") if section in part},
        "train": merge(part["train"], train),
        "checkpoint": {"every": 0},
    }
    return settings if rank is None else {**settings, "rank": {"policy": "fixed", "initial": rank}}


def measure(race: RaceConfig, results: Results, runner: Runner) -> None:
    """Times everything that is not in the results yet; interrupted, it goes on."""
    for repeat in range(1, race.speed_repeats + 1):
        for timing in timings(race):
            key = timing.key(repeat)
            if key in results.read()["speed"]:
                continue
            folder = f"speed/{key.replace(' ', '_').replace('#', '')}"
            figures = runner.time(folder, timing.settings)
            seconds = _median_step_seconds(runner.folder(folder) / "training" / "metrics.jsonl")
            facts = {"kind": timing.kind, "rank": timing.rank, "step_seconds": seconds}
            size = {"linear_parameters": figures["ranks"][-1]["linear_parameters"]}
            origin = {name: figures[name] for name in ("commit", "versions", "hardware")}
            results.add("speed", key, {**facts, **size, **origin})
            print(f"{key}: {seconds:.4f} s a step", flush=True)


def _median_step_seconds(metrics: Path) -> float:
    """Median seconds of a step, without the first ones, which are slower."""
    seconds = [line["step_seconds"] for line in JsonLines(metrics).read()]
    return statistics.median(seconds[round(_WARM_UP_SHARE * len(seconds)) :])


class StepSeconds:
    """Step time by kind of model and parameters of its blocks."""

    def __init__(self, speed: Mapping[str, Mapping[str, Any]]) -> None:
        samples: dict[str, dict[int, list[float]]] = {}
        for record in speed.values():
            sizes = samples.setdefault(record["kind"], {})
            sizes.setdefault(record["linear_parameters"], []).append(record["step_seconds"])
        self._tables = {
            kind: sorted((size, statistics.median(seconds)) for size, seconds in sizes.items())
            for kind, sizes in samples.items()
        }

    def known(self, kind: str) -> bool:
        return kind in self._tables

    def at(self, kind: str, size: int) -> float:
        """Seconds of a step with this many parameters in the blocks; beyond the ends the last line goes on."""
        table = self._tables[kind]
        if len(table) == 1:
            return table[0][1]
        sizes, seconds = np.array(table).T
        first = int(np.clip(np.searchsorted(sizes, size) - 1, 0, len(table) - 2))
        slope = (seconds[first + 1] - seconds[first]) / (sizes[first + 1] - sizes[first])
        return float(seconds[first] + slope * (size - sizes[first]))


def seconds_until(step: int, record: Mapping[str, Any], step_seconds: StepSeconds) -> float | None:
    """Seconds of the first `step` steps of a recorded run and of its events; None if something was not timed."""
    total = sum(float(event.get("seconds", 0.0)) for event in record["events"] if event["step"] < step)
    for stretch, kind in _kinds(record):
        steps = min(max(step - stretch["first_step"], 0), stretch["steps"])
        if steps and not step_seconds.known(kind):
            return None
        total += steps * step_seconds.at(kind, stretch["linear_parameters"]) if steps else 0.0
    return total


def _kinds(record: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], str]]:
    """Every stretch of a run with its kind of model: the parts of a run are told apart by dense and factored."""
    models = [ModelConfig.model_validate(part["model"]) for part in record["settings"]]
    by_density = {model.parametrization == "dense": kind_of(model) for model in models}
    for stretch in record["ranks"]:
        yield stretch, by_density[stretch["mean_rank"] is None]
