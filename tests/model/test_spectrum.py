"""Singular values from sharded Grams against `svdvals` of the full product."""

import pytest
import torch
from torch import Tensor, nn

from model.process_groups import initialize_process_groups, tensor_index
from model.sharded_norm import mark_sharded
from model.sharding import TensorLayout
from model.spectrum import grams, row_norm, singular_values
from tests.distributed import run


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


def _from_shards(case: str, processes: int) -> tuple[Tensor, float]:
    initialize_process_groups(processes)
    A, B = _factors(case)
    shard_A = nn.Parameter(TensorLayout(tuple(A.shape), 1).shard(A, tensor_index(), processes).contiguous())
    shard_B = nn.Parameter(TensorLayout(tuple(B.shape), 0, 2).shard(B, tensor_index(), processes))
    mark_sharded(shard_A, dim=1)
    mark_sharded(shard_B, dim=0, stride=2)
    return singular_values(grams(shard_A, shard_B)), row_norm(shard_A)


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("case", ["plain", "decaying", "grown", "repeated"])
def test_singular_values_equal_svdvals(case: str, processes: int) -> None:
    A, B = _factors(case)
    expected = torch.linalg.svdvals(B.double() @ A.double())[:24]
    for found, norm in run(_from_shards, processes, case, processes):
        large = expected > 1e-4 * expected[0]
        assert ((found - expected).abs()[large] <= 1e-6 * expected[large]).all()
        assert (found[~large] <= 2e-4 * expected[0]).all()
        assert norm == pytest.approx(float(A.norm(dim=1).square().mean().sqrt()), rel=1e-6)
