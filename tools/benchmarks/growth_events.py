"""Seconds of the events of a run of the real trainer, by phase, and their share of the run."""

import argparse
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from pretrain.engine.build import tear_down
from pretrain.trainer import Trainer
from tools.benchmarks.growing_run import PHASES, PhaseClock, growing_trainer, run_event

RUN_STEPS = 2000
TARGET = 0.01

Row = dict[str, Any]


def events(arguments: argparse.Namespace) -> tuple[list[Row], Iterator[str]]:
    """A row for each event, and one for the run."""
    count = arguments.events
    lengths = [RUN_STEPS * (k + 1) // (count + 1) - RUN_STEPS * k // (count + 1) for k in range(count + 1)]
    taken = [length if arguments.full else min(length, arguments.steps) for length in lengths]
    trainer = growing_trainer(arguments, arguments.stage, taken)
    clock = PhaseClock()
    rows: list[Row] = []
    medians: list[float] = []
    for number, steps in enumerate(taken):
        if number:
            rows.append(_timed_event(trainer, clock))
        seconds = [trainer.train_step().step_seconds for _ in range(steps)]
        medians.append(statistics.median(seconds[1:] if number == 0 else seconds))
        if number:
            rows[-1] |= {"first_step_excess_seconds": max(0.0, seconds[0] - medians[-1]), "step_seconds": medians[-1]}
    between = sum(length * median for length, median in zip(lengths, medians, strict=True))
    spent = sum(row["seconds"] + row["first_step_excess_seconds"] for row in rows)
    rows.append(
        {
            "event": "run",
            "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
            "steps": RUN_STEPS,
            "steps_taken": sum(taken),
            "steps_seconds": between,
            "events_seconds": spent,
            "share_of_run": spent / (spent + between),
        }
    )
    tear_down(trainer.engine)
    return rows, _events_table(rows)


def _timed_event(trainer: Trainer, clock: PhaseClock) -> Row:
    before = trainer.model.ranks()
    run_event(trainer, clock)
    phases = clock.taken()
    return {
        "event": trainer.state.step,
        "rank_before": max(before.values()),
        "rank_after": max(trainer.model.ranks().values()),
        "seconds": sum(phases.values()),
        "phases_seconds": phases,
    }


def _events_table(rows: Sequence[Row]) -> Iterator[str]:
    *found, run = rows
    yield (
        "| after step | rank | event, seconds | first step after it, extra | step, median | "
        + " | ".join(PHASES)
        + " |"
    )
    yield "|" + "---|" * (5 + len(PHASES))
    for row in found:
        cells = [
            f"{row['event']}",
            f"{row['rank_before']} → {row['rank_after']}",
            *(f"{row[key]:.3f}" for key in ("seconds", "first_step_excess_seconds", "step_seconds")),
            *(f"{row['phases_seconds'].get(phase, 0.0):.3f}" for phase in PHASES),
        ]
        yield f"| {' | '.join(cells)} |"
    seconds = [row["seconds"] for row in found]
    yield ""
    yield (
        f"{len(found)} events, median {statistics.median(seconds):.3f} s ({min(seconds):.3f} to {max(seconds):.3f}); "
        f"{run['parameters'] / 1e6:.1f} M parameters a process at the end. {run['steps']} steps take "
        f"{run['steps_seconds']:.0f} s (medians of the {run['steps_taken']} that were taken), all events "
        f"{run['events_seconds']:.1f} s: {100 * run['share_of_run']:.2f} % of the run (target: under "
        f"{100 * TARGET:.0f} %)."
    )
