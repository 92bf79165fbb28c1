"""The collectives of a training step, counted, against the formulas of `model/costs/communication.py`, exactly."""

from collections import Counter

import pytest
import torch

from model.config import ModelConfig, factored_projections
from model.costs.communication import (
    Collective,
    StepCollectives,
    gradient_and_parameter_bytes,
    tensor_collectives,
    total,
)
from model.gpt import build_model
from model.process_groups import initialize_process_groups
from pretrain.engine.build import parameter_groups
from tests.support.distributed import run
from tests.support.parallel_engine import OPTIMIZER, Case, SmallRun
from tests.support.parallel_model import positions_of, small_config, some_tokens
from tools.benchmarks.collective_counter import CollectiveCounter

SEQUENCES = 3
SCALAR_BYTES = 8
"""Gradient norm, overflow and the test's own loss travel as single numbers."""
FORMS = {"factored": "all", "factored mlp": "mlp", "additive": "all", "additive mlp": "mlp", "dense": "all"}


def _config(family: str, form: str, **changes: object) -> ModelConfig:
    return small_config(family, form.split()[0], FORMS[form], **changes)


def _different_ranks(config: ModelConfig) -> dict[str, int]:
    """So that no two layers of one kind could be taken for each other."""
    return {projection.name: 4 + place for place, projection in enumerate(factored_projections(config))}


def _counted(config: ModelConfig, dtype: torch.dtype, tensor_parallel: int) -> StepCollectives:
    initialize_process_groups(tensor_parallel)
    model = build_model(config, _different_ranks(config), seed=1).to(dtype)
    tokens, labels = some_tokens(config, SEQUENCES)
    with CollectiveCounter() as forward:
        loss = model(tokens, positions_of(tokens), None, labels=labels).mean()
    with CollectiveCounter() as backward:
        loss.backward()
    return StepCollectives(forward.collectives, backward.collectives)


def _check(config: ModelConfig, dtype: torch.dtype, processes: int, tensor_parallel: int) -> None:
    tokens = SEQUENCES * config.sequence_length
    expected = tensor_collectives(config, _different_ranks(config), tensor_parallel, tokens, dtype.itemsize)
    for counted in run(_counted, processes, config, dtype, tensor_parallel):
        assert counted.forward == expected.forward
        assert Counter(counted.backward) == Counter(expected.backward)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_step_sends_what_the_formula_says(family: str, form: str) -> None:
    _check(_config(family, form), torch.float32, 2, 2)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_sixteen_bits_send_statistics_as_two_parts(family: str) -> None:
    _check(_config(family, "factored mlp"), torch.bfloat16, 2, 2)


@pytest.mark.parametrize("form", ["factored", "factored mlp", "additive mlp"])
def test_fewer_query_groups_than_processes_cost_a_gather(form: str) -> None:
    _check(_config("llama", form, query_groups=1), torch.float32, 2, 2)


def test_frozen_layers_below_the_first_factor_send_no_gradient() -> None:
    _check(_config("llama", "additive mlp", trained="factors"), torch.float32, 2, 2)


@pytest.mark.matrix
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("processes", "tensor_parallel"), [(1, 1), (2, 1), (4, 2), (4, 4)])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_layout_sends_what_the_formula_says(
    family: str, form: str, processes: int, tensor_parallel: int, dtype: torch.dtype
) -> None:
    _check(_config(family, form, query_groups=0), dtype, processes, tensor_parallel)


def test_a_factored_layer_has_one_collective_in_each_direction() -> None:
    """The formula itself: a layer more is four all-reduces of the bottleneck's width forward, and four backward."""
    config = small_config("llama", layers=1)
    more = config.model_copy(update={"layers": 2})
    ranks = {projection.name: 8 for projection in factored_projections(more)}
    one, two = (tensor_collectives(c, ranks, 2, 48, 4) for c in (config, more))
    plain, normed = 48 * 8 * 4, 48 * (8 + 2) * 4
    added = Counter(two.forward) - Counter(one.forward)
    assert added == Counter(
        {Collective("all_reduce", "tensor", plain): 2, Collective("all_reduce", "tensor", normed): 2}
    )
    assert Counter(two.backward) - Counter(one.backward) == Counter({Collective("all_reduce", "tensor", plain): 4})


def _engine_step(config: ModelConfig, case: Case) -> tuple[list[int], list[Collective]]:
    """Sizes of the optimizer's groups and the collectives of a whole training step, not the first."""
    small_run = SmallRun(config, _different_ranks(config), case)
    groups = parameter_groups(small_run.engine.module, OPTIMIZER)
    small_run.train(1)
    with CollectiveCounter() as counter:
        small_run.train(1)
    return [sum(p.numel() for p in group["params"]) for group in groups], counter.collectives


def _check_engine(config: ModelConfig, case: Case, processes: int) -> None:
    element_bytes = 4 if case.precision == "fp32" else 2
    tokens = case.micro_batch * config.sequence_length
    micro_step = tensor_collectives(config, _different_ranks(config), case.tensor, tokens, element_bytes)
    for group_sizes, collectives in run(_engine_step, processes, config, case):
        data = gradient_and_parameter_bytes(
            case.stage, group_sizes, processes // case.tensor, case.accumulation, element_bytes
        )
        sent = [c for c in collectives if c.bytes > SCALAR_BYTES]
        assert {kind: total(sent, kind, "data").bytes for kind in data} == data
        assert total(sent, group="data").bytes == sum(data.values())
        tensor = Counter(c for c in sent if c.group == "tensor")
        assert tensor == Counter((micro_step.forward + micro_step.backward) * case.accumulation)
        assert total(sent, group="other").count == 0


@pytest.mark.parametrize("stage", [1, 2])
def test_data_parallel_bytes_of_a_step_follow_the_stage(stage: int) -> None:
    _check_engine(small_config("llama"), Case(stage, accumulation=2), 2)


@pytest.mark.matrix
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("form", ["factored", "additive", "dense"])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_step_of_the_engine_sends_what_both_formulas_say(
    stage: int, form: str, precision: str, accumulation: int
) -> None:
    if stage == 0 and precision == "bf16":
        pytest.skip("stage 0 trains in fp32 only")
    _check_engine(_config("gpt2", form), Case(stage, precision, tensor=2, accumulation=accumulation), 4)
