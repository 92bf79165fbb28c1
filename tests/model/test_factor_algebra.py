"""Spans, bases and basis changes from sharded Grams, against plain linear algebra on whole tensors."""

import pytest
import torch
from torch import Tensor

from model.factor_algebra import balanced_basis, in_order_orthonormal, orthonormal, outside
from model.process_groups import initialize_process_groups, tensor_index
from tests.support.distributed import run


def _tall(columns: int, seed: int, size: int = 48) -> Tensor:
    return torch.randn(size, columns, generator=torch.Generator().manual_seed(seed))


def _shard(whole: Tensor, processes: int) -> Tensor:
    return whole.chunk(processes)[tensor_index()]


def _bases(processes: int) -> tuple[Tensor, Tensor, Tensor]:
    initialize_process_groups(processes)
    columns, span = _shard(_tall(6, 1), processes), _shard(_tall(10, 2), processes)
    deficient = torch.cat([columns[:, :3], columns[:, :3]], dim=1)
    return orthonormal(deficient, True), in_order_orthonormal(columns, True), outside(columns, span, True)


@pytest.mark.parametrize("processes", [1, 2])
def test_bases_of_sharded_columns(processes: int) -> None:
    shards = run(_bases, processes, processes)
    deficient, ordered, outer = (torch.cat([shard[place] for shard in shards]) for place in range(3))
    columns, span = _tall(6, 1).double(), _tall(10, 2).double()

    eigenvalues = torch.linalg.eigvalsh(deficient.T @ deficient)
    assert torch.allclose(eigenvalues, torch.tensor([0.0, 0, 0, 1, 1, 1]).double(), atol=1e-9)
    assert torch.allclose(deficient @ deficient.T @ columns[:, :3], columns[:, :3], atol=1e-6)

    expected = torch.linalg.qr(columns).Q
    assert torch.allclose((ordered * expected).sum(0).abs(), torch.ones(6).double(), atol=1e-9)

    basis = torch.linalg.qr(span).Q
    assert torch.allclose(outer, columns - basis @ (basis.T @ columns), atol=1e-9)


def _outside_alone() -> None:
    initialize_process_groups(1)
    columns, span = _tall(4, 3), _tall(4, 3) @ torch.randn(4, 4, generator=torch.Generator().manual_seed(4))
    assert outside(columns, span, True).abs().max() < 1e-6
    assert torch.equal(outside(columns, torch.zeros(48, 5), True), columns.double())


def test_nothing_is_outside_a_span_that_holds_it_and_a_zero_span_holds_nothing() -> None:
    run(_outside_alone, 1)


@pytest.mark.parametrize("kept", [12, 5])
def test_balanced_basis_is_the_truncated_singular_value_decomposition(kept: int) -> None:
    B, A = _tall(12, 5, 40).double(), _tall(12, 6, 30).T.double()
    change = balanced_basis(A @ A.T, B.T @ B, kept)
    new_B, new_A = B @ change.forward, change.inverse @ A
    U, S, Vt = torch.linalg.svd(B @ A)
    assert torch.allclose(new_B @ new_A, U[:, :kept] * S[:kept] @ Vt[:kept], atol=1e-8)
    assert torch.allclose(new_B.T @ new_B, S[:kept].diag(), atol=1e-8)
    assert torch.allclose(new_A @ new_A.T, S[:kept].diag(), atol=1e-8)
    assert torch.allclose(change.inverse @ change.forward, torch.eye(kept).double(), atol=1e-8)


def test_first_moments_follow_the_basis_as_gradients_do() -> None:
    """The gradients of the new factors are those of the old ones under the same change."""
    B, A = _tall(6, 7, 20).double(), _tall(6, 8, 16).T.double()
    G = torch.randn(20, 16, generator=torch.Generator().manual_seed(9)).double()
    change = balanced_basis(A @ A.T, B.T @ B, 4)
    new_B, new_A = (B @ change.forward).requires_grad_(), (change.inverse @ A).requires_grad_()
    ((new_B @ new_A) * G).sum().backward()
    assert new_A.grad is not None
    assert new_B.grad is not None
    assert torch.allclose(new_B.grad, (G @ A.T) @ change.inverse.T, atol=1e-8)
    assert torch.allclose(new_A.grad, change.forward.T @ (B.T @ G), atol=1e-8)
