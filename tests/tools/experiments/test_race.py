"""A race: which runs are due, what they cost, and a small one through the real training command."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from model.config import ModelConfig
from pretrain.config.run import parse_config
from pretrain.errors import ConfigError, DataError, EspalierError
from tools.experiments import race_results
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
from tools.experiments.race_report import MARKER, Curve, Entry, on_frontier, write_report
from tools.experiments.race_results import Results, flops_until, join_parts, locked, rank_stretches
from tools.experiments.race_runs import ROOT, Busy, Runner
from tools.experiments.race_speed import StepSeconds, kind_of, seconds_until, timings
from tools.experiments.race_text import Text, split_text

GRID = (1e-3, 2e-3, 4e-3)
RACE: dict[str, Any] = {
    "text": {"held_out": ["out/"], "vocabulary": 400},
    "steps": 8,
    "tuning_steps": 4,
    "baseline": "dense",
    "settings": {
        "model": {"layers": 1, "hidden": 16, "heads": 2, "sequence_length": 16},
        "train": {
            "micro_batch": 2,
            "global_batch": 2,
            "validate_every": "50%",
            "validation_sequences": 2,
            "log_every": 1,
        },
        "schedule": {"warmup_steps": "25%"},
        "rank": {"quantum": 2},
        "checkpoint": {"every": "25%", "keep": 2},
        "deepspeed": {"stage": 0},
    },
    "speed_steps": 4,
    "speed_repeats": 1,
    "speed_ranks": [2, 4],
    "methods": {
        "dense": {
            "title": "dense",
            "settings": {"model": {"parametrization": "dense"}},
            "learning_rates": list(GRID),
            "seeds": [1, 2],
        },
        "growing": {
            "title": "growing",
            "order": 2,
            "group": "small",
            "settings": {"rank": {"policy": "schedule", "initial": 2, "schedule": [{"step": "50%", "rank": 4}]}},
            "learning_rates": list(GRID),
        },
    },
}


def write_race(path: Path, **changes: Any) -> Path:
    path.write_text(json.dumps({**RACE, **changes}))  # which is YAML, too
    return path


def record(run: Run, loss: float, **facts: Any) -> dict[str, Any]:
    diverged = math.isinf(loss)
    identity = {"method": run.method, "learning_rate": run.learning_rate, "seed": run.seed, "steps": run.steps}
    return {
        **identity,
        "diverged": diverged,
        "validation_loss": None if diverged else loss,
        "step_seconds": 0.5,
        **facts,
    }


# Learning rates -------------------------------------------------------------------------------------------------------


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


# Plan -----------------------------------------------------------------------------------------------------------------


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


# Accounting -----------------------------------------------------------------------------------------------------------

RUN_CONFIG = parse_config(
    {
        "model": {"layers": 1, "hidden": 16, "heads": 2, "ffn": 16, "sequence_length": 16, "vocabulary": 128},
        "train": {"steps": 10, "micro_batch": 2, "global_batch": 2},
        "rank": {"initial": 2},
        "data": {"prefix": "corpus", "tokenizer": "tokenizer"},
    }
)
# in + out of qkv, proj, fc1 (gate and up) and fc2.
WIDTHS = (16 + 48) + (16 + 16) + (16 + 32) + (16 + 16)
STEP_TOKENS = 2 * 16


def growth(step: int, rank: int) -> dict[str, Any]:
    return {
        "step": step,
        "event": "growth",
        "after": dict.fromkeys(RUN_CONFIG.initial_ranks(), rank),
        "seconds": 0.5,
    }


def test_flops_follow_the_ranks_of_every_step() -> None:
    stretches = rank_stretches(RUN_CONFIG, [growth(4, 6)], 10)
    assert [(s.first_step, s.steps, s.mean_rank, s.linear_parameters) for s in stretches] == [
        (0, 4, 2.0, 2 * WIDTHS),
        (4, 6, 6.0, 6 * WIDTHS),
    ]
    linear, total = flops_until(7, stretches, [])
    assert linear == 6 * STEP_TOKENS * WIDTHS * (4 * 2 + 3 * 6)
    attention, output = 12 * 16 * 16, 6 * 128 * 16
    assert total == linear + 7 * STEP_TOKENS * (attention + output)
    probes = [{"step": 3, "event": "probe", "flops": 1e6}, {"step": 7, "event": "probe", "flops": 1e6}]
    assert flops_until(7, stretches, probes) == (linear + 1e6, total + 1e6)


def test_seconds_are_those_of_the_ranks_and_the_events() -> None:
    settings = [{"model": RUN_CONFIG.model.model_dump()}]
    kind = kind_of(RUN_CONFIG.model)
    speed = {
        f"{size} #{repeat}": {"kind": kind, "linear_parameters": size * WIDTHS, "step_seconds": seconds}
        for size, seconds in ((2, 1.0), (4, 2.0), (8, 3.0))
        for repeat in (1, 2)
    }
    stretches = [vars(s) for s in rank_stretches(RUN_CONFIG, [growth(4, 6), growth(8, 10)], 10)]
    run = {"settings": settings, "ranks": stretches, "events": [growth(4, 6), growth(8, 10)]}
    table = StepSeconds(speed)
    assert seconds_until(4, run, table) == pytest.approx(4 * 1.0)
    assert seconds_until(8, run, table) == pytest.approx(4 * 1.0 + 0.5 + 4 * 2.5)
    assert seconds_until(10, run, table) == pytest.approx(4 * 1.0 + 0.5 + 4 * 2.5 + 0.5 + 2 * 3.5)
    assert seconds_until(10, run, StepSeconds({})) is None


def test_other_methods_are_placed_between_fixed_ranks_of_their_flops(tmp_path: Path) -> None:
    race = load_race(write_race(tmp_path / "race.yaml", frontier=["dense", "growing"]))
    entries = {
        name: Entry(name, race.methods[name], 1e-3, {1: Curve({}, [5.0, loss], [1.0, flops], None)})
        for name, loss, flops in (("growing", 4.0, 2.0), ("dense", 3.0, 8.0))
    }
    assert [on_frontier(race, entries, spent) for spent in (2.0, 4.0, 8.0, 1.9, 8.1)] == [
        "4.000",
        "3.500",
        "3.000",
        "–",
        "–",
    ]
    assert on_frontier(race, {}, 4.0) == "–"


def test_parts_of_a_run_are_joined() -> None:
    def part(steps: int, spent: float) -> dict[str, Any]:
        spending = {"tokens": steps, "linear_flops": spent, "flops": 2 * spent}
        return {
            "steps": steps,
            "validation": [{"step": steps, "loss": 1.0, **spending}],
            "ranks": [{"first_step": 0, "steps": steps}],
            "layer_ranks": [],
            "events": [{"step": 1, "event": "null"}],
            "end": spending,
            "skipped_steps": 1,
        }

    joined = join_parts([part(2, 10.0), part(6, 20.0)])
    assert [(p["step"], p["tokens"], p["flops"]) for p in joined["validation"]] == [(2, 2, 20.0), (8, 8, 60.0)]
    assert [stretch["first_step"] for stretch in joined["ranks"]] == [0, 2]
    assert [event["step"] for event in joined["events"]] == [1, 3]
    assert (joined["steps"], joined["skipped_steps"], joined["end"]["linear_flops"]) == (8, 2, 30.0)


def test_every_kind_of_model_is_timed(tmp_path: Path) -> None:
    race = load_race(write_race(tmp_path / "race.yaml"))
    assert [(timing.kind, timing.rank) for timing in timings(race)] == [
        ("llama 1x16 dense", None),
        ("llama 1x16 factored", 2),
        ("llama 1x16 factored", 4),
    ]


# Files ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["results.json", "results.json.xz"])
def test_results_keep_what_another_race_wrote(tmp_path: Path, name: str) -> None:
    ours, theirs = Results(tmp_path / name), Results(tmp_path / name)
    ours.add("runs", "a", {"loss": 1.0})
    theirs.add("runs", "b", {"loss": math.inf})
    assert ours.read()["runs"] == {"a": {"loss": 1.0}, "b": {"loss": None}}
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format_version": 9, "runs": {}, "speed": {}}'])
def test_other_files_are_no_results(tmp_path: Path, content: str) -> None:
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(DataError, match="--results"):
        Results(tmp_path / "results.json").read()


def test_damaged_and_bottomless_results_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = Results(tmp_path / "results.json.xz")
    results.add("runs", "a", {"loss": 1.0})
    whole = results.path.read_bytes()
    for content in (b"", b"{}", whole[:-20]):
        results.path.write_bytes(content)
        with pytest.raises(DataError, match="--results"):
            results.read()
    results.path.write_bytes(whole)
    monkeypatch.setattr(race_results, "LARGEST_BYTES", 50)
    with pytest.raises(DataError, match="--results"):
        results.read()


def test_only_the_first_race_removes_the_lock_of_a_killed_compilation(tmp_path: Path) -> None:
    lock = tmp_path / "torch_extensions" / "operator" / "lock"
    lock.parent.mkdir(parents=True)
    text = Text(tmp_path / "corpus", tmp_path / "tokenizer.model", "1,1,0")
    lock.touch()
    Runner(tmp_path, text)
    assert not lock.exists()
    lock.touch()
    Runner(tmp_path, text)
    assert lock.exists()


def test_a_run_is_claimed_by_one_race(tmp_path: Path) -> None:
    race = load_race(write_race(tmp_path / "race.yaml"))
    runner = Runner(tmp_path, Text(tmp_path / "corpus", tmp_path / "tokenizer.model", "1,1,0"))
    run = due_runs(race, {})[0]
    runner.folder(run.key).mkdir(parents=True)
    with locked(runner.folder(run.key)), pytest.raises(Busy, match="another race is at work"):
        runner.execute(race, run)


def write_text(path: Path) -> Path:
    """Writes documents of two sources."""
    modules = [Path(__import__(name).__file__ or "").read_text() for name in ("ast", "argparse", "bisect", "inspect")]
    sources = ["in/a", "out/a", "in/b", "in/c"]
    lines = [json.dumps({"text": text, "source": source}) for text, source in zip(modules, sources, strict=True)]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_whole_sources_are_held_out(tmp_path: Path) -> None:
    text = write_text(tmp_path / "all.jsonl")
    training, held_out = tmp_path / "train.jsonl", tmp_path / "held_out.jsonl"
    race = load_race(write_race(tmp_path / "race.yaml"))
    split_text(race.text, [str(text)], training, held_out)
    sources = [[json.loads(line)["source"] for line in path.read_text().splitlines()] for path in (training, held_out)]
    assert sources == [["in/a", "in/b", "in/c"], ["out/a"]]
    missing = race.text.model_copy(update={"held_out": ("nowhere/",)})
    with pytest.raises(DataError, match="no document whose source begins with nowhere/"):
        split_text(missing, [str(text)], training, held_out)


# The real thing -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_small_race_goes_on_after_an_interruption_and_reports(tmp_path: Path) -> None:
    rates = [1e-27, 1e-2, 1e23]  # nothing is learned, something is, and nothing is finite any more
    methods = {name: {**method, "seeds": [1], "learning_rates": rates} for name, method in RACE["methods"].items()}
    methods["growing"]["check_rates"] = [2e-2]
    config = write_race(tmp_path / "race.yaml", methods=methods)
    results = tmp_path / "docs" / "results.json"
    results.parent.mkdir()
    (results.parent / "results.md").write_text(f"# Plan\n{MARKER}\nold\n")
    command = [
        sys.executable,
        str(ROOT / "tools" / "experiments" / "race.py"),
        "--config",
        str(config),
        "--results",
        str(results),
    ]
    text = ["--work", str(tmp_path / "work"), "--text", str(write_text(tmp_path / "all.jsonl"))]

    begun = subprocess.Popen([*command, *text], cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert begun.stdout is not None
    for line in begun.stdout:
        if line.startswith("dense/lr0.01_seed1_steps4: begins"):
            break
    while not (tmp_path / "work/runs/dense/lr0.01_seed1_steps4/training/metrics.jsonl").exists():
        assert begun.poll() is None
        time.sleep(0.02)
    os.kill(begun.pid, signal.SIGTERM)
    rest, _ = begun.communicate(timeout=60)
    assert begun.returncode == 130
    assert "dense/lr0.01_seed1_steps4: interrupted" in rest
    assert list(Results(results).read()["runs"]) == ["dense/lr1e-27_seed1_steps4"]

    subprocess.run([*command, *text, "--jobs", "2"], cwd=ROOT, check=True, timeout=3600)
    content = Results(results).read()
    race = load_race(config)
    assert not due_runs(race, content["runs"])
    diverged = content["runs"]["growing/lr1e+23_seed1_steps4"]
    assert (diverged["diverged"], diverged["validation_loss"]) == (True, None)
    assert tuned_rate(race, "growing", content["runs"]) == 1e-2
    full = content["runs"]["growing/lr0.01_seed1_steps8"]
    assert [(stretch["first_step"], stretch["mean_rank"]) for stretch in full["ranks"]] == [(0, 2.0), (4, 4.0)]
    assert [point["step"] for point in full["validation"]] == [4, 8]
    assert full["validation_loss"] == full["validation"][-1]["loss"]

    subprocess.run([*command, *text[:2], "--speed"], cwd=ROOT, check=True, timeout=3600)
    assert len(Results(results).read()["speed"]) == 3 * race.speed_repeats
    write_report(race, Results(results))
    report = (results.parent / "results.md").read_text()
    assert report.startswith(f"# Plan\n{MARKER}\n")
    assert "old" not in report.splitlines()
    assert "| growing | 0.01 | 1 |" in report
    assert "diverged" in report
    table = report.partition("What other rates come to at full length")[2].splitlines()
    assert table[2] == "| method | 0.01 | 0.02 |"
    assert re.fullmatch(r"\| growing \| \*\*\d\.\d+\*\* \| \d\.\d+ \|", table[4])
    assert sorted(path.name for path in (results.parent / "images").iterdir()) == [
        "race_flops.png",
        "race_ranks.png",
        "race_seconds.png",
    ]
