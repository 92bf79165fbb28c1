"""The summary of a run against figures computed by hand."""

import math
from pathlib import Path
from typing import Any

import pytest

from model.config import factored_projections
from model.costs.arithmetic import total_parameters, trained_parameters, training_flops_per_token
from pretrain.config.run import RunConfig, parse_config
from pretrain.loss import perplexity
from pretrain.monitor.summary import dense_flops_ratio, executed_flops, summarize, summary_text
from pretrain.train_state import GrowthRecord, RankPeriod, TrainState, Validation
from tests.support.reference import frozen_names, tensor_shapes

CONFIG = parse_config(
    {
        "data": {"prefix": "corpus", "tokenizer": "tokenizer.model"},
        "model": {"layers": 1, "hidden": 64, "heads": 4, "sequence_length": 32, "vocabulary": 100},
        "train": {"steps": 10, "micro_batch": 1, "global_batch": 4},
        "rank": {"initial": 8, "quantum": 8},
    }
)
START = CONFIG.initial_ranks()
NAMES = list(START)


def grown(names: list[str], rank: int) -> dict[str, int]:
    return {**START, **dict.fromkeys(names, rank)}


GROWTH = [
    GrowthRecord(3, 12, {NAMES[0]: 8}, {NAMES[0]: 16}, seconds=0.5),
    GrowthRecord(6, 24, {NAMES[0]: 16, NAMES[1]: 8}, {NAMES[0]: 24, NAMES[1]: 16}, seconds=0.25),
]
STATE = TrainState(step=10, consumed_samples=40, skipped_steps=1, growth=GROWTH)
FINAL = {**START, NAMES[0]: 24, NAMES[1]: 16}


def test_the_periods_of_a_run_are_found_from_its_end_backwards():
    assert STATE.rank_periods(FINAL) == [
        RankPeriod(0, 12, START),
        RankPeriod(3, 12, grown(NAMES[:1], 16)),
        RankPeriod(6, 16, FINAL),
    ]
    assert TrainState(step=5, consumed_samples=20).rank_periods({}) == [RankPeriod(0, 20, {})]


def test_flops_are_counted_at_the_ranks_each_step_had():
    per_token = [training_flops_per_token(CONFIG.model, ranks) for ranks in (START, grown(NAMES[:1], 16), FINAL)]
    tokens = 4 * 32
    expected = tokens * (3 * per_token[0] + 3 * per_token[1] + 4 * per_token[2])
    executed, dense = executed_flops(CONFIG, STATE.rank_periods(FINAL))
    assert executed == expected
    assert dense == 10 * tokens * training_flops_per_token(CONFIG.model, {})
    assert executed < dense


def test_a_dense_run_costs_what_the_dense_model_costs():
    executed, dense = executed_flops(CONFIG, [RankPeriod(0, 40, {})])
    assert executed == dense
    assert dense_flops_ratio(CONFIG, {}) == 1.0


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("layers", ["all", "mlp"])
def test_an_additive_model_is_the_dense_one_and_its_factors(family, layers):
    changes = {"family": family, "parametrization": "additive", "factored_layers": layers}
    config = CONFIG.model.model_copy(update=changes)
    ranks = {layer.name: 8 + layer.layer for layer in factored_projections(config)}
    frozen = sum(layer.in_features * layer.out_features for layer in factored_projections(config))
    factors = sum(ranks[p.name] * (p.in_features + p.out_features) for p in factored_projections(config))
    dense, dense_flops = total_parameters(config, {}), training_flops_per_token(config, {})
    assert total_parameters(config, ranks) == dense + factors
    assert trained_parameters(config, ranks) == dense + factors - frozen
    assert training_flops_per_token(config, ranks) == dense_flops - 2 * frozen + 6 * factors
    factors_alone = config.model_copy(update={"trained": "factors"})
    shapes = tensor_shapes(factors_alone, ranks)
    assert trained_parameters(factors_alone, ranks) == factors
    assert factors == sum(math.prod(shapes[name]) for name in shapes.keys() - frozen_names(factors_alone))
    assert training_flops_per_token(factors_alone, ranks) < training_flops_per_token(config, ranks)


def _summarized(config: RunConfig, ranks: dict[str, int], *, step: int, consumed_samples: int) -> dict[str, Any]:
    """The facts of a run that neither grew, nor validated, nor saved."""
    state = TrainState(step=step, consumed_samples=consumed_samples)
    return summarize(config, ranks, state, lm_loss=3.0, validation=None, checkpoint=None)


def test_summary_tells_trained_from_frozen(tmp_path):
    config = CONFIG.model_copy(update={"model": CONFIG.model.model_copy(update={"parametrization": "additive"})})
    facts = _summarized(config, START, step=9, consumed_samples=36)
    total, trained = total_parameters(config.model, START), trained_parameters(config.model, START)
    share = 100 * total / total_parameters(config.model, {})
    expected = f"parameters {total:,} ({trained:,} trained, the others frozen): {share:.1f} % of the dense model's"
    assert expected in summary_text(facts, tmp_path)


def test_perplexity_does_not_overflow():
    assert perplexity(0.0) == 1.0
    assert perplexity(1e6) == math.inf
    assert math.isnan(perplexity(math.nan))


def test_summary_holds_the_facts_and_the_next_commands(tmp_path):
    newest = tmp_path / "a run" / "checkpoints" / "step_000000010"
    facts = summarize(CONFIG, FINAL, STATE, lm_loss=3.0, validation=Validation(2.5), checkpoint=newest)
    assert facts["perplexity"] == pytest.approx(math.exp(2.5))
    assert facts["parameters"] == total_parameters(CONFIG.model, FINAL)
    assert facts["growth_seconds"] == 0.75
    assert facts["consumed_tokens"] == 10 * 4 * 32
    text = summary_text(facts, tmp_path / "a run")
    assert "validation loss 2.5000, perplexity 12.18" in text
    assert [event["step"] for event in facts["growth"]] == [record.step for record in GROWTH]
    assert facts["growth"][-1]["mean_rank"] == facts["mean_rank"]
    assert facts["growth"][0]["mean_rank"] < facts["mean_rank"]
    assert "after 2 growth events:" in text
    assert f"--checkpoint '{tmp_path}/a run' --output '{tmp_path}/a run/consolidated'" in text
    assert f'from_pretrained("{tmp_path}/a run/export")' in text


def test_summary_of_a_dense_run_without_checkpoint():
    facts = _summarized(CONFIG, {}, step=5, consumed_samples=20)
    text = summary_text(facts, Path("runs/x"))
    assert "training loss 3.0000" in text
    assert "100.0 % of the dense model's" in text
    assert "mean rank" not in text
    assert "from_pretrained" not in text
