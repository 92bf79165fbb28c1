"""Initial values: the same for every layout, with the spectrum of the dense draw they stand for."""

import pytest
import torch

from model.config import factored_projections
from model.initialization import cholesky_orthonormal, gaussian_singular_values, initial_factor, new_directions
from tests.support.distributed import run
from tests.support.parallel_model import initial_tensors, small_config


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_initial_values_do_not_depend_on_the_layout(family: str) -> None:
    config = small_config(family, "factored")
    ranks = {projection.name: 8 for projection in factored_projections(config)}
    alone = run(initial_tensors, 1, config, ranks, 1)[0]
    for processes in (2, 4):
        split = run(initial_tensors, processes, config, ranks, processes)[0]
        for name, tensor in alone.items():
            assert torch.allclose(split[name], tensor, rtol=1e-5, atol=1e-7), name


@pytest.mark.parametrize(("rows", "columns"), [(256, 256), (1024, 256), (192, 512)])
def test_singular_values_are_those_of_a_gaussian_draw(rows: int, columns: int) -> None:
    count = min(rows, columns) // 2
    draw = torch.linalg.svdvals(0.02 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)))
    predicted = gaussian_singular_values(rows, columns, count, 0.02)
    assert torch.allclose(predicted, draw[:count], rtol=0.03)


def test_factors_multiply_to_the_predicted_spectrum() -> None:
    config = small_config("llama", "factored", hidden=64)
    for projection in factored_projections(config)[:4]:
        A = initial_factor(config, projection, "A", 16, seed=1)
        B = initial_factor(config, projection, "B", 16, seed=1)
        std = config.initial_std / (2 * config.layers) ** 0.5 if projection.residual else config.initial_std
        expected = gaussian_singular_values(projection.out_features, projection.in_features, 16, std)
        assert torch.allclose(torch.linalg.svdvals(B @ A)[:16], expected, rtol=1e-4)
        assert torch.allclose(A.norm(dim=1), B.norm(dim=0), rtol=1e-4)  # split by square roots


def test_names_and_steps_give_different_draws() -> None:
    first = new_directions("a", 10, 4, 32, 1.0, seed=1)
    assert torch.equal(first, new_directions("a", 10, 4, 32, 1.0, seed=1))
    assert torch.allclose(first @ first.T, torch.eye(4), atol=1e-5)
    for other in (
        new_directions("b", 10, 4, 32, 1.0, seed=1),
        new_directions("a", 11, 4, 32, 1.0, seed=1),
        new_directions("a", 10, 4, 32, 1.0, seed=2),
    ):
        assert not torch.allclose(first, other)


@pytest.mark.parametrize(("size", "count"), [(64, 5), (300, 128), (48, 48)])
def test_a_gpu_draws_the_same_columns_but_for_their_signs(size: int, count: int) -> None:
    drawn = torch.randn(size, count, generator=torch.Generator().manual_seed(size))
    host, found = torch.linalg.qr(drawn).Q, cholesky_orthonormal(drawn)
    assert torch.allclose(found.t() @ found, torch.eye(count), atol=1e-5)
    assert torch.allclose(found * (host * found).sum(dim=0).sign(), host, atol=2e-4)
