"""The null law: factors that were never trained make no criterion of ours grow them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model.config import Family
from model.process_groups import initialize_process_groups
from pretrain.config.run import RunConfig, parse_config
from pretrain.growth.event import RankMeasurement, layer_measurements
from pretrain.growth.initial_values import initial_factors, initial_model
from pretrain.growth.spectra import measure_spectra, measure_updates
from pretrain.policies.excess_explained_ratio import used_rank
from pretrain.policies.limits import decide_ranks
from pretrain.policies.select import build_policy
from tests.support.distributed import run
from tools.null_rank import null_rank, published_null, text_of_the_standard_library

ROOT = Path(__file__).resolve().parents[2]


def _null_ranks(policy: str, family: Family, shuffled: bool) -> list[tuple[int, int, float, float]]:
    """Width, seed, the mean rank the policy rests at, and the largest demand that was measured."""
    initialize_process_groups(1)
    text = text_of_the_standard_library(32, 64)
    found = []
    for width in (64, 96):
        for seed in (1, 2, 3):
            null = null_rank(policy, family, width, seed, text, shuffled=shuffled)
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


def _updates_of_nothing(config: RunConfig, tensor: int) -> tuple[list[int], dict[str, int]]:
    """Directions in use and the decision, from what a run keeps of its start, before any step."""
    initialize_process_groups(tensor)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[config.train.precision]
    model = initial_model(config).to(dtype)
    updates = measure_updates(model, initial_factors(model, config))
    layers = layer_measurements(model, RankMeasurement(measure_spectra(model), updates))
    policy = build_policy(config.rank, config.train.steps)
    used = [used_rank(layer, config.rank.threshold) for layer in layers]
    return used, decide_ranks(policy, config.rank, 10, layers, None)


@pytest.mark.parametrize(
    ("tensor", "family", "parametrization", "precision"),
    [
        (2, "llama", "factored", "bf16"),
        (1, "gpt2", "factored", "bf16"),
        (2, "gpt2", "factored", "fp32"),
        (2, "gpt2", "additive", "bf16"),
        (1, "llama", "additive", "fp32"),
    ],
)
def test_a_run_that_has_not_begun_has_learned_nothing(
    tensor: int, family: str, parametrization: str, precision: str
) -> None:
    """The rule's own path: the start is drawn again from seed and name, and rounded as the model's factors are."""
    config = parse_config(
        {
            "data": {"prefix": "corpus", "tokenizer": "tokenizer.model"},
            "model": {"family": family, "parametrization": parametrization, "layers": 2, "hidden": 64, "heads": 4}
            | {"sequence_length": 32, "vocabulary": 256},
            "train": {"steps": 100, "precision": precision},
            "rank": {"policy": "excess_explained_ratio", "initial": 8, "quantum": 4, "buffer": 4, "check_every": 10},
        }
    )
    for used, decided in run(_updates_of_nothing, tensor, config, tensor):
        assert used == [0] * len(used)
        assert decided == {}


@pytest.mark.parametrize("policy", ["explained_ratio", "schedule"])
def test_the_controls_grow_on_nothing_and_say_so(policy: str) -> None:
    assert all(mean_rank > 8 for _, _, mean_rank, _ in run(_null_ranks, 1, policy, "llama", False)[0])


def test_null_of_the_published_criterion_is_the_published_rank() -> None:
    """Untrained factors of GPT-2 small's MLP, set up and checked as in the code of InRank-Efficient: its README reports
    254 for the trained network."""
    assert abs(published_null(768, seed=0) - 254) <= 3


def _ranks_after_training(shuffled: bool) -> float:
    initialize_process_groups(1)
    text = text_of_the_standard_library(32, 256)
    return null_rank("gradient", "llama", 64, 1, text, shuffled=shuffled, trained=True).mean_rank


@pytest.mark.slow
def test_training_on_text_makes_ranks_grow_and_on_shuffled_labels_far_less() -> None:
    """The null is no refusal to grow: the same policy asks for rank where there is something to learn."""
    text, shuffled = run(_ranks_after_training, 1, False)[0], run(_ranks_after_training, 1, True)[0]
    assert text - 8 > 1.5 * (shuffled - 8)


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
