"""Policies are pure: singular values in, target ranks out; and the null of the explained-ratio rule."""

import dataclasses
from typing import ClassVar, get_args

import numpy as np
import pytest

from model.config import ModelConfig, Projection, factored_projections
from pretrain.policies.budget import affordable_parameters
from pretrain.policies.excess_explained_ratio import ROUNDING, used_rank
from pretrain.policies.explained_ratio import explained_ratio, explaining_rank
from pretrain.policies.gradient import GradientPolicy
from pretrain.policies.limits import decide_ranks, limit_growth, rank_cap, truncated_ranks
from pretrain.policies.policy import LayerMeasurement, RankConfig, ScheduleEntry
from pretrain.policies.select import POLICIES, build_policy, check_rank_config, check_start_ranks, with_defaults
from pretrain.train_state import GrowthRecord

WIDE = Projection("wide", 0, "fc1", 64, 192, True, True, False)  # breaks even at 48
SQUARE = Projection("square", 0, "proj", 64, 64, True, False, True)  # breaks even at 32


def layer(rank: int, projection: Projection = WIDE, values: object = None) -> LayerMeasurement:
    return LayerMeasurement(projection, rank, np.ones(rank) if values is None else np.asarray(values, dtype=float))


# Limits ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rank", "target", "granted"),
    [
        (16, 17, 24),  # rounded up to the quantum
        (16, 24, 24),
        (16, 40, 32),  # at most doubled
        (32, 64, 48),  # break-even
        (20, 40, 40),  # a start that is no multiple of the quantum
        (20, 44, 40),  # doubled is 40
    ],
)
def test_growth_is_limited(rank, target, granted):
    assert limit_growth({"wide": target}, [layer(rank)], RankConfig(quantum=8), 5) == {"wide": granted}


@pytest.mark.parametrize(("rank", "target"), [(16, 16), (16, 8), (48, 96), (50, 60)])
def test_nothing_shrinks_and_nothing_passes_the_cap(rank, target):
    assert limit_growth({"wide": target}, [layer(rank)], RankConfig(quantum=8), 5) == {}


def test_layers_without_a_target_stay():
    assert limit_growth({}, [layer(16)], RankConfig(quantum=8), 5) == {}


@pytest.mark.parametrize(("step", "grows"), [(9, False), (10, True), (20, True), (21, False)])
def test_growth_keeps_to_its_window(step, grows):
    rank = RankConfig(quantum=8, start_step=10, stop_step=20)
    assert bool(limit_growth({"wide": 24}, [layer(16)], rank, step)) == grows


def test_cap_is_a_multiple_of_the_quantum_that_does_not_cost_more_than_dense():
    assert rank_cap(WIDE, 16) == 48
    assert rank_cap(WIDE, 20) == 40
    assert rank_cap(SQUARE, 64) == 0


# Fixed and scheduled --------------------------------------------------------------------------------------------------


def test_fixed_never_grows():
    policy = build_policy(RankConfig(), 1000)
    assert not any(policy.due(step) for step in range(200))
    assert policy.targets(100, [layer(16)], None) == {}


def test_schedule_grows_at_its_entries_only():
    rank = RankConfig(
        policy="schedule", initial=16, schedule=(ScheduleEntry(step=5, rank=32), ScheduleEntry(step=9, rank=48))
    )
    policy = build_policy(rank, 1000)
    assert [step for step in range(20) if policy.due(step)] == [5, 9]
    assert not policy.needs
    assert policy.targets(5, [layer(16), layer(32, SQUARE)], None) == {"wide": 32}


# Explained ratio ------------------------------------------------------------------------------------------------------


def test_explained_ratio_is_the_published_formula():
    values = np.array([4.0, 2.0, 1.0, 0.0])
    tail = np.array([0.0, 2.0, 1.0, 0.0])
    assert explained_ratio(values, 1) == pytest.approx(1.0 - np.var(tail, ddof=1) / np.var(values, ddof=1))
    assert explained_ratio(values, 4) == 1.0
    assert explained_ratio(np.zeros(4), 1) == 1.0


def test_explaining_rank_scans_from_the_used_rank_over_the_buffer():
    values = np.array([10.0, 9.0, 8.0, 0.1, 0.1, 0.1])
    assert explaining_rank(values, 64, used=1, buffer=5, threshold=0.99) == 3
    assert explaining_rank(values, 64, used=4, buffer=2, threshold=0.99) == 4  # never fewer than are used
    assert explaining_rank(np.ones(6), 64, used=2, buffer=4, threshold=0.99) == 5  # none suffices: the last one


def test_explained_ratio_grows_a_flat_spectrum_and_leaves_a_steep_one():
    policy = build_policy(RankConfig(policy="explained_ratio", initial=16, buffer=8, threshold=0.9), 1000)
    steep = 10.0 * 0.3 ** np.arange(16)
    assert policy.targets(100, [layer(16, WIDE, np.ones(16)), layer(16, SQUARE, steep)], None) == {"wide": 23}


def test_explained_ratio_is_due_every_so_often_inside_its_window():
    rank = RankConfig(
        policy="explained_ratio", initial=32, buffer=8, check_every=10, start_step=15, stop_step=40, threshold=0.9
    )
    policy = build_policy(rank, 1000)
    due = [step for step in range(100) if policy.due(step)]
    assert due == [15, 25, 35]
    assert not build_policy(RankConfig(policy="explained_ratio"), 1000).due(0)


def test_untrained_factors_have_a_fixed_point():
    rank = RankConfig(policy="explained_ratio", initial=16, quantum=8, buffer=8, threshold=0.9, start_step=1000)
    flat, steep = layer(16), layer(16, SQUARE, 10.0 * 0.3 ** np.arange(16))
    null = build_policy(rank, 1000).untrained_ranks([flat, steep])
    assert null == {"wide": 24, "square": 16}
    assert flat.rank == 16


# Settings -------------------------------------------------------------------------------------------------------------

MODEL = ModelConfig(layers=1, hidden=64, heads=4, ffn=192, family="gpt2")  # proj breaks even at 32


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"initial": 33}, "33 is above the break-even rank 32 of decoder.layers.0.self_attention.linear_proj"),
        ({"initial": 8, "schedule": [{"step": 5, "rank": 16}]}, "rank.schedule belongs to rank.policy=schedule"),
        ({"policy": "schedule", "initial": 24, "quantum": 16}, "not a multiple of rank.quantum 16"),
        ({"policy": "schedule", "initial": 16}, "set rank.schedule"),
        ({"policy": "explained_ratio", "initial": 16, "buffer": 16}, "16 - 16 leaves none"),
        ({"initial": 16, "start_step": 5, "stop_step": 4}, "rank.stop_step 4 is before"),
        ({"initial": 16, "budget": 0.5}, "rank.budget 0.5 is for policies that decide by themselves"),
        ({"initial": 16, "truncate": 0.1}, "rank.truncate 0.1 is for policies that look at what was learned"),
        ({"initial": 16, "budget_unit": "flops"}, "there is no budget: set rank.budget"),
        (
            {"policy": "gradient", "initial": 16, "budget": 0.25},
            "rank.budget 0.25 allows 10,240 parameters in factored layers, and rank 16 starts with 14,336",
        ),
        ({"policy": "gradient", "initial": 16, "probe": 49}, "rank.probe 49 is wider than what rank 16 leaves"),
        ({"policy": "gradient", "initial": 16, "probe": 8}, "fewer directions than one rank.quantum 16"),
        ({"policy": "gradient", "initial": 16, "check_every": 2}, "rank.check_every 2 leaves no 3 steps"),
        ({"policy": "gradient", "initial": 16, "start_step": 2}, "rank.start_step 2 leaves no 3 steps"),
        (
            {"policy": "excess_explained_ratio", "initial": 16, "check_every": 300},
            "decides every 300 steps from 0 to 250, and so never in a run of 1000",
        ),
    ],
)
def test_rank_settings_that_cannot_work_are_refused(settings, words):
    with pytest.raises(ValueError, match=r"rank\.") as refused:
        check_rank_config(with_defaults(RankConfig(**settings), 1000), factored_projections(MODEL), 1000)
    assert words in str(refused.value)


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ([(5, 16), (5, 32)], "behind an entry at step 5"),
        ([(5, 16), (6, 16)], "where it is 16 already"),
        ([(5, 12)], "no multiple of rank.quantum 8"),
        ([(5, 24)], "more than double the 8"),
        ([(5, 16), (6, 32), (7, 40)], "above the break-even rank 32"),
        ([(1, 16)], "outside rank.start_step 2 to rank.stop_step 50"),
        ([(60, 16)], "outside rank.start_step 2 to rank.stop_step 50"),
        ([(45, 16)], "the run ends at train.steps 40"),
    ],
)
def test_entries_that_cannot_happen_are_refused(entries, words):
    schedule = [{"step": step, "rank": rank} for step, rank in entries]
    rank = RankConfig(policy="schedule", initial=8, quantum=8, start_step=2, stop_step=50, schedule=schedule)
    with pytest.raises(ValueError, match=r"rank\.schedule") as refused:
        check_rank_config(rank, factored_projections(MODEL), 40)
    assert words in str(refused.value)


def test_measuring_policies_decide_in_the_first_quarter_of_a_run():
    rank = with_defaults(RankConfig(policy="gradient"), 2000)
    assert _decisions(rank, 2000) == list(range(50, 501, 50))
    given = RankConfig(policy="gradient", check_every=7, stop_step=9)
    assert with_defaults(given, 2000) == given
    assert with_defaults(RankConfig(policy="schedule"), 2000) == RankConfig(policy="schedule")


@pytest.mark.parametrize("steps", [100, 399, 400, 1999, 2080, 40_000])
@pytest.mark.parametrize("start_step", [0, 10, 90])
@pytest.mark.parametrize("stop_step", [None, 95, 300, 1_000_000])
def test_default_decisions_are_few_wherever_growth_stops(steps, start_step, stop_step):
    """At most ten in a run, and one in 200 steps, which costs under half a percent (docs/lab-notes.md) except in runs
    of less than 200 steps."""
    rank = with_defaults(RankConfig(policy="gradient", start_step=start_step, stop_step=stop_step), steps)
    assert 1 <= len(_decisions(rank, steps)) <= max(1, min(10, steps // 200))


def _decisions(rank, steps):
    return [step for step in range(steps) if build_policy(rank, steps).due(step)]


def test_every_policy_that_can_be_named_is_there_and_its_defaults_are_settings():
    assert list(POLICIES) == list(get_args(RankConfig.model_fields["policy"].annotation))
    for name, policy in POLICIES.items():
        RankConfig.model_validate({"policy": name, **policy.defaults})


def test_a_policy_declares_its_defaults_and_that_it_needs_a_budget(monkeypatch):
    class Demanding(GradientPolicy):
        budget = "required"
        defaults: ClassVar = {"threshold": 0.5, "initial": 16}

    monkeypatch.setitem(POLICIES, "gradient", Demanding)
    rank = with_defaults(RankConfig(policy="gradient", threshold=0.7), 1000)
    assert (rank.threshold, rank.initial, rank.stop_step) == (0.7, 16, 250)
    assert with_defaults(rank, 1000) == rank
    with pytest.raises(ValueError, match="there is none: set rank"):
        check_rank_config(rank, factored_projections(MODEL), 1000)
    check_rank_config(rank.model_copy(update={"budget": 1.0}), factored_projections(MODEL), 1000)


def test_dense_models_have_nothing_to_grow():
    with pytest.raises(ValueError, match="nothing to grow in a dense model"):
        check_rank_config(RankConfig(policy="explained_ratio"), [], 100)
    check_rank_config(RankConfig(initial=10_000), [], 100)


# Excess explained ratio -----------------------------------------------------------------------------------------------


def learned(rank: int, update: object, demand: object = (), projection: Projection = WIDE) -> LayerMeasurement:
    """A layer with a flat product of size one and the given update and demand."""
    return LayerMeasurement(
        projection, rank, np.ones(rank), np.asarray(update, dtype=float), np.asarray(demand, dtype=float)
    )


def test_used_rank_counts_the_directions_of_the_update_above_rounding():
    assert used_rank(learned(8, [3.0, 3.0, 3.0, 0.1, 0.1]), 0.9) == 3
    assert used_rank(learned(8, np.ones(16)), 0.9) == 15
    assert used_rank(learned(8, np.zeros(16)), 0.9) == 0
    assert used_rank(learned(8, np.full(16, ROUNDING)), 0.9) == 0  # of a product of size one
    assert used_rank(LayerMeasurement(WIDE, 4, np.zeros(4), np.zeros(4)), 0.9) == 0  # additive, at its start


def test_excess_explained_ratio_grows_what_is_used_up_the_fullest_first():
    policy = build_policy(RankConfig(policy="excess_explained_ratio", initial=8, buffer=4), 1000)
    full, fuller = learned(8, np.ones(10)), learned(8, np.ones(16), projection=SQUARE)
    assert list(policy.targets(100, [full, fuller], None).items()) == [("square", 19), ("wide", 13)]
    assert policy.targets(100, [learned(8, [1.0] * 7 + [0.0] * 9)], None) == {}
    assert policy.targets(100, [learned(8, np.zeros(16))], None) == {}


@pytest.mark.parametrize("rank", [8, 16, 64])
def test_excess_explained_ratio_knows_that_additive_updates_have_half_as_many_directions(rank):
    additive = dataclasses.replace(WIDE, additive=True)
    policy = build_policy(RankConfig(policy="excess_explained_ratio", initial=rank, buffer=4), 1000)
    full = learned(rank, np.ones(rank), projection=additive)
    assert policy.targets(100, [full], None)["wide"] > rank
    narrow = learned(rank, np.r_[np.ones(rank // 2 - 1), np.zeros(rank // 2 + 1)], projection=additive)
    assert policy.targets(100, [narrow], None) == {}
    assert policy.targets(100, [learned(rank, np.zeros(rank), projection=additive)], None) == {}


# Gradient -------------------------------------------------------------------------------------------------------------


def gradient_policy(**settings: object):
    rank = {"policy": "gradient", "initial": 8, "quantum": 4, "probe": 8, "check_every": 10, "budget": 1.0, **settings}
    return build_policy(RankConfig.model_validate(rank), 100)


def test_gradient_grants_the_quanta_that_are_worth_most():
    used = np.ones(16)
    wide = learned(8, used, [9.0, 1.0, 1.0, 1.0, 0.1, 0.1, 0.1, 0.1])  # 12 and 0.4 over 4 x 256 parameters
    square = learned(8, used, [4.0, 1.0, 0.0, 0.0, 4.0, 0.0, 0.0, 0.0], SQUARE)  # 5 and 4 over 4 x 128
    one_left = {"stop_step": 10}
    assert gradient_policy(**one_left).targets(10, [wide, square], 1024 + 512) == {"wide": 12, "square": 12}
    assert gradient_policy(**one_left).targets(10, [wide, square], 1024) == {"wide": 12}
    assert gradient_policy(**one_left).targets(10, [wide, square], 1023) == {"square": 12}
    assert gradient_policy(**one_left).targets(10, [wide, square], 10_000) == {"wide": 16, "square": 16}


def test_gradient_offers_a_last_quantum_that_is_only_partly_measured():
    used, last = np.ones(16), {"stop_step": 10}
    three = learned(8, used, [2.0, 1.0, 1.0], SQUARE)  # 4 over 4 x 128
    six = learned(8, used, [4.0, 4.0, 4.0, 4.0, 4.0, 4.0])  # 16 and 8 over 4 x 256
    assert gradient_policy(**last).targets(10, [three, six], 10_000) == {"wide": 16, "square": 12}
    assert gradient_policy(**last).targets(10, [three], 512) == {"square": 12}


def test_gradient_spreads_its_budget_over_the_decisions_left():
    layer = learned(8, np.ones(16), np.ones(8), SQUARE)
    policy = gradient_policy(stop_step=40)  # decisions at 10, 20, 30 and 40
    assert policy.targets(10, [layer], 4 * 512) == {"square": 12}
    assert policy.targets(30, [layer], 4 * 512) == {"square": 16}
    assert policy.targets(10, [layer], 4 * 512 - 1) == {"square": 12}  # the last one may cost more than its share
    assert policy.targets(10, [layer], 511) == {}


def test_gradient_does_not_pass_a_dear_layer_over_for_a_cheap_one():
    dear, cheap = learned(8, np.ones(16), np.full(8, 10.0)), learned(8, np.ones(16), np.ones(8), SQUARE)
    assert gradient_policy(stop_step=40).targets(10, [dear, cheap], 4 * 512) == {"wide": 12}


def test_gradient_asks_only_for_layers_that_use_what_they_have_and_want_more():
    policy = gradient_policy(stop_step=10)
    idle, sated = learned(8, [1.0] * 3 + [0.0] * 13, np.ones(8)), learned(8, np.ones(16), [], SQUARE)
    assert policy.targets(10, [idle, sated], 10_000) == {}
    without_budget = gradient_policy(budget=None)
    assert without_budget.targets(10, [learned(8, np.ones(16), np.ones(8))], None) == {"wide": 12}


# Budget and truncation ------------------------------------------------------------------------------------------------


def test_growth_stops_where_the_room_ends_quantum_by_quantum():
    layers = [layer(16), layer(16, SQUARE)]  # 8 x 256 and 8 x 128 parameters a quantum
    rank = RankConfig(quantum=8)
    targets = {"square": 32, "wide": 32}
    assert limit_growth(targets, layers, rank, 5, 0) == {}
    assert limit_growth(targets, layers, rank, 5, 1024) == {"square": 24}
    assert limit_growth(targets, layers, rank, 5, 1024 + 2048) == {"square": 24, "wide": 24}
    assert limit_growth(targets, layers, rank, 5, 2 * 1024 + 2048) == {"square": 32, "wide": 24}


def test_budget_in_parameters_and_in_flops_of_the_whole_run():
    dense = 64 * 192 + 64 * 64
    parts = [WIDE, SQUARE]
    parameters = RankConfig(budget=0.5)
    assert affordable_parameters(parameters, parts, {"wide": 8, "square": 8}, [], 150, 300) == dense // 2
    assert affordable_parameters(RankConfig(), parts, {"wide": 8, "square": 8}, [], 150, 300) is None
    flops = RankConfig(budget=0.5, budget_unit="flops")
    # 40 of 100 steps at rank 8, 10 at 16: the other 50 may spend the rest of half of the dense run's FLOPs.
    growth = [GrowthRecord(40, 120, {"wide": 8, "square": 8}, {"wide": 16, "square": 16}, seconds=0.1)]
    cost = 64 + 192 + 64 + 64
    expected = (0.5 * dense * 100 - 8 * cost * 40 - 16 * cost * 10) / 50
    now = {"wide": 16, "square": 16}
    assert affordable_parameters(flops, parts, now, growth, 150, 300) == int(expected)


def test_what_truncation_frees_is_granted_once():
    """A truncated layer does not grow in the same decision, so all layers together keep to the budget."""
    rank = RankConfig(
        policy="gradient", initial=16, quantum=4, probe=8, truncate=0.01, budget=1.0, check_every=10, stop_step=100
    )
    steep = LayerMeasurement(WIDE, 16, np.array([1.0] * 4 + [1e-3] * 12), np.ones(32), np.ones(8))
    flat = LayerMeasurement(SQUARE, 16, np.ones(16), np.ones(32), np.ones(8))
    policy = build_policy(rank, 100)
    spent = 16 * (256 + 128)
    for affordable in (spent, spent + 4 * 256):
        decided = decide_ranks(policy, rank, 100, [steep, flat], affordable)
        assert decided == {"wide": 4, "square": 24}
        assert decided["wide"] * 256 + decided["square"] * 128 <= affordable


def test_the_ranks_of_a_start_are_checked_one_by_one():
    parts, ranks = [WIDE, SQUARE], {"wide": 8, "square": 24}
    check_start_ranks(RankConfig(policy="gradient", initial=8, quantum=8, check_every=10, budget=0.5), parts, ranks)
    with pytest.raises(ValueError, match="rank 8 to 24 starts with 5,120"):
        check_start_ranks(RankConfig(policy="gradient", initial=8, quantum=8, check_every=10, budget=0.3), parts, ranks)
    with pytest.raises(ValueError, match=r"rank\.probe 41 is wider than what rank 24 leaves of square"):
        check_start_ranks(RankConfig(policy="gradient", initial=8, check_every=10, probe=41), parts, ranks)
    with pytest.raises(ValueError, match=r"rank\.quantum 32 is more than twice the rank 8 of wide"):
        check_start_ranks(RankConfig(policy="schedule", initial=8, quantum=32), parts, ranks)
    with pytest.raises(ValueError, match="8 - 16 leaves none of wide"):
        check_start_ranks(RankConfig(policy="explained_ratio", initial=24, buffer=16), parts, ranks)
    with pytest.raises(ValueError, match="40 is above the break-even rank 32 of square"):
        check_start_ranks(RankConfig(initial=8), parts, ranks | {"square": 40})


def test_truncation_cuts_the_tail_that_holds_no_energy():
    rank = RankConfig(policy="gradient", quantum=4, truncate=0.01)
    steep = layer(16, WIDE, [1.0] * 5 + [1e-3] * 11)
    assert truncated_ranks([steep, layer(16, SQUARE)], rank) == {"wide": 8}
    assert truncated_ranks([steep], rank.model_copy(update={"truncate": 0.0})) == {}
    assert truncated_ranks([layer(16, WIDE, np.zeros(16))], rank) == {}  # has not begun to learn
    assert truncated_ranks([layer(16, WIDE, [1.0] * 5 + [0.0] * 11)], rank) == {}  # nothing to divide by
