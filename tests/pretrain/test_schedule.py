"""Learning rate and batch ramp at their corners."""

import math
from itertools import pairwise

import pytest

from pretrain.schedule import (
    BatchRamp,
    OptimizerConfig,
    ScheduleConfig,
    check_ramp,
    check_schedule,
    global_batch_at,
    learning_rate,
    samples_before,
)

OPTIMIZER = OptimizerConfig(learning_rate=1.0, minimum_learning_rate=0.1)
STEPS = 100


@pytest.mark.parametrize("shape", ["constant", "linear", "cosine"])
def test_warm_up_is_linear_and_ends_at_the_peak(shape):
    schedule = ScheduleConfig(shape=shape, warmup_steps=9)
    rates = [learning_rate(step, schedule, OPTIMIZER, STEPS) for step in range(10)]
    assert rates == pytest.approx([number / 10 for number in range(1, 11)])


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_decay_goes_down_to_the_minimum_which_no_step_has(shape):
    schedule = ScheduleConfig(shape=shape, warmup_steps=10)
    rates = [learning_rate(step, schedule, OPTIMIZER, STEPS) for step in range(10, STEPS + 1)]
    assert rates[0] == 1.0
    assert all(before > after for before, after in pairwise(rates))
    assert rates[-2] > 0.1
    assert rates[-1] == pytest.approx(0.1)
    assert rates[45] == pytest.approx(0.55)  # half way, both shapes are half way
    assert learning_rate(10 * STEPS, schedule, OPTIMIZER, STEPS) == pytest.approx(0.1)


def test_cosine_and_linear_differ_where_they_should():
    linear, cosine = (ScheduleConfig(shape=shape) for shape in ("linear", "cosine"))
    assert learning_rate(25, linear, OPTIMIZER, STEPS) == pytest.approx(0.1 + 0.9 * 0.75)
    assert learning_rate(25, cosine, OPTIMIZER, STEPS) == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi / 4)))


def test_no_warm_up_starts_at_the_peak():
    assert learning_rate(0, ScheduleConfig(shape="cosine"), OPTIMIZER, STEPS) == 1.0


def test_constant_stays():
    schedule = ScheduleConfig(shape="constant", warmup_steps=1)
    assert [learning_rate(step, schedule, OPTIMIZER, 3) for step in range(4)] == [0.5, 1.0, 1.0, 1.0]


def test_wsd_stays_and_then_falls():
    schedule = ScheduleConfig(shape="wsd", warmup_steps=10, decay_steps=20)
    rates = [learning_rate(step, schedule, OPTIMIZER, STEPS) for step in range(STEPS + 1)]
    assert rates[10:81] == [1.0] * 71
    assert rates[81] == pytest.approx(1.0 - 0.9 / 20)
    assert rates[90] == pytest.approx(0.55)
    assert rates[100] == pytest.approx(0.1)


def test_wsd_whose_tail_begins_with_the_peak():
    schedule = ScheduleConfig(shape="wsd", warmup_steps=1, decay_steps=2)
    assert [learning_rate(step, schedule, OPTIMIZER, 3) for step in range(3)] == pytest.approx([0.5, 1.0, 0.55])


@pytest.mark.parametrize(
    ("settings", "steps", "words"),
    [
        ({"warmup_steps": 100}, 100, "schedule.warmup_steps 100"),
        ({"shape": "cosine", "decay_steps": 5}, 100, "schedule.decay_steps 5"),
        ({"shape": "wsd"}, 100, "set schedule.decay_steps"),
        ({"shape": "wsd", "warmup_steps": 60, "decay_steps": 41}, 100, "60 + schedule.decay_steps 41"),
    ],
)
def test_schedules_that_do_not_fit_are_refused(settings, steps, words):
    with pytest.raises(ValueError, match=r"schedule\.") as refused:
        check_schedule(ScheduleConfig(**settings), steps)
    assert words in str(refused.value)


def test_ramp_reaches_the_global_batch_and_sums_up():
    ramp = BatchRamp(start=8, increment=4, steps=10)
    batches = [global_batch_at(step, 20, ramp) for step in range(30)]
    assert batches[0] == 8
    assert batches[9] == 16
    assert batches[10:] == [20] * 20
    assert batches == sorted(batches)
    assert set(batches) == {8, 12, 16, 20}
    assert [samples_before(step, 20, ramp) for step in range(31)] == [sum(batches[:step]) for step in range(31)]


def test_without_a_ramp_every_step_is_the_same():
    assert global_batch_at(7, 32, None) == 32
    assert samples_before(7, 32, None) == 224


@pytest.mark.parametrize("increments", [1, 3, 7])
def test_ramp_of_any_length_sums_up(increments):
    ramp = BatchRamp(start=2, increment=2, steps=23)
    target = 2 + 2 * increments
    total = 0
    for step in range(40):
        assert samples_before(step, target, ramp) == total
        total += global_batch_at(step, target, ramp)


@pytest.mark.parametrize(
    ("ramp", "words"),
    [
        (BatchRamp(start=32, increment=8, steps=10), "batch_ramp.start 32"),
        (BatchRamp(start=8, increment=5, steps=10), "batch_ramp.increment 5"),
        (BatchRamp(start=8, increment=8, steps=101), "batch_ramp.steps 101"),
        (BatchRamp(start=2, increment=2, steps=4), "adds 15 increments in 4 steps"),
    ],
)
def test_ramps_that_lead_nowhere_are_refused(ramp, words):
    with pytest.raises(ValueError, match="batch_ramp") as refused:
        check_ramp(ramp, 32, STEPS)
    assert words in str(refused.value)


def test_minimum_above_the_peak_is_refused():
    with pytest.raises(ValueError, match=r"minimum_learning_rate 0\.2 is above"):
        OptimizerConfig(learning_rate=0.1, minimum_learning_rate=0.2)
