"""The adapters against DeepSpeed's own public view of masters and moments, on every supported optimizer class."""

from types import SimpleNamespace

import pytest
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch import Tensor

from model.config import ModelConfig
from pretrain.checkpoint.format import KEYS
from pretrain.engine.optimizer_state import optimizer_state
from pretrain.engine.zero3 import gathered, shape_of
from tests.support.distributed import run
from tests.support.parallel_engine import Case, SmallRun, uniform_ranks, whole_states
from tests.support.parallel_model import small_config

ZERO_CASES = [
    (1, Case(stage=1)),
    (2, Case(stage=1, precision="bf16")),
    (2, Case(stage=2, precision="fp16")),
    (4, Case(stage=2, tensor=2)),
    (4, Case(stage=1, tensor=2, precision="fp16")),
    (2, Case(stage=3)),
    (4, Case(stage=3, tensor=2, precision="bf16")),
    (2, Case(stage=3, precision="fp16", offload=True)),
    (2, Case(stage=1, offload=True)),
    (4, Case(stage=2, tensor=2, precision="bf16", offload=True)),
]


def _both_views(config: ModelConfig, case: Case) -> list[tuple[str, str, Tensor, Tensor]]:
    small = SmallRun(config, uniform_ranks(config, 4), case)
    optimizer_state(small.engine)  # makes the moments, so that DeepSpeed links those of all parameter groups
    small.train(2)
    states, views = whole_states(small.engine), []
    for name, parameter in small.engine.module.named_parameters():
        ours = states[name]
        theirs = {"master": safe_get_full_fp32_param(parameter)}
        theirs |= {key: safe_get_full_optimizer_state(parameter, key) for key in KEYS if key != "master"}
        views += [(name, key, ours[key], theirs[key]) for key in KEYS]
    return views


@pytest.mark.parametrize(("processes", "case"), ZERO_CASES)
def test_gathered_states_are_what_deepspeed_says(processes: int, case: Case) -> None:
    for views in run(_both_views, processes, small_config("gpt2", "factored", "mlp"), case):
        assert len(views) > 60
        for name, key, ours, theirs in views:
            assert torch.equal(ours, theirs), f"{key} of {name}"
            if key == "exp_avg_sq":
                assert ours.any(), f"{name} has learned nothing in two steps"


def _load_marked_values(config: ModelConfig, case: Case) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Parameters, masters and second moments after loading values that tell every entry apart."""
    small = SmallRun(config, uniform_ranks(config, 4), case)
    state = optimizer_state(small.engine)
    for place, (name, parameter) in enumerate(small.engine.module.named_parameters()):
        shape = shape_of(parameter)
        ramp = torch.arange(shape.numel(), dtype=torch.float32).view(shape) / 1024 + place
        state.load(name, {"master": ramp, "exp_avg": ramp + 0.25, "exp_avg_sq": ramp + 0.5})
    state.finish_loading()
    state.load_counters(state.counters() | {"adam_step": 17.0})
    states = whole_states(small.engine)
    assert optimizer_state(small.engine).counters()["adam_step"] == 17.0
    found = []
    for name, parameter in small.engine.module.named_parameters():
        with gathered([parameter]):
            found.append((parameter.detach().clone(), states[name]["master"], states[name]["exp_avg_sq"]))
    return found


@pytest.mark.parametrize(("processes", "case"), [(2, Case(stage=0)), *ZERO_CASES])
def test_loaded_values_arrive_where_they_belong(processes: int, case: Case) -> None:
    for found in run(_load_marked_values, processes, small_config("llama", "factored"), case):
        for place, (parameter, master, second) in enumerate(found):
            ramp = torch.arange(master.numel(), dtype=torch.float32).view(master.shape) / 1024 + place
            assert torch.equal(master, ramp)
            assert torch.equal(second, ramp + 0.5)
            assert torch.equal(parameter, ramp.to(parameter.dtype))


def test_an_unknown_optimizer_class_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match="no adapter for optimizer class SGD"):
        optimizer_state(SimpleNamespace(optimizer=torch.optim.SGD([torch.zeros(1)])))
