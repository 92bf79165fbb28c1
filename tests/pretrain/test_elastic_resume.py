"""Resume on another layout: from any tensor-parallel and data-parallel size and ZeRO stage to any other, after growth.

A layout writes its logical state to the bit, and restores the checkpoint's to the bit. A run that changes its layout
continues as if it had not, up to rounding. By default a sample of the cases spans tensor parallel, data parallel,
stages and parametrizations; `-m matrix` runs them all.
"""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.checkpoint.format import KEYS
from pretrain.checkpoint.reader import CheckpointReader
from tests.support.distributed import run
from tests.support.elastic import (
    COMPUTING,
    PLACES,
    Found,
    Place,
    many_processes,
    resume_and_look,
    train_and_look,
    train_and_note_samples,
)
from tests.support.training_runs import curve, releasing, write_config

GLOBAL_BATCH, MICRO_BATCH = 8, 2
SECONDS = 600.0
"""Time limit for sixteen processes on few cores."""

MODELS: dict[str, dict[str, Any]] = {
    "factored": {"family": "llama", "query_groups": 2},
    "additive": {"family": "gpt2"},
    "dense": {"family": "llama", "query_groups": 4},
}
"""Model settings by parametrization."""


@pytest.fixture(scope="module", autouse=True)
def _sixteen() -> Iterator[None]:
    with many_processes():
        yield


def _sections(model: dict[str, Any], steps: int, rank: dict[str, Any]) -> dict[str, dict[str, Any]]:
    if model["parametrization"] == "dense":
        rank = {"policy": "fixed", "schedule": []}
    return {
        "model": model,
        "train": {"steps": steps, "micro_batch": MICRO_BATCH, "global_batch": GLOBAL_BATCH, "validation_sequences": 0},
        "optimizer": {"learning_rate": 1e-3},
        "rank": rank,
    }


def _releasing(place: Place, folder: Path) -> list[str]:
    """Overrides that run a config on `place`; ZeRO 3 releases parameters after use, however small they are."""
    if place.stage < 3:
        return place.settings
    return [*place.settings, f"deepspeed.config={releasing(folder.with_suffix('.json'))}"]


# What is written, what is restored ------------------------------------------------------------------------------------

WRITTEN_AT = 5
"""Steps of a run that grows after the second one."""

SOURCES = {"factored": Place(2, 2, 3), "additive": Place(4, 1, 1), "dense": Place(1, 4, 2)}
"""Parallel layout that writes the checkpoint for all readers, by parametrization."""
READERS = [(Place(4, 1, 0), "factored"), (Place(1, 2, 3), "additive")]


@dataclass(frozen=True)
class Written:
    """A finished run: its folder, its config, and the last state of its engine."""

    folder: Path
    config: Path
    state: Found

    @property
    def checkpoint(self) -> CheckpointReader:
        return CheckpointReader(self.folder / "checkpoints" / f"step_{WRITTEN_AT:09d}")


@pytest.fixture(scope="module")
def written(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Place, str], Written]:
    """Runs by writer and parametrization, each trained once."""
    runs: dict[tuple[Place, str], Written] = {}

    def of(place: Place, kind: str) -> Written:
        if (place, kind) not in runs:
            folder = tmp_path_factory.mktemp("written") / "run"
            model = {**MODELS[kind], "parametrization": kind}
            sections = _sections(model, WRITTEN_AT, {"schedule": [{"step": 2, "rank": 6}]})
            config = write_config(folder.with_suffix(".yaml"), corpus, folder, **sections)
            settings = _releasing(place, folder)
            everyone = run(train_and_look, place.processes, str(config), settings, timeout_seconds=SECONDS)
            runs[place, kind] = Written(folder, config, everyone[0])
        return runs[place, kind]

    return of


def _assert_same(checkpoint: CheckpointReader, found: Found) -> None:
    """Asserts that every logical tensor is the checkpoint's to the bit, and that Adam's step count is the same."""
    assert found.states["master"].keys() == checkpoint.layouts.keys()
    for name in checkpoint.layouts:
        for key in ("master",) if name in checkpoint.frozen else KEYS:
            assert torch.equal(checkpoint.read(name, key), found.states[key][name]), f"{key} of {name}"
        assert torch.equal(checkpoint.read(name), found.states[COMPUTING][name]), name
    assert found.adam_step == checkpoint.state["optimizer"]["adam_step"] == WRITTEN_AT
    assert found.ranks == checkpoint.state["ranks"]


@pytest.mark.parametrize(
    ("place", "kind"),
    [
        *((place, kind) for kind, place in SOURCES.items()),
        *(
            pytest.param(place, kind, marks=pytest.mark.matrix)
            for place in PLACES
            for kind in MODELS
            if place != SOURCES[kind]
        ),
    ],
    ids=str,
)
def test_a_checkpoint_is_the_logical_state(written: Callable[[Place, str], Written], place: Place, kind: str) -> None:
    """After a growth, one process reads the state that is gathered from the engine that wrote it."""
    source = written(place, kind)
    checkpoint = source.checkpoint
    checkpoint.verify()
    assert checkpoint.tensor_size == place.tensor
    assert bool(checkpoint.frozen) == (kind == "additive")
    assert {record["step"] for record in checkpoint.state["growth"]} == (set() if kind == "dense" else {2})
    assert set(checkpoint.state["ranks"].values()) == (set() if kind == "dense" else {6})
    _assert_same(checkpoint, source.state)
    for name in checkpoint.layouts.keys() - checkpoint.frozen:
        assert all(checkpoint.read(name, key).any() for key in KEYS), f"{name} has learned nothing"


@pytest.mark.parametrize(
    ("place", "kind"),
    [
        *READERS,
        *(
            pytest.param(place, kind, marks=pytest.mark.matrix)
            for place in PLACES
            for kind in MODELS
            if (place, kind) not in READERS
        ),
    ],
    ids=str,
)
def test_any_layout_restores_the_logical_state(
    written: Callable[[Place, str], Written], tmp_path: Path, place: Place, kind: str
) -> None:
    """Every process has the whole state before the first step."""
    source = written(SOURCES[kind], kind)
    folder = shutil.copytree(source.folder, tmp_path / "run")
    overrides = [*place.settings, f"run.folder={folder}", f"train.steps={WRITTEN_AT + 1}"]
    for found in run(resume_and_look, place.processes, str(source.config), overrides, timeout_seconds=SECONDS):
        _assert_same(source.checkpoint, found)


# Curves ---------------------------------------------------------------------------------------------------------------

STEPS, CHANGED_AT = 12, 6
GROWTH: dict[str, dict[str, Any]] = {
    "before": {"schedule": [{"step": 4, "rank": 6}]},
    "at": {"schedule": [{"step": 3, "rank": 6}, {"step": CHANGED_AT, "rank": 8}]},
    "after": {"schedule": [{"step": 4, "rank": 6}, {"step": 8, "rank": 10}]},
    "measured": {"policy": "gradient", "schedule": [], "check_every": 4, "stop_step": STEPS, "probe": 4, "budget": 0.9},
}
"""Settings of growth by when ranks grow: before, at or after the change of layout; "measured": the change is in the
middle of a measurement."""


@dataclass(frozen=True)
class Change:
    """A run that begins on one layout and continues on another."""

    writer: Place
    reader: Place
    parametrization: str
    family: str
    growth: str

    def __str__(self) -> str:
        return f"{self.writer}-to-{self.reader}-{self.family}-{self.parametrization}-{self.growth}"


def _changes(count: int) -> list[Change]:
    """Some of the 36 · 35 changes, the same ones every time. Every layout writes and every layout reads. This seed
    covers all pairs of tensor-parallel sizes, of data-parallel sizes and of stages, and every kind of growth in both
    families.
    """
    generator = random.Random(82)
    found: list[Change] = []
    while len(found) < count:
        writers, readers = (generator.sample(PLACES, len(PLACES)) for _ in range(2))
        for writer, reader in zip(writers, readers, strict=True):
            if writer != reader:
                parametrization = list(MODELS)[len(found) % len(MODELS)]
                family = generator.choice(["llama", "gpt2"])
                growth = "before" if parametrization == "dense" else generator.choice(list(GROWTH))
                found.append(Change(writer, reader, parametrization, family, growth))
    return found[:count]


CHANGES = [
    Change(Place(1, 2, 2), Place(4, 1, 1), "factored", "llama", "after"),
    Change(Place(1, 2, 0), Place(2, 2, 3), "additive", "gpt2", "at"),
]


@pytest.mark.parametrize(
    "change",
    [*CHANGES, *(pytest.param(change, marks=pytest.mark.matrix) for change in _changes(40 - len(CHANGES)))],
    ids=str,
)
def test_the_curve_goes_on_on_another_layout(corpus: Path, tmp_path: Path, change: Change) -> None:
    """A run that is continued on the other layout has the same losses and takes the next samples, as if it had gone on
    where it was. If both have ZeRO 3, the reader keeps small parameters whole and the writer does not."""
    folder = tmp_path / "run"
    groups = 2 if change.family == "llama" else 0
    model = {"family": change.family, "parametrization": change.parametrization, "query_groups": groups}
    sections = _sections(model, STEPS, GROWTH[change.growth])
    config = str(write_config(tmp_path / "run.yaml", corpus, folder, **sections))

    def train(place: Place, settings: list[str]) -> list[tuple[int, list[int]]]:
        overrides = [*settings, f"checkpoint.every={CHANGED_AT}"]
        return run(train_and_note_samples, place.processes, config, overrides, timeout_seconds=SECONDS)

    train(change.writer, _releasing(change.writer, folder))
    expected = curve(folder)
    shutil.rmtree(folder / "checkpoints" / f"step_{STEPS:09d}")
    taken = train(change.reader, change.reader.settings)

    found = curve(folder)
    assert [line["step"] for line in found] == list(range(1, STEPS + 1))
    assert found[:CHANGED_AT] == expected[:CHANGED_AT]
    for mine, other in zip(found, expected, strict=True):
        assert mine["mean_rank"] == other["mean_rank"]
        assert mine["consumed_samples"] == other["consumed_samples"]
        assert mine["lm_loss"] == pytest.approx(other["lm_loss"], rel=1e-5)
    if change.growth in ("at", "after"):
        assert found[-1]["mean_rank"] > found[CHANGED_AT - 1]["mean_rank"]
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "resume"] == [CHANGED_AT]
    assert _by_step(taken, change.reader) == [
        list(range(first, first + GLOBAL_BATCH))
        for first in range(CHANGED_AT * GLOBAL_BATCH, STEPS * GLOBAL_BATCH, GLOBAL_BATCH)
    ]


def _by_step(taken: list[tuple[int, list[int]]], place: Place) -> list[list[int]]:
    """The samples of each step, sorted; processes that share a copy of the model must have taken the same ones."""
    by_copy: dict[int, list[int]] = {}
    for copy, samples in taken:
        assert by_copy.setdefault(copy, samples) == samples
    assert sorted(by_copy) == list(range(place.data))
    share = GLOBAL_BATCH // place.data
    steps = range(0, len(by_copy[0]), share)
    return [sorted(s for samples in by_copy.values() for s in samples[first : first + share]) for first in steps]
