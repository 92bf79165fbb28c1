"""The growth benchmark at a tiny size through the real trainer, and what a growing run holds in every phase."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from megatron.core import parallel_state

from model.process_groups import initialize_process_groups
from pretrain.distributed import imports_out_of_collection
from tests.support.distributed import run
from tools.benchmarks import growth
from tools.benchmarks.growing_run import PHASES, growing_trainer
from tools.benchmarks.growth_memory import deviation, growing_memory
from tools.benchmarks.resident_bytes import freed_memory_returned

TINY = ["--hidden", "64", "--layers", "1", "--width", "128", "--vocabulary", "500", "--sequence", "16", "--batch", "1"]


def _rows(flags: list[str], file: str) -> None:
    """One process of the benchmark, within the process groups of the test."""
    sys.argv = ["growth.py", *TINY, *flags, "--json", file]
    with imports_out_of_collection():
        growth.measure(growth.parse_arguments())


@pytest.mark.slow
def test_benchmark_writes_rows_of_a_real_run(tmp_path: Path) -> None:
    run(_rows, 1, ["--events", "2", "--steps", "2", "--repeats", "1"], str(tmp_path / "rows.json"))
    facts = json.loads((tmp_path / "rows.json").read_text())
    assert [row["layer"] for row in facts["spectra"]] == ["qkv", "proj", "fc1", "fc2", "all of 24 layers"]
    first, second, whole = facts["events"]
    assert (first["rank_before"], first["rank_after"], second["rank_after"]) == (16, 24, 32)
    assert set(first["phases_seconds"]) == set(PHASES)
    assert (whole["steps"], whole["steps_taken"]) == (2000, 6)
    for stage in range(4):
        _check_memory([row for row in facts["memory"] if row["stage"] == stage], stage)


def _check_memory(rows: list[dict[str, Any]], stage: int) -> None:
    points = [row for row in rows if "predicted_bytes" in row]
    assert {row["phase"] for row in points} == {"backward", "optimizer"}
    for row in points:
        assert deviation(row) < 0.05, row
        assert (row["gradients_bytes"] > 0) == (row["phase"] == "backward" or stage == 3)
    peaks = [row for row in rows if row["phase"] == "peak"]
    assert all(row["growth_bytes"] > 0 for row in peaks)
    assert {row["phase"] for row in rows} >= set(PHASES)


def _held(tensor: int, stage: int, precision: str, **other_sizes: int) -> list[dict[str, Any]]:
    if not parallel_state.model_parallel_is_initialized():
        initialize_process_groups(tensor)
    sizes = {"layers": 2, "width": 128, "vocabulary": 500, "sequence": 16, "batch": 1, "first_rank": 16, **other_sizes}
    arguments = argparse.Namespace(**sizes, precision=precision, tensor=tensor)
    with imports_out_of_collection(), freed_memory_returned():
        return growing_memory(growing_trainer(arguments, stage, [2, 2, 2]))


@pytest.mark.parametrize(
    ("processes", "tensor", "stage", "precision"),
    [
        pytest.param(2, 1, 1, "bf16", marks=pytest.mark.slow),
        (2, 1, 3, "bf16"),
        *(pytest.param(2, 2, stage, "fp32", marks=pytest.mark.matrix) for stage in range(4)),
        *(pytest.param(4, 2, stage, "bf16" if stage else "fp32", marks=pytest.mark.matrix) for stage in range(4)),
    ],
)
def test_a_growing_run_holds_what_its_ranks_predict(processes: int, tensor: int, stage: int, precision: str) -> None:
    for rows in run(_held, processes, tensor, stage, precision):
        _check_memory(rows, stage)
        before, *_, after = (row["found_bytes"] for row in rows if row["phase"] == "optimizer")
        assert after > before


def _peaks(stage: int, precision: str) -> list[dict[str, Any]]:
    rows = _held(1, stage, precision, vocabulary=32_000)
    return [row for row in rows if row["phase"] == "peak"]


@pytest.mark.parametrize(
    ("stage", "precision"),
    [(1, "fp32"), (3, "fp32"), *(pytest.param(stage, "fp32", marks=pytest.mark.matrix) for stage in (0, 2))],
)
def test_an_event_holds_one_layer_above_the_steady_state(stage: int, precision: str) -> None:
    """The largest layer, an embedding, has masters and moments of 49 MB; an old engine that lived on would add 100 MB
    and more. ZeRO 3 gathers whole parameters for the check of the logits."""
    layers = 1.5 if stage == 3 else 1.0
    for peaks in run(_peaks, 2, stage, precision):
        for row in peaks:
            assert row["peak_bytes"] <= layers * row["largest_state_bytes"] + row["growth_bytes"] + 8e6, row
