"""The null law: factors that were never trained make no criterion of ours grow them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from model.config import Family
from model.process_groups import initialize_process_groups
from tests.distributed import run
from tools.null_rank import null_rank, text_of_the_standard_library

ROOT = Path(__file__).resolve().parents[2]


def _null_ranks(policy: str, family: Family, shuffled: bool) -> list[tuple[int, int, float, float]]:
    """Width, seed, the mean rank the policy rests at, and the largest demand that was measured."""
    initialize_process_groups(1)
    text = text_of_the_standard_library(32, 64)
    found = []
    for width in (64, 96):
        for seed in (1, 2, 3):
            null = null_rank(policy, family, width, seed, text, shuffled)
            found.append((width, seed, null.mean_rank, null.largest_demand))
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(
    ("policy", "shuffled"), [("excess_explained_ratio", False), ("gradient", False), ("gradient", True)]
)
def test_untrained_factors_trigger_no_growth(policy: str, shuffled: bool, family: Family) -> None:
    for width, seed, mean_rank, demand in run(_null_ranks, 1, policy, family, shuffled)[0]:
        assert mean_rank == 8, f"width {width}, seed {seed}"
        if policy == "gradient":
            assert demand > 0.0  # there was something to be tempted by


@pytest.mark.parametrize("policy", ["explained_ratio", "schedule"])
def test_the_controls_grow_on_nothing_and_say_so(policy: str) -> None:
    assert all(mean_rank > 8 for _, _, mean_rank, _ in run(_null_ranks, 1, policy, "llama", False)[0])


@pytest.mark.slow
def test_the_table_holds_every_policy_and_the_published_rule(tmp_path: Path) -> None:
    file = tmp_path / "null.json"
    command = [sys.executable, "tools/null_rank.py", "--widths", "64", "--seeds", "1", "--json", str(file)]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    content = json.loads(file.read_text())
    assert {row["policy"] for row in content["policies"]} <= set(shown.split())
    assert [row["reported"] for row in content["published_rule"]] == [254, 287]
    for row in content["published_rule"]:
        assert abs(row["untrained"][0] - row["reported"]) <= 3
