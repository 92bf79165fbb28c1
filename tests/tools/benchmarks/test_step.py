"""The step benchmark: its arithmetic by hand, what it refuses, and one short run of it through the real engine."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from model.config import projections
from model.costs.arithmetic import training_flops_per_token
from model.process_groups import initialize_process_groups, single_process
from pretrain.errors import ConfigError
from tests.support.distributed import run
from tools.benchmarks.step_contestants import NAMES, build_contestant, contestant_config, separate_rank
from tools.benchmarks.step_gemms import rank_rows, time_gemms
from tools.benchmarks.step_largest import largest, largest_models
from tools.benchmarks.step_profile import CATEGORIES, PeakMemory
from tools.benchmarks.step_report import against_dense, spread

ROOT = Path(__file__).resolve().parents[3]
MODEL = {"layers": 2, "hidden": 32, "heads": 4, "sequence_length": 16, "vocabulary": 300}
RANK = 8


def run_tool(*flags: object, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "tools" / "benchmarks" / "step.py"), *map(str, flags)]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=600, check=False)


# Rows -----------------------------------------------------------------------------------------------------------------


def test_quartiles_and_ratios() -> None:
    found = spread([4.0, 1.0, 2.0, 3.0, 5.0])
    assert list(found.values()) == [3.0, 2.0, 4.0]
    assert spread([2.0])["third_quartile_seconds"] == 2.0
    dense, factored = {"flops": 30.0, "median_seconds": 6.0}, {"flops": 10.0, "median_seconds": 2.5}
    assert list(against_dense(factored, dense).values()) == pytest.approx([3.0, 2.4, 0.8])


def test_cost_of_a_direction_is_against_the_cheapest_rank() -> None:
    rows = [{"rank": rank, "flops": rank, **spread([seconds])} for rank, seconds in ((8, 4.0), (16, 4.0))]
    assert [row["cost_of_a_direction"] for row in rank_rows(rows)] == [2.0, 1.0]


@pytest.mark.parametrize(("fitting", "trials"), [(1, [1, 2]), (6, [1, 2, 4, 8, 6, 7])])
def test_largest_doubles_and_halves(fitting: int, trials: list[int]) -> None:
    asked = []

    def fits(number: int) -> str | None:
        asked.append(number)
        return f"{number} fit" if number <= fitting else None

    assert largest(fits) == (fitting, f"{fitting} fit")
    assert asked == trials
    with pytest.raises(ConfigError, match="one layer does not fit"):
        largest(lambda number: None)


def test_peak_memory_is_what_torch_holds_in_the_last_step() -> None:
    if torch.cuda.is_available():
        pytest.skip("the CPU's count is not taken where there is a GPU")
    with PeakMemory() as memory:
        before = torch.empty(1 << 20)
        for sizes in ([1 << 22], [1 << 18, 1 << 19]):
            with torch.profiler.record_function("forward"):
                held = [torch.empty(size) for size in sizes]
            held.clear()
    assert memory.bytes == 4 * ((1 << 20) + (1 << 18) + (1 << 19))
    assert before.numel() == 1 << 20


# Contestants ----------------------------------------------------------------------------------------------------------


def trained_contestants(family: str) -> dict[str, dict[str, Any]]:
    """Losses of some steps and sizes of every contestant; in a worker."""
    initialize_process_groups(1)
    found: dict[str, dict[str, Any]] = {}
    for name in NAMES:
        settings = {**MODEL, "family": family, "query_groups": 2 if family == "llama" else 0}
        config = contestant_config(name, settings, RANK, 2, optimizer={"learning_rate": 1e-2})
        contestant = build_contestant(name, config)
        losses = [contestant.step() for _ in range(6)]
        linear = sum(
            parameter.numel()
            for key, parameter in contestant.engine.module.named_parameters()
            if "decoder.layers" in key and parameter.dim() == 2
        )
        found[name] = {"losses": losses, "linear": linear, "parameters": contestant.parameters}
        found[name] |= {"flops": contestant.flops_per_token, "causal": contestant.causal_flops_per_token}
        found[name]["dense_flops"] = training_flops_per_token(config.model, {})
    return found


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_contestants_train_and_their_flops_are_those_of_their_weights(family: str) -> None:
    found = run(trained_contestants, 1, family)[0]
    attention = 12 * MODEL["sequence_length"] * MODEL["hidden"] * MODEL["layers"]
    output = 6 * 384 * MODEL["hidden"]  # 300 tokens are padded to 384
    for name, facts in found.items():
        assert facts["losses"][-1] < facts["losses"][0], name
        assert facts["flops"] == 6 * facts["linear"] + attention + output
        assert facts["flops"] - facts["causal"] == attention // 2
    assert found["dense"]["flops"] == found["dense"]["dense_flops"]
    shared, separate, equal = (found[name]["linear"] for name in NAMES[1:])
    assert equal <= shared < separate
    assert shared - equal < 0.05 * shared


def test_equal_parameters_is_two_thirds_of_the_rank_for_queries_keys_and_values() -> None:
    config = contestant_config("separate-parameters", {**MODEL, "family": "gpt2"}, 9, 1).model
    qkv = projections(config)[0]
    assert separate_rank("separate-parameters", config, qkv, 9) == 6  # 9 · (32 + 96) / (3 · 64)
    assert separate_rank("separate-rank", config, qkv, 9) == 9


def test_matrix_products_of_a_layer() -> None:
    config = contestant_config("dense", {**MODEL, "family": "gpt2"}, RANK, 1).model
    with single_process():
        rows = time_gemms(config, 16, torch.float32, 1, 2, ranks=[None, RANK])
    weights = sum(p.in_features * p.out_features for p in projections(config)[:4])
    factors = sum(RANK * (p.in_features + p.out_features) for p in projections(config)[:4])
    assert [row["flops"] for row in rows] == [6 * 16 * weights, 6 * 16 * factors]


# The tool -------------------------------------------------------------------------------------------------------------


def test_largest_begins_where_it_is_told_and_ends_within_a_step() -> None:
    tried: list[int] = []

    def fits(number: int) -> int | None:
        tried.append(number)
        return number if number <= 21 else None

    assert largest(fits, first=48, step=4) == (21, 21)
    assert tried == [48, 24, 12, 18, 21]
    with pytest.raises(ConfigError, match="one layer does not fit"):
        largest(lambda number: None, first=5)


@pytest.mark.slow
def test_blocks_alone_are_what_more_layers_take(tmp_path: Path) -> None:
    sizes = ["--layers", 3, "--hidden", 32, "--heads", 2, "--sequence", 16, "--micro-batch", 1, "--vocabulary", 300]
    fast = ["--contestants", "dense", "factored", "--warm-up", 1, "--repeats", 2, "--precision", "fp32", "--blocks"]
    settings = ["--settings", "train.recompute=layers", "optimizer.epsilon=1e-6"]
    done = run_tool(*sizes, *fast, *settings, "--json", tmp_path / "step.json")
    assert done.returncode == 0, done.stderr
    facts = json.loads((tmp_path / "step.json").read_text())
    rows = {row["name"]: row for row in facts["rows"]}
    for kind in ("dense", "factored"):
        whole, blocks = rows[kind], rows[f"{kind}, blocks alone"]
        assert 0 < blocks["parameters"] < whole["parameters"]
        ends = whole["flops"] - blocks["flops"]
        assert ends == 6 * 384 * 32 * 16  # of the output layer, vocabulary padded
    assert facts["settings"]["settings"] == ["train.recompute=layers", "optimizer.epsilon=1e-6"]
    assert run_tool(*sizes, *fast, "--settings", "train.recompute").returncode == 2


@pytest.mark.slow
def test_tool_writes_rows_table_and_profile(tmp_path: Path) -> None:
    sizes = ["--layers", 1, "--hidden", 32, "--heads", 2, "--sequence", 16, "--micro-batch", 1, "--vocabulary", 300]
    fast = ["--contestants", "factored", "dense", "--warm-up", 1, "--repeats", 2, "--precision", "fp32"]
    done = run_tool(*sizes, *fast, "--json", tmp_path / "step.json", "--profile", tmp_path / "profile")
    assert done.returncode == 0, done.stderr
    facts = json.loads((tmp_path / "step.json").read_text())
    assert [row["name"] for row in facts["rows"]] == ["dense", "factored", "GEMMs, dense", "GEMM pairs"]
    factored = facts["rows"][1]
    assert factored["rank"] == 8
    assert factored["flop_ratio"] == facts["rows"][0]["flops"] / factored["flops"]
    assert factored["share_of_flop_ratio"] == pytest.approx(factored["time_ratio"] / factored["flop_ratio"])
    assert all(row["peak_bytes"] > 4 * 4 * row["parameters"] for row in facts["rows"][:2])
    assert {"hardware", "versions", "commit"} <= facts.keys()
    for found in facts["profiles"].values():
        assert tuple(found) == CATEGORIES
        assert found["GEMMs"] > 0.0
        assert found["ZeRO and optimizer"] > 0.0
    assert sorted(path.name for path in (tmp_path / "profile").iterdir()) == [
        "dense.txt",
        "factored.txt",
        "profile.png",
    ]
    assert "| factored | 8 |" in done.stdout
    if not torch.cuda.is_available():
        assert "No GPU here" in done.stdout


def test_largest_needs_a_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ConfigError, match="--largest needs a GPU"):
        largest_models([])
