"""Which runs of a race are due, with which learning rates and settings."""

import math
from pathlib import Path
from typing import Any

import pytest

from model.config import ModelConfig
from pretrain.errors import ConfigError, EspalierError
from tests.support.race_cases import GRID, RACE, record, write_race
from tools.experiments.race import overview, refuse_changed_methods
from tools.experiments.race_plan import (
    Run,
    best_rate,
    due_runs,
    full_losses,
    load_race,
    missing_rates,
    run_settings,
    tuned_rate,
)
from tools.experiments.race_runs import ROOT
from tools.experiments.race_speed import kind_of


@pytest.mark.parametrize(
    ("losses", "missing"),
    [
        ({1e-3: 5.0}, [2e-3, 4e-3]),
        ({1e-3: 5.0, 2e-3: 4.0, 4e-3: 4.5}, []),
        ({1e-3: 4.0, 2e-3: 4.5, 4e-3: 5.0}, [5e-4]),
        ({1e-3: 5.0, 2e-3: 4.5, 4e-3: 4.0}, [8e-3]),
        ({1e-3: 5.0, 2e-3: 4.5, 4e-3: 4.0, 8e-3: 3.9}, [1.6e-2]),
        ({1e-3: 5.0, 2e-3: 4.5, 4e-3: 4.0, 8e-3: math.inf}, []),
        ({1e-3: math.inf, 2e-3: math.inf, 4e-3: math.inf}, [5e-4]),
        ({1e-3: 4.0, 2e-3: 4.0, 4e-3: 5.0}, [5e-4]),
    ],
)
def test_grid_is_extended_until_the_best_rate_lies_inside(losses: dict[float, float], missing: list[float]) -> None:
    assert missing_rates(GRID, losses) == missing


def test_endless_extension_is_an_error() -> None:
    losses = {4e-3 / 2**number: -float(number) for number in range(9)}
    with pytest.raises(EspalierError, match=r"still at the edge of 1\.5625e-05 to 0\.004.*another grid"):
        missing_rates(GRID, losses)


def test_best_rate_is_the_lower_of_two() -> None:
    assert best_rate({4e-3: 3.0, 2e-3: 3.0, 1e-3: 3.5}) == 2e-3


def test_runs_become_due_in_order(tmp_path: Path) -> None:
    race = load_race(write_race(tmp_path / "race.yaml"))
    records: dict[str, dict[str, Any]] = {}
    order = []
    while due := due_runs(race, records):
        run = due[0]
        order.append((run.method, run.learning_rate, run.seed, run.steps))
        best = 2e-3 if run.method == "dense" else 4e-3
        records[run.key] = record(run, 4.0 + abs(math.log(run.learning_rate / best)))
    assert order == [
        *(("dense", rate, 1, 4) for rate in GRID),
        ("dense", 2e-3, 1, 8),
        *(("growing", rate, 1, 4) for rate in (*GRID, 8e-3)),
        ("growing", 4e-3, 1, 8),
        ("dense", 2e-3, 2, 8),
    ]


def test_other_rates_are_checked_at_full_length_and_not_compared(tmp_path: Path) -> None:
    methods = {**RACE["methods"], "dense": {**RACE["methods"]["dense"], "check_rates": [1e-3]}}
    race = load_race(write_race(tmp_path / "race.yaml", methods=methods))
    runs = [Run("dense", rate, 1, 4) for rate in GRID]
    records = {run.key: record(run, 4.0 + abs(math.log(run.learning_rate / 2e-3))) for run in runs}
    checked = [run for run in due_runs(race, records) if (run.method, run.steps, run.seed) == ("dense", 8, 1)]
    assert [run.learning_rate for run in checked] == [2e-3, 1e-3]
    records |= {run.key: record(run, 3.5 - number) for number, run in enumerate(checked)}
    assert full_losses(race, "dense", records) == {2e-3: 3.5, 1e-3: 2.5}
    assert tuned_rate(race, "dense", records) == 2e-3


def test_shares_become_steps_and_rates_are_set(tmp_path: Path) -> None:
    race = load_race(write_race(tmp_path / "race.yaml", tuning_settings={"train": {"validate_every": "100%"}}))
    (full,) = run_settings(race, Run("growing", 2e-3, 3, 8))
    assert full["rank"]["schedule"] == [{"step": 4, "rank": 4}]
    assert (full["schedule"]["warmup_steps"], full["train"]["validate_every"], full["train"]["steps"]) == (2, 4, 8)
    assert full["optimizer"] == {"learning_rate": 2e-3, "minimum_learning_rate": 2e-4}
    assert full["run"] == {"seed": 3}
    (short,) = run_settings(race, Run("growing", 2e-3, 1, 4))
    assert (short["rank"]["schedule"][0]["step"], short["train"]["validate_every"]) == (2, 4)


def test_a_dense_beginning_is_a_part_of_its_own(tmp_path: Path) -> None:
    beginning: dict[str, Any] = {
        "model": {"parametrization": "dense"},
        "schedule": {"shape": "constant", "warmup_steps": 0},
        "optimizer": {"learning_rate": 3e-4, "minimum_learning_rate": 0.0},
    }
    method = {
        "title": "switch",
        "learning_rates": list(GRID),
        "settings": {"rank": {"initial": 4}},
        "switch": {"share": 0.25, "settings": beginning},
    }
    race = load_race(write_race(tmp_path / "race.yaml", methods={**RACE["methods"], "switch": method}))
    dense, factored = run_settings(race, Run("switch", 2e-3, 1, 8))
    assert (dense["train"]["steps"], factored["train"]["steps"]) == (2, 6)
    assert (dense["optimizer"]["learning_rate"], factored["optimizer"]["learning_rate"]) == (3e-4, 2e-3)
    assert kind_of(ModelConfig(**dense["model"])) == "llama 1x16 dense"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"baseline": "none"}, "baseline none is no method: set it to one of dense, growing"),
        ({"frontier": ["dense", "none"]}, "frontier none is no method: set it to some of dense, growing"),
        ({"tuning_steps": 8}, "tuning_steps 8 is not below steps 8"),
        ({"stepps": 8}, "there is no setting stepps: did you mean steps"),
        (
            {"methods": {"dense": {"title": "dense", "learning_rates": [1e-3, 2e-3, 3e-3]}}},
            "0.001, 0.002, 0.003 do not ascend",
        ),
        ({"methods": {"dense": {"title": "dense", "learning_rates": [0.0, 1e-3]}}}, "do not ascend by one factor"),
        ({"methods": {"Dense!": {"title": "x", "learning_rates": list(GRID)}}, "baseline": "Dense!"}, "no plain name"),
        (
            {"methods": {"dense": {"title": "x", "learning_rates": list(GRID), "settings": {"model": {"hiden": 3}}}}},
            "method dense: there is no setting model.hiden: did you mean model.hidden",
        ),
        (
            {"methods": {"dense": {"title": "x", "learning_rates": list(GRID), "control": "fixed"}}},
            "methods.dense.control fixed is no method",
        ),
    ],
)
def test_mistakes_are_one_sentence(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence) as raised:
        load_race(write_race(tmp_path / "race.yaml", **changes))
    assert "\n" not in str(raised.value)


def test_shipped_races_are_valid() -> None:
    paths = sorted((ROOT / "configs" / "race").glob("*.yaml"))
    assert paths
    for path in paths:
        assert due_runs(load_race(path), {})


def test_a_changed_method_is_refused(tmp_path: Path) -> None:
    race = load_race(write_race(tmp_path / "race.yaml"))
    run = Run("dense", 1e-3, 1, 4)
    records = {run.key: record(run, 4.0, settings=run_settings(race, run))}
    refuse_changed_methods(race, records)
    rarely = load_race(write_race(tmp_path / "rarely.yaml", settings={**RACE["settings"], "checkpoint": {"every": 3}}))
    refuse_changed_methods(rarely, records)
    other = load_race(write_race(tmp_path / "other.yaml", settings={**RACE["settings"], "rank": {"quantum": 1}}))
    with pytest.raises(ConfigError, match=r"dense/lr0\.001_seed1_steps4 was run with other settings"):
        refuse_changed_methods(other, records)


def test_overview_counts_what_comes_later(tmp_path: Path) -> None:
    race = load_race(write_race(tmp_path / "race.yaml"))
    run = Run("dense", 1e-3, 1, 4)
    lines = overview(race, {run.key: record(run, 4.0)}).splitlines()
    assert lines[0] == "done   dense/lr0.001_seed1_steps4: validation loss 4.0000, 0.500 s a step"
    assert "later  dense, 2 of 8 steps: about 0 min" in lines
    assert sum(line.startswith("due") for line in lines) == 5
    steps = 5 * 4 + 2 * 8 + 8
    assert lines[-1] == f"still about {steps * 0.5 / 3600:.1f} h with one run at a time"
