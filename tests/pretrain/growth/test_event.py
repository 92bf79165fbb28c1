"""The growth event on real engines: nothing is lost, nothing is left over."""

import contextlib
import gc
import io
import math
import os

import psutil
import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from model.config import ModelConfig
from model.costs.arithmetic import total_parameters, trained_parameters
from model.gpt import EspalierModel, tensor_layouts
from model.process_groups import initialize_process_groups, tensor_index, tensor_size
from model.sharding import TensorLayout
from pretrain.engine.optimizer_state import optimizer_state
from pretrain.errors import NumericalError
from pretrain.growth.event import RankPlan, _agree_on, _check_logits, change_ranks
from pretrain.growth.spectra import row_norms
from tests.support.distributed import run
from tests.support.parallel_engine import Case, SmallRun, live_engines, uniform_ranks
from tests.support.parallel_model import small_config

STEPS_BEFORE, STEPS_AFTER = 3, 3

CASES = [
    (1, Case(stage=1, precision="fp16")),
    (2, Case(stage=0, tensor=2)),
    (2, Case(stage=1, precision="bf16")),
    (2, Case(stage=2, precision="fp16", accumulation=2)),
    (4, Case(stage=1, tensor=2, precision="bf16", accumulation=2)),
    (2, Case(stage=3, precision="bf16", accumulation=2)),
    (4, Case(stage=3, tensor=2)),
    (2, Case(stage=2, precision="bf16", offload=True)),
    (2, Case(stage=3, offload=True)),
]
MATRIX = [
    (processes, Case(stage=stage, precision=precision, tensor=tensor, accumulation=accumulation, offload=offload))
    for processes in (1, 2, 4)
    for tensor in (1, 2, 4)
    if tensor <= processes
    for stage, precision, offload in (
        (0, "fp32", False),
        *(
            (stage, precision, offload)
            for stage in (1, 2, 3)
            for precision in ("fp32", "bf16", "fp16")
            for offload in (False, True)
        ),
    )
    for accumulation in (1, 2)
    if (
        processes,
        Case(stage=stage, precision=precision, tensor=tensor, accumulation=accumulation, offload=offload),
    )
    not in CASES
]
FACTORED = {"parametrization": "factored"}
ADDITIVE = {"parametrization": "additive"}
FACTORS_ALONE = {"parametrization": "additive", "trained": "factors"}
ADDITIVE_CASES = [
    (2, Case(stage=0, tensor=2), ADDITIVE),
    (2, Case(stage=1, precision="bf16"), FACTORS_ALONE),
    (4, Case(stage=2, tensor=2, precision="fp16", accumulation=2), ADDITIVE),
    (2, Case(stage=3, precision="bf16"), FACTORS_ALONE),
]
ALL_CASES = [
    *((*case, FACTORED) for case in CASES),
    *ADDITIVE_CASES,
    *(pytest.param(*case, FACTORED, marks=pytest.mark.matrix) for case in MATRIX),
    *(
        pytest.param(*case, kind, marks=pytest.mark.matrix)
        for case in (*CASES, *MATRIX)
        for kind in ((ADDITIVE, FACTORS_ALONE) if case in CASES else (ADDITIVE,))
        if (*case, kind) not in ADDITIVE_CASES
    ),
]

States = dict[str, dict[str, Tensor]]


def _uninterrupted(config: ModelConfig, case: Case) -> tuple[list[tuple[float, float]], States]:
    small = SmallRun(config, uniform_ranks(config, 4), case)
    return small.train(STEPS_BEFORE + STEPS_AFTER), small.logical_state()


def _grown_by_nothing(config: ModelConfig, case: Case) -> tuple[list[tuple[float, float]], States]:
    small = SmallRun(config, uniform_ranks(config, 4), case)
    curve = small.train(STEPS_BEFORE)
    small.grow(uniform_ranks(config, 4))
    return curve + small.train(STEPS_AFTER), small.logical_state()


@pytest.mark.parametrize(("processes", "case", "kind"), ALL_CASES)
def test_growth_by_zero_columns_changes_no_bit(processes: int, case: Case, kind: dict[str, str]) -> None:
    layers = "mlp" if case.accumulation == 2 else "all"
    config = small_config("llama", factored_layers=layers, hidden_dropout=0.1, **kind)
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


@pytest.mark.parametrize(("processes", "case", "kind"), ALL_CASES)
def test_growth_keeps_every_old_entry(processes: int, case: Case, kind: dict[str, str]) -> None:
    config = small_config("gpt2" if case.stage == 2 else "llama", **kind)
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


def _grown_along(config: ModelConfig, case: Case, rows: Tensor) -> tuple[States, States]:
    small = SmallRun(config, uniform_ranks(config, 4), case)
    small.train(STEPS_BEFORE)
    before, model = small.logical_state(), small.engine.module
    directions = {}
    for name in model.ranks():
        factor = tensor_layouts(model)[f"{name}.A"]
        whole = rows[:, : factor.full_shape[1]]
        shard = TensorLayout(tuple(whole.shape), factor.dim).shard(whole, tensor_index(), tensor_size())
        directions[name] = shard
    small.grow(uniform_ranks(config, 8), directions)
    return before, small.logical_state()


@pytest.mark.parametrize(
    ("processes", "case", "kind"),
    [(1, Case(stage=0), FACTORED), (2, Case(stage=1, tensor=2), FACTORED), (2, Case(stage=2, tensor=2), ADDITIVE)],
)
def test_directed_rows_come_first_and_the_others_keep_off_them(
    processes: int, case: Case, kind: dict[str, str]
) -> None:
    config = small_config("llama", **kind)
    rows = torch.zeros(2, 512)
    rows[0, :4], rows[1, 4:8] = 0.5, torch.tensor([0.5, -0.5, 0.5, -0.5])
    before, after = run(_grown_along, processes, config, case, rows)[0]
    for name, old in before["master"].items():
        if name.endswith(".A"):
            length = old.norm(dim=1).square().mean().sqrt()
            added = after["master"][name][4:]
            assert torch.allclose(added[:2], length * rows[:, : old.shape[1]], rtol=1e-4, atol=1e-6)
            assert torch.allclose(added @ added.T, length.square() * torch.eye(4), atol=1e-4 * float(length.square()))


@pytest.mark.parametrize(
    ("processes", "case", "kind"),
    [
        *((*case, FACTORED) for case in CASES),
        (2, Case(stage=1, precision="bf16"), ADDITIVE),
        (2, Case(stage=2), FACTORS_ALONE),
    ],
)
def test_memory_after_growth_is_what_the_ranks_predict(processes: int, case: Case, kind: dict[str, str]) -> None:
    """Every parameter of these models is split, or there is one tensor-parallel process, so the sums come out even:
    bytes of parameters on each process, and twelve bytes a trained number for master and moments over all of them, but
    for ZeRO's padding to an even partition."""
    config = small_config("llama", **kind)
    everyone = run(_around_growth, processes, config, case, uniform_ranks(config, 8))
    numbers = total_parameters(config, uniform_ranks(config, 8))
    trained = trained_parameters(config, uniform_ranks(config, 8))
    for _, _, ranks, owned, fresh, _, _ in everyone:
        assert ranks == uniform_ranks(config, 8)
        assert owned == fresh
        shares = case.tensor if case.stage < 3 else processes
        assert owned["parameters"] == numbers // shares * (4 if case.precision == "fp32" else 2)
    state_bytes = sum(result[3]["state"] for result in everyone)
    assert 12 * trained <= state_bytes <= 12 * (trained + 64 * processes)


def _around_truncation(config: ModelConfig, case: Case) -> tuple[States, States, States, list[tuple[float, float]]]:
    small = SmallRun(config, uniform_ranks(config, 6), case)
    small.train(STEPS_BEFORE)
    before = small.logical_state()
    small.grow(uniform_ranks(config, 4))
    after = small.logical_state()
    small.grow(uniform_ranks(config, 6))
    grown = small.logical_state()
    return before, after, grown, small.train(STEPS_AFTER)


@pytest.mark.parametrize(
    ("processes", "case", "parametrization"),
    [
        (1, Case(stage=0), "factored"),
        (2, Case(stage=2), "factored"),
        (2, Case(stage=1, tensor=2, precision="bf16"), "factored"),
        (2, Case(stage=1, tensor=2), "additive"),
        (2, Case(stage=3, offload=True), "factored"),
    ],
)
def test_truncation_keeps_the_best_of_the_product_and_turns_the_moments(
    processes: int, case: Case, parametrization: str
) -> None:
    """Cut from 6 to 4, the product is the best of rank 4, and both factors' first moments have turned with them: what
    is left of B·m_A + m_B·A, the product's own movement, lies in the spans that were kept."""
    config = small_config("llama", parametrization)
    before, after, grown, curve = run(_around_truncation, processes, config, case)[0]
    tolerance = 3e-2 if case.precision == "bf16" else 1e-4  # the basis comes from the 16-bit factors
    for name in uniform_ranks(config, 4):
        A, B, new_A, new_B = (s["master"][f"{name}.{side}"].double() for s in (before, after) for side in "AB")
        U, S, Vt = torch.linalg.svd(B @ A, full_matrices=False)
        best = U[:, :4] * S[:4] @ Vt[:4]
        assert (new_B @ new_A - best).norm() <= tolerance * best.norm() + 1e-9
        m_A, m_B, new_m_A, new_m_B = (s["exp_avg"][f"{name}.{side}"].double() for s in (before, after) for side in "AB")
        # m_B' = m_B T⁻ᵀ and A' = T⁻¹ A, so m_B' A' = m_B T⁻ᵀ T⁻¹ A; and likewise for B.
        T_inverse = new_A @ torch.linalg.pinv(A)
        T = torch.linalg.pinv(B) @ new_B
        assert (new_m_B - m_B @ T_inverse.T).norm() <= 3 * tolerance * new_m_B.norm() + 1e-12
        assert (new_m_A - T.T @ m_A).norm() <= 3 * tolerance * new_m_A.norm() + 1e-12
        for side, turn in (("A", T.T.square()), ("B", T_inverse.T.square())):
            old, new = (s["exp_avg_sq"][f"{name}.{side}"].double() for s in (before, after))
            expected = turn @ old if side == "A" else old @ turn
            assert (new - expected).norm() <= 3 * tolerance * new.norm() + 1e-15
            assert (new >= 0).all()
        assert torch.equal(grown["master"][f"{name}.A"][:4], after["master"][f"{name}.A"])
    assert all(loss == loss for loss, _ in curve)


def _compare(dtype: torch.dtype, changes: list[float]) -> list[tuple[float, str, str]]:
    """Makes each change on the second process alone: what was found, what was printed, and the error."""
    initialize_process_groups(1)
    found = []
    for change in changes:
        expected = torch.linspace(-1, 1, 50).to(dtype)
        shown, moved, message = io.StringIO(), math.nan, ""
        with contextlib.redirect_stderr(shown):
            try:
                moved = _check_logits(expected, expected.float() + (change if dist.get_rank() == 1 else 0.0))
            except RuntimeError as error:
                message = str(error)
        found.append((moved, shown.getvalue(), message))
    return found


@pytest.mark.parametrize(
    ("dtype", "small", "warned"),
    [(torch.float32, 1e-6, None), (torch.bfloat16, 0.02, 0.1), (torch.float16, 0.004, 0.03)],
)
def test_a_growth_that_changes_the_function_is_noticed_by_all(
    dtype: torch.dtype, small: float, warned: float | None
) -> None:
    changes = [small, 0.3, math.nan] + ([] if warned is None else [warned])
    first, second = run(_compare, 2, dtype, changes)
    assert first[0] == second[0] == (pytest.approx(small, rel=0.1), "", "")
    for lost in (1, 2):
        assert "growth changed the logits" in first[lost][2]
        assert first[lost][1:] == second[lost][1:] == ("", first[lost][2])
    if warned is not None:
        assert first[3][::2] == second[3][::2] == (pytest.approx(warned, rel=0.1), "")
        assert first[3][1].startswith("warning: growth changed the logits of a fixed batch by")
        assert first[3][1].count("\n") == 1
        assert second[3][1] == ""  # the first process says it for all


def _freed_before_rebuilding(config: ModelConfig, case: Case) -> tuple[list[str], float | None]:
    """What of the old engine's state, and of parameters that do not stay partitioned, is alive when a new engine is
    built."""
    small = SmallRun(config, uniform_ranks(config, 4), case)
    small.train(1)
    parameters = dict(small.engine.module.named_parameters()) if case.stage < 3 else {}
    held = {f"{one.key} of {one.name}": one.values for one in optimizer_state(small.engine).fragments()} | parameters
    old = {name: StorageWeakRef(values.untyped_storage()) for name, values in held.items()}
    del parameters, held
    alive: list[str] = []
    build = small.new_engine

    def watched(model: EspalierModel) -> DeepSpeedEngine:
        alive.extend(name for name, storage in old.items() if not storage.expired())
        return build(model)

    gc.disable()  # nothing is left to the collector but what an event asks of it
    try:
        plan = RankPlan(1, uniform_ranks(config, 8), row_norms(small.engine.module, list(uniform_ranks(config, 4))))
        small.engine, record = change_ranks(small.engine, plan, rebuild=watched, seed=1, consumed_samples=0)
    finally:
        gc.enable()
    return alive, record.logit_change


@pytest.mark.parametrize("case", [Case(0), Case(1, "bf16"), Case(2), Case(3)], ids=str)
def test_the_old_engine_is_gone_before_a_new_one_is_built(case: Case) -> None:
    alive, logit_change = run(_freed_before_rebuilding, 1, small_config("llama", **FACTORED), case)[0]
    assert alive == []
    assert logit_change is not None
    assert logit_change <= 3e-2


def _disagree() -> str:
    initialize_process_groups(1)
    try:
        _agree_on(RankPlan(3, {"layer": 8 + dist.get_rank()}, {"layer": 1.0}), {"layer": 4})
    except NumericalError as error:
        return str(error)
    return ""


def test_processes_that_disagree_about_a_plan_stop_together() -> None:
    assert all("processes disagree about the growth at step 3" in message for message in run(_disagree, 2))


def _many_events(config: ModelConfig, case: Case, events: int) -> tuple[list[int], list[int], list[int]]:
    left_by_other_tests = live_engines()
    small = SmallRun(config, uniform_ranks(config, 4), case)
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


# Not in 16 bits: on processors with such instructions oneDNN keeps the kernels it compiled for every shape it has seen.
@pytest.mark.parametrize(
    ("case", "kind"),
    [
        (Case(stage=1), FACTORED),
        (Case(stage=3), FACTORED),
        pytest.param(Case(stage=1), FACTORS_ALONE, marks=pytest.mark.matrix),
        pytest.param(Case(stage=2, offload=True), FACTORED, marks=pytest.mark.matrix),
        pytest.param(Case(stage=3, offload=True), FACTORS_ALONE, marks=pytest.mark.matrix),
    ],
)
def test_twenty_events_leave_nothing_behind(case: Case, kind: dict[str, str]) -> None:
    config = small_config("llama", hidden=256, vocabulary=4000, **kind)
    for engines, hooks, resident in run(_many_events, 2, config, case, 20, timeout_seconds=300):
        assert engines == [1] * 20
        assert hooks == [hooks[0]] * 20
        # What the ranks predict for the fifteen events: at most 2 + 2 + 4 + 8 bytes a number (weight, gradient, master,
        # moments). Were any engine kept, it would show as 60 MB an event; glibc keeps some blocks.
        added = total_parameters(config, uniform_ranks(config, 24)) - total_parameters(config, uniform_ranks(config, 9))
        assert resident[-1] - resident[4] < 16 * added + 60e6
