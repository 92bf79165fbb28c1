"""Copies of a parameter that differ by one bit are found, wherever copies are made."""

import pytest
import torch
import torch.distributed as dist

from model.config import ModelConfig
from pretrain.engine.replica_check import check_replicas
from pretrain.engine.zero3 import held
from pretrain.errors import NumericalError
from tests.support.distributed import run
from tests.support.parallel_engine import Case, SmallRun, uniform_ranks
from tests.support.parallel_model import small_config

pytestmark = pytest.mark.faults


def _found(config: ModelConfig, case: Case, drifting: str | None) -> str:
    """The error's message after two steps, with one bit of parameter `drifting` flipped on process 1."""
    small = SmallRun(config, uniform_ranks(config, 8) if config.parametrization != "dense" else {}, case)
    small.train(2)
    for name, parameter in small.engine.module.named_parameters():
        if name == drifting and dist.get_rank() == 1:
            bits = held(parameter)[1].view(torch.int16 if case.precision == "bf16" else torch.int32)
            bits[0] ^= 1
    try:
        check_replicas(small.engine.module)
    except NumericalError as error:
        return str(error)
    return ""


SPLIT, REPLICATED = "decoder.layers.1.mlp.linear_fc2.B", "decoder.layers.0.self_attention.linear_proj.bias"


@pytest.mark.parametrize(
    ("case", "parametrization", "drifting"),
    [
        (Case(0), "factored", SPLIT),
        (Case(1, "bf16"), "factored", SPLIT),
        (Case(1, tensor=2), "additive", REPLICATED),
        (Case(3, tensor=2), "dense", REPLICATED),
    ],
    ids=str,
)
def test_a_flipped_bit_is_found_and_named(case: Case, parametrization: str, drifting: str) -> None:
    config = small_config("gpt2", parametrization)
    assert run(_found, 2, config, case, None) == ["", ""]
    for said in run(_found, 2, config, case, drifting):
        assert said.startswith(f"the copies of {drifting} differ between processes")


@pytest.mark.parametrize("case", [Case(1, tensor=2), Case(3)], ids=str)
def test_parts_are_no_copies(case: Case) -> None:
    assert run(_found, 2, small_config("gpt2"), case, SPLIT) == ["", ""]
