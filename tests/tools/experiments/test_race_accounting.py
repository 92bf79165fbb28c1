"""What a run of a race costs: FLOPs, seconds, and its place between others."""

from pathlib import Path
from typing import Any

import pytest

from pretrain.config.run import parse_config
from tests.support.race_cases import write_race
from tools.experiments.race_plan import (
    load_race,
)
from tools.experiments.race_report import Curve, Entry, on_frontier
from tools.experiments.race_results import flops_until, join_parts, rank_stretches
from tools.experiments.race_speed import StepSeconds, kind_of, seconds_until, timings

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
