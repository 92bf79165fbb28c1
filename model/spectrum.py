"""Singular values and norms of a sharded product B·A from its rank x rank Gram matrices.

    s² = eig(G_A^½ G_B G_A^½),     G_A = A Aᵀ,  G_B = Bᵀ B

A is split along its columns and B along its rows, so both Grams are sums of local ones: one all-reduce of 2·rank²
numbers gives every process the singular values without forming B·A. They are accumulated in fp64, for squaring halves
the digits, and taken apart by `eigh`, for they are only semi-definite: fresh columns of B are zero.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from model.process_groups import tensor_group, tensor_size


@dataclass(frozen=True)
class Grams:
    """`A Aᵀ` and `Bᵀ B`, each `(rank, rank)` in fp64, summed over all shards."""

    of_A: Tensor
    of_B: Tensor


def grams(A: Tensor, B: Tensor) -> Grams:
    """Gram matrices of the full factors from the shards `A (rank, in/tp)` and `B (out/tp, rank)`; a collective."""
    local_A, local_B = A.detach().double(), B.detach().double()
    both = torch.stack([local_A @ local_A.t(), local_B.t() @ local_B])
    if tensor_size() > 1:
        dist.all_reduce(both, group=tensor_group())
    return Grams(both[0], both[1])


def _root(gram: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(gram)
    return vectors * values.clamp_min(0.0).sqrt() @ vectors.t()


def singular_values(product: Grams) -> Tensor:
    """All `(rank,)` singular values of B·A, largest first, in fp64."""
    root = _root(product.of_A)
    return torch.linalg.eigvalsh(root @ product.of_B @ root).clamp_min(0.0).sqrt().flip(0)


def row_norm(A: Tensor) -> float:
    """Root mean square of the norms of the full A's rows, from `A (rank, in/tp)`: the size of a new row; a
    collective."""
    square = A.detach().double().square().sum()
    if tensor_size() > 1:
        dist.all_reduce(square, group=tensor_group())
    return float((square / A.shape[0]).sqrt())
