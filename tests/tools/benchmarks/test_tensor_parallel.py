"""The tensor-parallel benchmark at toy size: its tables against the formulas, and its baseline against our layers."""

import argparse
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model.collectives import all_gathered
from model.process_groups import initialize_process_groups
from pretrain.errors import ConfigError
from tests.support.distributed import run
from tools.benchmarks.network_namespaces import check_namespaces, joined_namespaces, parse_rate
from tools.benchmarks.tensor_parallel import measure, report
from tools.benchmarks.tensor_parallel_contestants import build_contestants

HIDDEN, TOKENS = 64, 2 * 16
SETTINGS: dict[str, Any] = {
    "family": "llama", "layers": 2, "sequence": 16, "micro_batch": 2, "rank_divisor": 4, "dtype": "fp32",
    "repetitions": 2, "network": "local", "profile": None,
}  # fmt: skip


def _measured(settings: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    initialize_process_groups(2)
    return measure(argparse.Namespace(**settings), HIDDEN)


def test_the_table_counts_what_the_formulas_say(tmp_path: Path) -> None:
    measured, _ = run(_measured, 2, SETTINGS | {"profile": tmp_path})
    for row in measured["collectives"]:
        assert (row["collectives"], row["bytes"]) == (row["collectives_formula"], row["bytes_formula"])
    bytes_of = {(row["contestant"], row["direction"]): row["bytes"] for row in measured["collectives"]}
    ffn, numbers = 192, TOKENS * 4  # 8/3 of 64 up to a multiple of 64
    assert bytes_of["dense", "forward"] == bytes_of["dense", "backward"] == 2 * HIDDEN * numbers
    assert bytes_of["vanilla", "forward"] == (5 * HIDDEN + 2 * ffn) * numbers
    assert bytes_of["vanilla", "backward"] == (6 * HIDDEN + ffn) * numbers
    assert bytes_of["vanilla_shared", "forward"] == bytes_of["vanilla", "forward"]
    assert bytes_of["vanilla_shared", "backward"] == (3 * HIDDEN + ffn) * numbers
    assert bytes_of["factored", "forward"] == (4 * HIDDEN // 4 + 2 * 2) * numbers  # and the norms' statistics
    assert bytes_of["factored", "backward"] == 4 * HIDDEN // 4 * numbers
    linear = {"dense": HIDDEN * (4 * HIDDEN + 3 * ffn), "factored": HIDDEN // 4 * (8 * HIDDEN + 3 * ffn)}
    for row in measured["times"]:
        if row["contestant"] in linear:
            attention = 12 * 16 * HIDDEN // 2
            assert row["flops"] == 2 * TOKENS * (6 * linear[row["contestant"]] // 2 + attention)
    text = report(measured)
    assert all(f"\n{name} " in text for name in ("dense", "vanilla", "vanilla_shared", "factored"))
    assert len(list(tmp_path.glob("local_64_*.txt"))) == 4


def _outputs(settings: dict[str, Any]) -> dict[str, Tensor]:
    initialize_process_groups(2)
    outputs = {}
    for contestant in build_contestants(argparse.Namespace(**settings), HIDDEN):
        output, _ = contestant.run()
        assert contestant.stream.grad is not None
        both = torch.stack([output.detach(), contestant.stream.grad])
        outputs[contestant.name] = all_gathered(both) if contestant.name == "factored" else both
    return outputs


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_baseline_computes_what_our_layers_compute(family: str) -> None:
    for outputs in run(_outputs, 2, SETTINGS | {"family": family}):
        ours = outputs["factored"]
        for name in ("vanilla", "vanilla_shared"):
            assert float((outputs[name] - ours).norm() / ours.norm()) < 1e-5
        assert float((outputs["dense"] - ours).norm() / ours.norm()) > 1e-3


def test_sizes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ConfigError, match="rank 3 does not divide over 2 processes"):
        run(_measured, 2, SETTINGS | {"rank_divisor": 20})


def test_rates_and_missing_tools_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert parse_rate("2.5gbit") == 2_500_000_000
    with pytest.raises(ConfigError, match="10gbit"):
        parse_rate("fast")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="iproute2"):
        check_namespaces()


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes network namespaces")
def test_namespaces_are_joined_and_removed() -> None:
    with joined_namespaces("1gbit") as ends:
        shown = subprocess.run(["tc", "-n", ends[0].namespace, "qdisc"], capture_output=True, text=True, check=True)
        assert "rate 1Gbit" in shown.stdout
        listed = subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout
        assert all(end.namespace in listed for end in ends)
    listed = subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout
    assert not any(end.namespace in listed for end in ends)
