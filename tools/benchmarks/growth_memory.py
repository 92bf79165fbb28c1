"""Bytes of a growing run in every phase, against what its ranks predict, and the peak of its events."""

import argparse
import gc
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from model.process_groups import data_size
from pretrain.agreement import NO_FLAGS, Flags
from pretrain.engine.build import tear_down
from pretrain.engine.zero3 import shape_of
from pretrain.trainer import Trainer
from tools.benchmarks.growing_run import PHASES, PhaseClock, growing_trainer, run_event
from tools.benchmarks.resident_bytes import PeakBytes, engine_bytes, predicted_bytes, process_bytes, tensor_bytes

EVENTS = 3
TARGET = 0.05

Row = dict[str, Any]


def memory(arguments: argparse.Namespace) -> tuple[list[Row], Iterator[str]]:
    """Rows of every process and stage: one a phase, and one for the peak of each event."""
    rows: list[Row] = []
    for stage in range(4):
        here = growing_memory(growing_trainer(arguments, stage, [2] * (EVENTS + 1)))
        everyone: list[list[Row] | None] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, here)
        for process, found in enumerate(everyone):
            rows += [{"stage": stage, "process": process, **row} for row in found or ()]
    return rows, _memory_table(rows)


def growing_memory(trainer: Trainer) -> list[Row]:
    """Bytes of this process in a run to its end, after which the engine is gone."""
    rows: list[Row] = []
    train = trainer.config.train

    def observe(phase: str) -> None:
        row: Row = {"step": trainer.state.step, "phase": phase}
        if phase in ("backward", "optimizer"):
            found = engine_bytes(trainer.engine)
            expected = predicted_bytes(
                trainer.config.model,
                trainer.model.ranks(),
                stage=trainer.config.deepspeed.stage,
                precision=train.precision,
                tensor=trainer.layout.tensor,
                data=data_size(),
            )
            with_gradients = phase == "backward" or trainer.config.deepspeed.stage == 3
            kinds = ("weights", "state") + (("gradients",) if with_gradients else ())
            row |= {f"{kind}_bytes": getattr(found, kind) for kind in ("weights", "gradients", "state")}
            row |= {"predicted_bytes": sum(getattr(expected, kind) for kind in kinds), "found_bytes": found.total}
        rows.append(row | {"all_tensors_bytes": tensor_bytes(), "process_bytes": process_bytes()})

    def before_the_optimizer() -> Flags:
        observe("backward")
        return NO_FLAGS

    clock = PhaseClock(observe)
    while trainer.state.step < train.steps:
        if trainer.rank_control.due(trainer.state.step):
            rows.append(_peak_of_event(trainer, clock))
        trainer.train_step(before_the_optimizer)
        observe("optimizer")
    tear_down(trainer.engine)
    return rows


def _peak_of_event(trainer: Trainer, clock: PhaseClock) -> Row:
    gc.collect()
    steady, before = engine_bytes(trainer.engine).total, process_bytes()
    largest = max(shape_of(parameter).numel() for parameter in trainer.model.trained_parameters().values())
    with PeakBytes() as peak:
        run_event(trainer, clock)
    return {
        "step": trainer.state.step,
        "phase": "peak",
        "steady_bytes": steady,
        "largest_state_bytes": 12 * largest,
        "peak_bytes": peak.bytes - before,
        "left_bytes": process_bytes() - before,
        "growth_bytes": engine_bytes(trainer.engine).total - steady,
    }


def _memory_table(rows: Sequence[Row]) -> Iterator[str]:
    yield (
        "| ZeRO | points | weights, gradients, state at the end, MB | largest deviation from the ranks "
        "| peak of an event above steady, MB | in states of the largest layer | of steady | most tensors in an event |"
    )
    yield "|" + "---|" * 8
    for stage in dict.fromkeys(row["stage"] for row in rows):
        group = [row for row in rows if row["stage"] == stage]
        points = [row for row in group if "predicted_bytes" in row]
        worst = max(deviation(row) for row in points)
        peak = max((row for row in group if row["phase"] == "peak"), key=lambda row: row["peak_bytes"])
        ends = next(row for row in reversed(group) if row["phase"] == "backward")
        held = ", ".join(f"{ends[f'{kind}_bytes'] / 1e6:.1f}" for kind in ("weights", "gradients", "state"))
        inside = [row for row in group if row["phase"] in PHASES]
        crowded = max(inside, key=lambda row: row["all_tensors_bytes"])
        largest, steady = (peak["peak_bytes"] / peak[f"{unit}_bytes"] for unit in ("largest_state", "steady"))
        yield (
            f"| {stage} | {len(points)} | {held} | {100 * worst:.2f} % | {peak['peak_bytes'] / 1e6:.1f} "
            f"| {largest:.2f} | {steady:.2f} "
            f"| {crowded['all_tensors_bytes'] / 1e6:.1f} MB, end of {crowded['phase']} |"
        )
    yield ""
    yield (
        f"Target: {100 * TARGET:.0f} % of what the ranks predict. Largest of all processes; peaks are of "
        + ("device memory." if torch.cuda.is_available() else "the process's resident memory, sampled, stash included.")
    )


def deviation(row: Mapping[str, Any]) -> float:
    """How far the bytes of a phase are from what the ranks predict, as a share of it."""
    return abs(row["found_bytes"] - row["predicted_bytes"]) / row["predicted_bytes"]
