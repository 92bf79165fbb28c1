"""From any parametrization to any other: names and shapes, the same function, and the nearest product."""

import pytest
import torch

from model.config import ModelConfig, factored_projections
from model.huggingface.dense import FromDense, dense_tensor, parameter_shapes, truncated_factors
from tests.support.parallel_model import small_config
from tests.support.reference import random_tensors, reference_logits, tensor_shapes

VARIANTS = [
    ("dense", "all"),
    ("factored", "all"),
    ("factored", "mlp"),
    ("additive", "all"),
    ("additive", "mlp"),
]


def _ranks(config: ModelConfig, rank: int) -> dict[str, int]:
    return {projection.name: rank for projection in factored_projections(config)}


@pytest.mark.parametrize(("parametrization", "factored_layers"), VARIANTS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_names_and_shapes_are_the_models(family: str, parametrization: str, factored_layers: str) -> None:
    config = small_config(family, parametrization, factored_layers)
    assert parameter_shapes(config, _ranks(config, 5)) == tensor_shapes(config, _ranks(config, 5))


@pytest.mark.parametrize(("parametrization", "factored_layers"), VARIANTS)
@pytest.mark.parametrize(
    "source", ["factored", *(pytest.param(s, marks=pytest.mark.matrix) for s in ("dense", "additive"))]
)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_parametrization_becomes_every_other(
    family: str, source: str, parametrization: str, factored_layers: str
) -> None:
    before = small_config(family, source)
    tensors = random_tensors(before, _ranks(before, 6), seed=2)

    def read_dense(name: str) -> torch.Tensor:
        return dense_tensor(before, _ranks(before, 6), tensors.__getitem__, name)

    after = small_config(family, parametrization, factored_layers)
    ranks = _ranks(after, 32)  # hidden: every product is whole
    made = dict(zip(parameter_shapes(after, ranks), FromDense(after, ranks, read_dense, 7).tensors(), strict=True))
    tokens = torch.randint(before.vocabulary, (2, 16), generator=torch.Generator().manual_seed(4))
    expected = reference_logits(before, _ranks(before, 6), tensors, tokens)
    torch.testing.assert_close(reference_logits(after, ranks, made, tokens), expected, rtol=0, atol=1e-4)


def test_truncation_is_the_nearest_product_of_its_rank() -> None:
    weight = torch.randn(20, 12, generator=torch.Generator().manual_seed(1))
    values = torch.linalg.svdvals(weight)
    A, B, kept = truncated_factors(weight, 5)
    assert (A.shape, B.shape) == ((5, 12), (20, 5))
    error = (weight - B @ A).square().sum()
    torch.testing.assert_close(error, values[5:].square().sum())
    assert kept == pytest.approx(float(1 - error / weight.square().sum()), abs=1e-6)
    torch.testing.assert_close(A @ A.t(), torch.diag(values[:5]), atol=1e-5, rtol=0)
    torch.testing.assert_close(B.t() @ B, torch.diag(values[:5]), atol=1e-5, rtol=0)
    assert truncated_factors(torch.zeros(4, 3), 2)[2] == 1.0


def test_energy_is_told_for_truncated_layers_alone() -> None:
    for parametrization, layers in (("factored", 4), ("additive", 0), ("dense", 0)):
        config = small_config("llama", parametrization, "mlp")
        dense = config.model_copy(update={"parametrization": "dense"})
        tensors = random_tensors(dense, {}, seed=2)
        conversion = FromDense(config, _ranks(config, 3), tensors.__getitem__, 7)
        assert len(list(conversion.tensors())) == len(parameter_shapes(config, _ranks(config, 3)))
        assert len(conversion.kept_energy) == layers
        assert all(0.0 < share < 1.0 for share in conversion.kept_energy.values())
