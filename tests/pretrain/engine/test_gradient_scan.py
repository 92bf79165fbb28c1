"""Steps by one norm of all gradients are skipped and clipped as DeepSpeed's own steps are."""

import inspect
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import pytest
import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils.config import DeepSpeedThroughputTimerConfig
from torch import Tensor, distributed
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain.engine import gradient_scan
from pretrain.engine.gradient_scan import TIMERS_OFF, list_norms, squared_norm
from tests.support.distributed import run
from tests.support.parallel_engine import Case, SmallRun, uniform_ranks
from tests.support.parallel_model import small_config

STEPS = 5
SHARDED, REPLICATED = "decoder.layers.1.mlp.linear_fc2.B", "decoder.layers.0.self_attention.linear_proj.bias"
Planted = Mapping[int, tuple[int, str, float]]
"""For each step: the process whose gradient gets a wrong element, the parameter, and the element's value."""
PLANTED = {1: (0, SHARDED, math.nan), 3: (1, SHARDED, -math.inf), 4: (1, REPLICATED, math.inf)}
LOOKS = (
    "deepspeed.runtime.zero.stage_1_and_2.has_inf_or_nan",
    "deepspeed.runtime.zero.stage3.has_inf_or_nan",
    "deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer.get_grad_norm_direct",
    "deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer.complete_grad_norm_calculation_for_cpu_offload",
    "deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3.get_grad_norm_direct",
    "deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3.complete_grad_norm_calculation_for_cpu_offload",
    "deepspeed.runtime.engine.clip_grad_norm_",
)
"""Functions in which DeepSpeed looks at gradients one by one."""


def _steps(case: Case, planted: Planted, theirs: bool) -> tuple[list[tuple[float, bool, float]], dict[str, Tensor]]:
    """Norm, whether the step was taken, and loss scale of each step; and the masters at the end. `theirs`: without our
    scan."""
    config = small_config("gpt2")
    with ExitStack() as stack:
        if theirs:
            stack.enter_context(patch("pretrain.engine.build.attach"))
        else:
            for name in LOOKS:
                stack.enter_context(patch(name, side_effect=AssertionError(name)))
        small = SmallRun(config, uniform_ranks(config, 8), case)
        found = []
        for step in range(STEPS):
            process, name, value = planted.get(step, (-1, SHARDED, 0.0))
            hook = small.engine.module.get_parameter(name).register_hook(lambda grad, value=value: _with(grad, value))
            if process != distributed.get_rank():
                hook.remove()
            ((_, norm),) = small.train(1)
            hook.remove()
            scale = float(getattr(small.engine.optimizer, "cur_scale", 1.0))
            found.append((norm, small.engine.was_step_applied(), scale))
        return found, small.logical_state()["master"]


def _with(gradient: Tensor, value: float) -> Tensor:
    wrong = gradient.clone()
    wrong.view(-1)[0] = value
    return wrong


@pytest.mark.parametrize(
    ("processes", "case", "planted"),
    [
        (1, Case(0), {}),
        (1, Case(1, "bf16"), {1: (0, SHARDED, math.nan)}),
        (1, Case(3, "fp16", accumulation=2), {1: (0, SHARDED, math.inf)}),
        (2, Case(0), {}),
        (2, Case(0, tensor=2), {}),
        (2, Case(1, "fp32", accumulation=2), PLANTED),
        (2, Case(1, "bf16", tensor=2), PLANTED),
        (2, Case(2, "fp16"), PLANTED),
        (2, Case(3, "bf16"), PLANTED),
        (3, Case(1, "bf16"), PLANTED),  # the last process's partitions end in zeros
        (3, Case(2, "bf16"), PLANTED),
        (3, Case(3, "bf16"), PLANTED),
        (2, Case(2, "bf16", offload=True, accumulation=2), PLANTED),
        (2, Case(3, "bf16", offload=True), PLANTED),
    ],
    ids=str,
)
def test_steps_are_deepspeeds(processes: int, case: Case, planted: Planted) -> None:
    ours, theirs = (run(_steps, processes, case, planted, kind) for kind in (False, True))
    for (steps, masters), (their_steps, their_masters) in zip(ours, theirs, strict=True):
        assert [step[1:] for step in steps] == [step[1:] for step in their_steps]
        assert [taken for _, taken, _ in steps] == [step not in planted for step in range(STEPS)]
        for (norm, taken, _), (their_norm, _, _) in zip(steps, their_steps, strict=True):
            assert math.isclose(norm, their_norm, rel_tol=1e-3)
            assert math.isfinite(norm) == taken
        # An element moves by about 2e-3 per step. How far one rounding of the norm spreads in five steps depends on the
        # precision. The gradient of a key's bias is 0, and Adam turns its noise into steps.
        tolerance = 1e-6 if case.precision == "fp32" else 2e-4
        for name, master in masters.items():
            if not name.endswith("linear_qkv.bias"):
                torch.testing.assert_close(master, their_masters[name], rtol=0.0, atol=tolerance)


class _Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not any(one.alias_info and not one.alias_info.is_write for one in func._schema.returns)
        return func(*args, **(kwargs or {}))


def _operators_of_a_step(case: Case, layers: int) -> int:
    config = small_config("gpt2").model_copy(update={"layers": layers})
    small = SmallRun(config, uniform_ranks(config, 8), case)
    small.train(1)
    operators = _Operators()
    step = small.engine.step

    def counted() -> None:
        with operators:
            squared_norm(small.engine)
            step()

    with patch.object(small.engine, "step", counted):
        small.train(1)
    return operators.count


@pytest.mark.parametrize("stage", [1, 2])
def test_a_step_takes_as_many_operators_for_more_parameters(stage: int) -> None:
    few, more = (run(_operators_of_a_step, 1, Case(stage, "bf16"), layers)[0] for layers in (1, 3))
    assert few == more <= 100


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_norms_are_finite_where_all_elements_are(dtype: torch.dtype) -> None:
    largest = torch.full((3, 5), torch.finfo(dtype).max, dtype=dtype)
    tensors = [largest, torch.full((7,), torch.finfo(dtype).tiny, dtype=dtype), torch.zeros(0, dtype=dtype)]
    norms = torch.stack(list_norms(tensors))
    expected = [float(tensor.double().norm()) for tensor in tensors]
    assert norms.isfinite().all()
    assert norms[1] > 0
    torch.testing.assert_close(norms, torch.tensor(expected, dtype=torch.float64))
    for wrong in (math.nan, math.inf, -math.inf):
        assert not torch.stack(list_norms([_with(tensor, wrong) for tensor in tensors[:2]])).isfinite().any()


ADDED = {"squared_norm", "_norm", "_leaves_as_is"}


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (gradient_scan._Stage1And2, DeepSpeedZeroOptimizer),
        (gradient_scan._Stage3, DeepSpeedZeroOptimizer_Stage3),
    ],
)
def test_deepspeed_has_the_methods_that_are_replaced(ours: type, theirs: type) -> None:
    """If a release of DeepSpeed moved one, it would look at gradients by itself again, and only the time would show
    it."""
    replaced = {**vars(gradient_scan._Scanned), **vars(ours)}
    names = [name for name, value in replaced.items() if inspect.isfunction(value) and name not in ADDED]
    assert len(names) >= 4
    for name in names:
        assert _arguments(replaced[name]) == _arguments(getattr(theirs, name)), name


def _arguments(method: Any) -> Sequence[str]:
    function = inspect.getclosurevars(method).nonlocals.get("func", method)  # within DeepSpeed's instrument_w_nvtx
    return list(inspect.signature(function).parameters)


def test_deepspeed_has_the_engine_method_and_the_setting() -> None:
    assert _arguments(DeepSpeedEngine.clip_fp32_gradients) == ["self"]
    assert DeepSpeedThroughputTimerConfig(**TIMERS_OFF["timers"]["throughput"]).enabled is False
