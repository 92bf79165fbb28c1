"""Prices of products by their shape, and of steps, against computation by hand."""

from dataclasses import replace

import pytest

from model.config import ModelConfig, factored_projections
from model.costs.arithmetic import training_flops_per_token
from pretrain.config.parallel import ParallelLayout
from pretrain.devices import DEVICES
from pretrain.planning.compute import Arithmetic, _Product, compute_seconds
from pretrain.planning.memory import Setup
from pretrain.planning.rank_outlook import dense_twin

H100 = Arithmetic(989e12, 0.4, 3.35e12, 0.6)
MEDIUM = ModelConfig(family="gpt2", layers=24, hidden=1024, heads=16, sequence_length=1024, vocabulary=50257)


def seconds(model: ModelConfig, rank: int | None, setup: Setup | None = None, arithmetic: Arithmetic = H100) -> float:
    setup = setup or Setup(ParallelLayout(tensor=1, data=1, accumulation=1), 16, "bf16", 1)
    dense = dense_twin(model)
    ranks = {} if rank is None else {p.name: rank for p in factored_projections(model)}
    flops = training_flops_per_token(dense, {})
    return compute_seconds(dense if rank is None else model, ranks, setup, arithmetic, flops)


def test_a_product_takes_whole_tiles_or_waits_for_memory() -> None:
    tokens = 8192
    large = _Product(1024, 4096, 3).priced_flops(tokens, 2, H100.balance)
    assert large == 3 * 2 * tokens * 1024 * 4096
    assert _Product(1024, 4090, 3).priced_flops(tokens, 2, H100.balance) == large
    assert H100.balance == pytest.approx(0.66 * 989e12 / (0.8 * 3.35e12))
    thin = _Product(1024, 64, 3).priced_flops(tokens, 2, H100.balance)
    moved = 2 * (tokens * 1024 + tokens * 64 + 64 * 1024)
    assert thin == pytest.approx(3 * H100.balance * moved)
    assert thin > 3 * 2 * tokens * 1024 * 64
    # At a rank of 16 only memory counts, and most of it is the wide side.
    assert _Product(1024, 16, 3).priced_flops(tokens, 2, H100.balance) > 0.9 * thin


def test_a_dense_step_is_its_flops_at_the_assumed_efficiency() -> None:
    flops = training_flops_per_token(dense_twin(MEDIUM), {}) * 16 * 1024
    assert seconds(MEDIUM, None) == pytest.approx(flops / (989e12 * 0.4))


def test_low_ranks_pay_less_than_their_flops_say() -> None:
    """Ranks below 256 save hardly any more time at this width; a device with more bandwidth saves more."""
    dense = seconds(MEDIUM, None)
    by_rank = {rank: seconds(MEDIUM, rank) / dense for rank in (16, 64, 128, 256, 512)}
    assert list(by_rank.values()) == sorted(by_rank.values())
    flops = training_flops_per_token(MEDIUM, {p.name: 256 for p in factored_projections(MEDIUM)})
    assert by_rank[256] > flops / training_flops_per_token(dense_twin(MEDIUM), {})
    assert by_rank[256] < 0.8
    assert by_rank[256] - by_rank[16] < 0.03 < by_rank[512] - by_rank[256]
    h200 = replace(H100, memory_bytes_per_second=DEVICES["h200"].memory_bytes_per_second)
    assert seconds(MEDIUM, 64, arithmetic=h200) < seconds(MEDIUM, 64)


@pytest.mark.parametrize("rank", [None, 256])
def test_layouts_share_the_work(rank: int | None) -> None:
    """Data parallelism divides the time, accumulation multiplies it, tensor parallelism makes products thinner."""
    alone = seconds(MEDIUM, rank)
    twice = Setup(ParallelLayout(tensor=1, data=1, accumulation=2), 16, "bf16", 1)
    assert seconds(MEDIUM, rank, twice) == pytest.approx(2 * alone)
    assert seconds(MEDIUM, rank, replace(twice, layout=ParallelLayout(tensor=1, data=2, accumulation=1))) == alone
    split = seconds(MEDIUM, rank, replace(twice, layout=ParallelLayout(tensor=8, data=1, accumulation=1)))
    assert alone / 8 < split < alone / 2


def test_an_additive_layer_takes_its_frozen_weight_and_its_factors() -> None:
    additive = MEDIUM.model_copy(update={"parametrization": "additive"})
    frozen_alone = seconds(additive, None) * (1 - 0.6 / 3)
    assert frozen_alone < seconds(additive, 64) < seconds(MEDIUM, 64) + seconds(MEDIUM, None)


def test_recomputation_takes_products_again() -> None:
    none, factors, layers = (
        seconds(MEDIUM, 256, Setup(ParallelLayout(tensor=1, data=1, accumulation=1), 16, "bf16", 1, recompute=mode))
        for mode in ("none", "factors", "layers")
    )
    assert none < factors < layers < 4 / 3 * none
