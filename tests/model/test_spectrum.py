"""Singular values from sharded Grams against `svdvals` of the full product."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from model.layers.sharded_norm import mark_sharded
from model.process_groups import initialize_process_groups, tensor_index
from model.sharding import TensorLayout
from model.spectrum import Grams, grams, singular_values
from tests.support.distributed import run


def _factors(case: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    A, B = torch.randn(24, 64, generator=generator), torch.randn(96, 24, generator=generator)
    if case == "decaying":
        A = A * torch.logspace(0, -3, 24).unsqueeze(1)
    if case == "grown":  # fresh columns of B are zero: the Grams are only semi-definite
        B = torch.cat([B[:, :16], torch.zeros(96, 8)], dim=1)
    if case == "repeated":
        A = torch.cat([A[:12], A[:12]])
    return A, B


def _from_shards(case: str, processes: int) -> Tensor:
    initialize_process_groups(processes)
    A, B = _factors(case)
    shard_A = nn.Parameter(TensorLayout(tuple(A.shape), 1).shard(A, tensor_index(), processes).contiguous())
    shard_B = nn.Parameter(TensorLayout(tuple(B.shape), 0, 2).shard(B, tensor_index(), processes))
    mark_sharded(shard_A, dim=1)
    mark_sharded(shard_B, dim=0, stride=2)
    return singular_values([grams(shard_A, shard_B)])[0]


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("case", ["plain", "decaying", "grown", "repeated"])
def test_singular_values_equal_svdvals(case: str, processes: int) -> None:
    A, B = _factors(case)
    expected = torch.linalg.svdvals(B.double() @ A.double())[:24]
    for found in run(_from_shards, processes, case, processes):
        large = expected > 1e-4 * expected[0]
        assert ((found - expected).abs()[large] <= 1e-6 * expected[large]).all()
        assert (found[~large] <= 2e-4 * expected[0]).all()


def _batch() -> list[Grams]:
    """Grams of products, three ranks in turn. In some, rows of A are dependent: Cholesky's factor does not exist."""
    generator, products = torch.Generator().manual_seed(4), []
    for place in range(9):
        rank = 5 + place % 3
        A, B = torch.randn(rank, 16, generator=generator), torch.randn(12, rank, generator=generator)
        if place in (1, 4):
            A[-1] = A[0]
            A[-2] = 0.0
        products.append(Grams((A @ A.t()).double(), (B.t() @ B).double()))
    return products


def test_a_batch_has_the_values_of_each_alone() -> None:
    products = _batch()
    for product, found in zip(products, singular_values(products), strict=True):
        assert torch.allclose(found, singular_values([product])[0], rtol=1e-9, atol=1e-7)
        squares = torch.linalg.eigvals(product.of_A @ product.of_B).real.clamp_min(0.0).sort(descending=True).values
        assert torch.allclose(found, squares.sqrt(), rtol=1e-5, atol=1e-2)


def test_no_products_have_no_values() -> None:
    assert singular_values([]) == []


class _Counted(TorchDispatchMode):
    """What a GPU makes the host wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        self.calls[function._schema.name.removeprefix("aten::")] += 1
        return function(*arguments, **(named or {}))


def test_a_batch_is_solved_by_rank() -> None:
    regular = [product for place, product in enumerate(_batch()) if place not in (1, 4)]
    with _Counted() as counted:
        singular_values(regular)
    assert counted.calls["_linalg_eigh"] == counted.calls["linalg_cholesky_ex"] == 3
    assert counted.calls["_local_scalar_dense"] == 0
