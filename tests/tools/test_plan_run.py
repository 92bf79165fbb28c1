"""The planner's command: what it prints and writes, what it refuses, with numbers, and the nearest parallel layout
that fits."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from model.config import ModelConfig
from model.costs.arithmetic import total_parameters
from pretrain.errors import ConfigError
from tools.plan_run import main

MEDIUM = """
model: {family: gpt2, layers: 24, hidden: 1024, heads: 16, sequence_length: 1024, vocabulary: 50257}
rank: {policy: schedule, initial: 64, quantum: 64, schedule: [{step: 20, rank: 128}, {step: 50, rank: 256}]}
train: {micro_batch: 8, global_batch: 512, steps: 200, precision: bf16}
data: {prefix: none, tokenizer: none.model}
"""
SEVEN = [
    "model.family=llama", "model.layers=32", "model.hidden=4096", "model.heads=32", "model.sequence_length=4096",
    "model.parametrization=dense", "rank.policy=fixed", "rank.schedule=[]", "train.micro_batch=1",
]  # fmt: skip


class Planner:
    """Runs the command on a config file of its own."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.config, self.json, self.monkeypatch = folder / "medium.yaml", folder / "plan.json", monkeypatch
        self.config.write_text(MEDIUM)

    def __call__(self, *arguments: str, nodes: int = 1) -> dict[str, Any]:
        command = ["plan_run", "--config", str(self.config), "--nodes", str(nodes), "--gpus-per-node", "8"]
        self.monkeypatch.setattr(sys, "argv", [*command, "--json", str(self.json), *arguments])
        main()
        return json.loads(self.json.read_text())

    def refusal(self, *arguments: str, nodes: int = 1) -> str:
        with pytest.raises(ConfigError) as refused:
            self(*arguments, nodes=nodes)
        return str(refused.value)


@pytest.fixture
def planner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Planner:
    return Planner(tmp_path, monkeypatch)


def test_a_row_for_each_event_and_the_dense_model(planner: Planner, capsys: pytest.CaptureFixture[str]) -> None:
    plan = planner()
    assert [row["outlook"] for row in plan["outlooks"]] == ["start", "step 20", "step 50", "dense"]
    assert [row["mean_rank"] for row in plan["outlooks"]] == [64, 128, 256, None]
    config = ModelConfig(
        family="gpt2", layers=24, hidden=1024, heads=16, sequence_length=1024, vocabulary=50257, parametrization="dense"
    )
    assert plan["outlooks"][-1]["parameters"] == total_parameters(config, {})
    shown = capsys.readouterr().out
    for row in plan["outlooks"]:
        assert f"{row['parameters']:,}" in shown
        assert f"{row['memory_bytes']['total'] / 1e9:,.2f}" in shown
    assert "9.89e+14 FLOP/s at 40%" in shown


def test_the_table_ends_where_the_batch_no_longer_divides(planner: Planner, capsys: pytest.CaptureFixture[str]) -> None:
    rows = planner()["scaling"]
    assert [row["processes"] for row in rows] == [1, 2, 4, 8, 16, 32, 64]
    assert rows[-1]["accumulation"] == 1
    assert [row["efficiency"] for row in rows] == sorted((row["efficiency"] for row in rows), reverse=True)
    assert "train.global_batch 512 / train.micro_batch 8 divides up to 64 processes" in capsys.readouterr().out


def test_it_says_where_communication_takes_over(planner: Planner, capsys: pytest.CaptureFixture[str]) -> None:
    rows = planner("--network-bandwidth", "1e8")["scaling"]
    first = next(row["processes"] for row in rows if row["communication_share"] > 0.5)
    assert f"communication takes longer than computation from {first} processes on" in capsys.readouterr().out


def test_assumptions_change_the_seconds(planner: Planner) -> None:
    usual, faster = planner(), planner("--efficiency", "0.8")
    seconds = [plan["outlooks"][0]["compute_seconds"] for plan in (usual, faster)]
    assert seconds[0] == pytest.approx(2 * seconds[1])


def test_a_budget_bounds_the_largest_ranks(planner: Planner) -> None:
    growth = ["rank.policy=gradient", "rank.schedule=[]", "rank.budget=0.4", "rank.probe=64", "train.steps=4000"]
    start, most, dense = planner(*growth)["outlooks"]
    assert most["outlook"] == "budget"
    weights = 24 * 12 * 1024**2
    factors = most["parameters"] - (dense["parameters"] - weights)
    assert 0.38 * weights < factors <= 0.4 * weights
    assert most["mean_rank"] > start["mean_rank"]


def test_tensor_parallelism_beyond_a_node_is_warned_of(planner: Planner, capsys: pytest.CaptureFixture[str]) -> None:
    planner("parallel.tensor=16", nodes=2)
    assert "warning: parallel.tensor 16 reaches over nodes of 8 devices" in capsys.readouterr().out


def test_heads_that_do_not_divide_are_refused_with_what_does(planner: Planner) -> None:
    refusal = planner.refusal("parallel.tensor=3", nodes=3)
    assert "parallel.tensor 3 does not divide model.heads, 16" in refusal
    assert "the nearest that fits: parallel.tensor=" in refusal


def test_a_batch_that_does_not_divide_is_refused_with_what_does(planner: Planner) -> None:
    refusal = planner.refusal("train.global_batch=32")
    assert "train.global_batch 32 is not a whole number of micro-steps: micro_batch 8 x 8" in refusal
    assert "the nearest that fits: train.micro_batch=4" in refusal or "parallel.tensor=2" in refusal
    assert " GB a process)" in refusal


def test_memory_that_does_not_suffice_is_refused_with_what_does(planner: Planner) -> None:
    refusal = planner.refusal(*SEVEN, "--memory", "40GiB")
    assert "a process needs " in refusal
    assert "GB (weights 13." in refusal
    assert "GB of the device's 42.9 GB are usable, at dense; the nearest that fits: " in refusal
    settings = refusal.split("fits: ")[1].split(" (")[0].split()
    assert planner(*SEVEN, "--memory", "40GiB", *settings)["scaling"]


def test_recomputation_from_factors_is_planned_beside_a_dense_model_that_has_none(planner: Planner) -> None:
    """Fewer bytes and more arithmetic for the factored model; the dense one as without it."""
    kept, again = planner(), planner("train.recompute=factors")
    assert again["outlooks"][0]["memory_bytes"]["activations"] < kept["outlooks"][0]["memory_bytes"]["activations"]
    assert again["outlooks"][0]["compute_seconds"] > kept["outlooks"][0]["compute_seconds"]
    assert again["outlooks"][-1] == kept["outlooks"][-1]


def test_more_tensor_parallel_processes_than_there_are_devices_are_refused(planner: Planner) -> None:
    refusal = planner.refusal("parallel.tensor=16")
    assert "; the nearest that fits: parallel.tensor=8" in refusal


def test_a_proposal_leaves_alone_what_the_deepspeed_file_says(planner: Planner) -> None:
    refusal = planner.refusal(*SEVEN, "--memory", "40GiB", "deepspeed.config=zero2", "deepspeed.stage=2")
    assert "the nearest that fits: " in refusal or "no parallel layout on 8 devices fits" in refusal
    assert "deepspeed." not in refusal.split("GB are usable")[1]


def test_host_memory_must_hold_the_model_while_it_is_built(planner: Planner) -> None:
    refusal = planner.refusal("--host-memory", "4GB")
    assert refusal.startswith("models being built and grown need ")
    assert "GB of a node's memory, 4.0 GB, at step 50" in refusal


def test_an_optimizer_on_the_host_takes_time_there(planner: Planner) -> None:
    there = planner("deepspeed.offload_optimizer=true")["outlooks"][0]
    slower = planner("deepspeed.offload_optimizer=true", "--host-memory-bandwidth", "1e11")["outlooks"][0]
    assert planner()["outlooks"][0]["host_seconds"] == 0.0
    assert there["host_seconds"] < slower["host_seconds"] < 2 * there["host_seconds"]


def test_layouts_that_do_not_fit_are_marked(planner: Planner, capsys: pytest.CaptureFixture[str]) -> None:
    rows = planner("deepspeed.stage=3", "--memory", "10GB")["scaling"]
    assert [row["fits"] for row in rows] == sorted(row["fits"] for row in rows)
    assert {row["fits"] for row in rows} == {False, True}


@pytest.mark.parametrize(("flag", "value"), [("--peak-flops", "0"), ("--node-bandwidth", "-1")])
def test_speeds_are_above_zero(planner: Planner, flag: str, value: str) -> None:
    with pytest.raises(SystemExit):
        planner(flag, value)


@pytest.mark.parametrize("place", ["missing/plan.json", "."])
def test_a_result_that_cannot_be_written_is_refused_beforehand(planner: Planner, tmp_path: Path, place: str) -> None:
    planner.json = tmp_path / place
    with pytest.raises(SystemExit):
        planner()


def test_no_layout_at_all_says_how_much_the_smallest_needs(planner: Planner) -> None:
    refusal = planner.refusal(*SEVEN, "--memory", "1GB")
    assert "no parallel layout on 8 devices fits, the smallest needs " in refusal


def test_a_vocabulary_that_nobody_knows_is_asked_for(planner: Planner) -> None:
    refusal = planner.refusal("model.vocabulary=0")
    assert refusal == (
        "the vocabulary is not known: model.vocabulary is 0, and there is no tokenizer none.model: "
        "give model.vocabulary=SIZE"
    )
