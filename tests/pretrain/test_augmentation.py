"""The augmentation event on real engines: nothing is lost, nothing is left over."""

import os

import psutil
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from model.arithmetic import total_parameters
from model.config import ModelConfig
from model.process_groups import initialize_process_groups
from pretrain.augmentation import GrowthPlan, _agree_on, _check_logits
from pretrain.optimizer_state import optimizer_state
from tests.distributed import run
from tests.parallel_engine import Case, SmallRun, live_engines, uniform_ranks
from tests.parallel_model import small_config

STEPS_BEFORE, STEPS_AFTER = 3, 3

CASES = [
    (1, Case(stage=0)),
    (1, Case(stage=1, precision="fp16")),
    (2, Case(stage=0, tensor=2)),
    (2, Case(stage=1, tensor=2)),
    (2, Case(stage=1, precision="bf16")),
    (2, Case(stage=2, precision="fp16", accumulation=2)),
    (4, Case(stage=1, tensor=2, precision="bf16", accumulation=2)),
    (4, Case(stage=2, tensor=2)),
]
MATRIX = [
    (processes, Case(stage=stage, precision=precision, tensor=tensor, accumulation=accumulation))
    for processes in (1, 2, 4)
    for tensor in (1, 2, 4)
    if tensor <= processes
    for stage, precision in ((0, "fp32"), *((stage, p) for stage in (1, 2) for p in ("fp32", "bf16", "fp16")))
    for accumulation in (1, 2)
    if (processes, Case(stage=stage, precision=precision, tensor=tensor, accumulation=accumulation)) not in CASES
]
ALL_CASES = [*CASES, *(pytest.param(*case, marks=pytest.mark.matrix) for case in MATRIX)]

States = dict[str, dict[str, Tensor]]


def _uninterrupted(config: ModelConfig, case: Case) -> tuple[list[tuple[float, float]], States]:
    small = SmallRun(config, uniform_ranks(config, 4), case)
    return small.train(STEPS_BEFORE + STEPS_AFTER), small.logical_state()


def _grown_by_nothing(config: ModelConfig, case: Case) -> tuple[list[tuple[float, float]], States]:
    small = SmallRun(config, uniform_ranks(config, 4), case)
    curve = small.train(STEPS_BEFORE)
    small.grow(uniform_ranks(config, 4))
    return curve + small.train(STEPS_AFTER), small.logical_state()


@pytest.mark.parametrize(("processes", "case"), ALL_CASES)
def test_growth_by_zero_columns_changes_no_bit(processes: int, case: Case) -> None:
    config = small_config("llama", "factored", "mlp" if case.accumulation == 2 else "all", hidden_dropout=0.1)
    expected_curve, expected = run(_uninterrupted, processes, config, case)[0]
    curve, found = run(_grown_by_nothing, processes, config, case)[0]
    assert curve == expected_curve
    for key, tensors in expected.items():
        for name, tensor in tensors.items():
            assert torch.equal(found[key][name], tensor), f"{key} of {name}"


def _around_growth(
    config: ModelConfig, case: Case, new_ranks: dict[str, int]
) -> tuple[States, States, dict[str, int], dict[str, int], dict[str, int], list[tuple[float, float]], float]:
    small = SmallRun(config, uniform_ranks(config, 4), case)
    small.train(STEPS_BEFORE)
    before = small.logical_state()
    small.grow(new_ranks)
    after, ranks = small.logical_state(), small.engine.module.ranks()
    owned = small.owned_bytes()
    curve = small.train(STEPS_AFTER)
    fresh = SmallRun(config, ranks, case).owned_bytes()
    return before, after, ranks, owned, fresh, curve, optimizer_state(small.engine).counters()["adam_step"]


@pytest.mark.parametrize(("processes", "case"), ALL_CASES)
def test_growth_keeps_every_old_entry(processes: int, case: Case) -> None:
    config = small_config("gpt2" if case.stage == 2 else "llama", "factored")
    # Layers grow by different amounts, and one not at all.
    new_ranks = {name: 4 + 2 * (place % 3) for place, name in enumerate(uniform_ranks(config, 4)) if place % 3}
    everyone = run(_around_growth, processes, config, case, new_ranks)
    before, after, ranks, _, _, curve, adam_step = everyone[0]
    assert all(result[2] == ranks for result in everyone)
    assert ranks == uniform_ranks(config, 4) | new_ranks
    assert all(loss == loss for loss, _ in curve)
    assert adam_step == STEPS_BEFORE + STEPS_AFTER
    for key in before:
        for name, old in before[key].items():
            new = after[key][name]
            layer, _, side = name.rpartition(".")
            if side == "A" and layer in new_ranks:
                assert torch.equal(new[:4], old)
                added = new[4:]
                if key == "master":  # orthonormal rows, as long as the old ones
                    length = old.norm(dim=1).square().mean().sqrt()
                    expected = length.square() * torch.eye(len(added))
                    assert torch.allclose(added @ added.T, expected, atol=1e-3 * float(length.square()), rtol=1e-2)
                else:
                    assert not added.any()
            elif side == "B" and layer in new_ranks:
                assert torch.equal(new[:, :4], old)
                assert not new[:, 4:].any()
            else:
                assert torch.equal(new, old)


@pytest.mark.parametrize(("processes", "case"), CASES)
def test_memory_after_growth_is_what_the_ranks_predict(processes: int, case: Case) -> None:
    """Every parameter of this model is split, so the sums come out even: bytes of parameters on each process, and
    twelve bytes a number for master and moments over all of them, but for ZeRO's padding to an even partition."""
    config = small_config("llama", "factored")
    everyone = run(_around_growth, processes, config, case, uniform_ranks(config, 8))
    numbers = total_parameters(config, uniform_ranks(config, 8))
    for _, _, ranks, owned, fresh, _, _ in everyone:
        assert ranks == uniform_ranks(config, 8)
        assert owned == fresh
        assert owned["parameters"] == numbers // case.tensor * (4 if case.precision == "fp32" else 2)
    state_bytes = sum(result[3]["state"] for result in everyone)
    assert 12 * numbers <= state_bytes <= 12 * (numbers + 64 * processes)


def _compare(change: float) -> str:
    initialize_process_groups(1)
    logits = torch.linspace(-1, 1, 50)
    try:
        _check_logits(logits, logits + (change if dist.get_rank() == 1 else 0.0))
    except RuntimeError as error:
        return str(error)
    return ""


def test_a_growth_that_changes_the_function_is_noticed_by_all() -> None:
    assert run(_compare, 2, 1e-7) == ["", ""]
    for change in (0.01, float("nan")):
        assert all("growth changed the logits" in message for message in run(_compare, 2, change))


def _disagree() -> str:
    initialize_process_groups(1)
    try:
        _agree_on(GrowthPlan(3, {"layer": 8 + dist.get_rank()}, {"layer": 1.0}), {"layer": 4})
    except RuntimeError as error:
        return str(error)
    return ""


def test_processes_that_disagree_about_a_plan_stop_together() -> None:
    assert all("processes disagree about the growth at step 3" in message for message in run(_disagree, 2))


def _many_events(config: ModelConfig, events: int) -> tuple[list[int], list[int], list[int]]:
    left_by_other_tests = live_engines()
    small = SmallRun(config, uniform_ranks(config, 4), Case(stage=1, precision="bf16"))
    small.train(1)
    engines, hooks, resident = [], [], []
    for _ in range(events):
        small.grow({name: rank + 1 for name, rank in small.engine.module.ranks().items()})
        resident.append(psutil.Process(os.getpid()).memory_info().rss)
        small.train(1)
        module = small.engine.module
        engines.append(live_engines() - left_by_other_tests)
        hooks.append(sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules()))
    return engines, hooks, resident


def test_twenty_events_leave_nothing_behind() -> None:
    config = small_config("llama", "factored", hidden=256, vocabulary=4000)
    for engines, hooks, resident in run(_many_events, 2, config, 20, timeout_seconds=300):
        assert engines == [1] * 20
        assert hooks == [hooks[0]] * 20
        # What the ranks predict for the fifteen events: at most 2 + 2 + 4 + 8 bytes a number (weight, gradient, master,
        # moments). Were any engine kept, it would show as 60 MB an event.
        added = total_parameters(config, uniform_ranks(config, 24)) - total_parameters(config, uniform_ranks(config, 9))
        assert resident[-1] - resident[4] < 16 * added + 30e6
