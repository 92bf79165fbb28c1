"""The list of parameters that follows from a config, against the parameters of the model that is built from it."""

import pytest

from model.config import ModelConfig, factored_projections
from model.costs.parameter_shards import ParameterShard, parameter_shards
from model.gpt import build_model
from model.process_groups import initialize_process_groups
from tests.support.distributed import run
from tests.support.parallel_model import small_config

KINDS: list[dict[str, str]] = [
    {"parametrization": "dense"},
    {"parametrization": "factored"},
    {"parametrization": "factored", "factored_layers": "mlp"},
    {"parametrization": "additive"},
    {"parametrization": "additive", "factored_layers": "mlp", "trained": "factors"},
]


def _different_ranks(config: ModelConfig) -> dict[str, int]:
    return {projection.name: 4 + place for place, projection in enumerate(factored_projections(config))}


def _built(configs: list[ModelConfig], tensor: int) -> list[list[ParameterShard]]:
    initialize_process_groups(tensor)
    models = [build_model(config, _different_ranks(config), seed=1) for config in configs]
    return [
        [ParameterShard(name, tuple(p.shape), p.requires_grad) for name, p in model.named_parameters()]
        for model in models
    ]


@pytest.mark.parametrize("tensor", [1, 2])
def test_shards_are_those_of_the_built_model(tensor: int) -> None:
    configs = [small_config(family, **kind) for family in ("llama", "gpt2") for kind in KINDS]
    for built in run(_built, tensor, configs, tensor):
        for config, shards in zip(configs, built, strict=True):
            assert parameter_shards(config, _different_ranks(config), tensor) == shards
