"""Singular values and norms of a sharded product B·A from its rank x rank Gram matrices.

    s² = eig(Lᵀ G_B L),     G_A = A Aᵀ = L Lᵀ,  G_B = Bᵀ B

A is split along its columns and B along its rows, so both Grams are sums of local ones (but for the factor of an
additive layer that every process holds whole): one all-reduce of 2·rank² numbers gives every process the singular
values without forming B·A. They are accumulated in fp64, for squaring halves the digits. L is Cholesky's factor, or,
where rows of A are dependent and G_A is only semi-definite, its symmetric root; G_B may always be singular, as fresh
columns of B are zero.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from model.factor_algebra import is_sharded, summed, symmetric_root
from model.process_groups import tensor_group, tensor_size
from model.sharding import TensorLayout

SOLVER_MATRICES = 8
"""Matrices `(rank, rank)` in fp64 that `singular_values` holds for a product: its Grams, both again in a batch,
Cholesky's factor, two products of them, and what the eigenvalue problem works in."""


@dataclass(frozen=True)
class Grams:
    """`A Aᵀ` and `Bᵀ B`, each `(rank, rank)` in fp64, summed over all shards."""

    of_A: Tensor
    of_B: Tensor


def grams(A: Tensor, B: Tensor) -> Grams:
    """Gram matrices of the full factors from parameters `A (rank, in/tp)` and `B (out/tp, rank)`, or whichever of them
    is whole on every process; a collective."""
    return _grams(A.detach().double(), B.detach().double(), is_sharded(A), is_sharded(B))


def update_grams(A: Tensor, B: Tensor, initial_A: Tensor, initial_B: Tensor) -> Grams:
    """Grams of `[A; A₀]` and `[B, -B₀]`, whose product is the cumulative update B·A - B₀·A₀; a collective."""
    stacked_A = torch.cat([A.detach().double(), initial_A.to(A.device).double()])
    stacked_B = torch.cat([B.detach().double(), -initial_B.to(B.device).double()], dim=1)
    return _grams(stacked_A, stacked_B, is_sharded(A), is_sharded(B))


def _grams(A: Tensor, B: Tensor, sharded_A: bool, sharded_B: bool) -> Grams:
    of_A, of_B = _gram(A.t()), _gram(B)
    if sharded_A and sharded_B:
        of_A, of_B = summed(torch.stack([of_A, of_B]), True)
        return Grams(of_A, of_B)
    return Grams(summed(of_A, sharded_A), summed(of_B, sharded_B))


def _gram(columns: Tensor) -> Tensor:
    """`Xᵀ X` of `columns (n, rank)`. It is symmetric, and three of its four blocks give the other; torch has no
    syrk."""
    first, second = columns.tensor_split(2, dim=1)
    half = first.shape[1]
    gram = columns.new_empty(columns.shape[1], columns.shape[1])
    gram[:half] = first.t() @ columns
    gram[half:, half:] = second.t() @ second
    gram[half:, :half] = gram[:half, half:].t()
    return gram


def singular_values(products: Sequence[Grams]) -> list[Tensor]:
    """All `(rank,)` singular values of each B·A, largest first, in fp64.

    Those of equal rank are solved together, for a GPU: there one small eigenvalue problem takes as long as a batch of
    them, and the host waits once for all Cholesky factors and once for every rank. It takes `SOLVER_MATRICES` matrices
    `(rank, rank)` for each.
    """
    by_rank: dict[int, list[int]] = {}
    for place, product in enumerate(products):
        by_rank.setdefault(len(product.of_A), []).append(place)
    if not by_rank:
        return []
    factored = [  # a tenth of the time of an eigenvalue problem with vectors
        torch.linalg.cholesky_ex(torch.stack([products[place].of_A for place in places])) for places in by_rank.values()
    ]
    failures = iter(torch.cat([failed for _, failed in factored]).tolist())
    found: list[Tensor] = [torch.empty(0)] * len(products)
    for places, (roots, _) in zip(by_rank.values(), factored, strict=True):
        for index, place in enumerate(places):
            if next(failures):
                roots[index] = symmetric_root(products[place].of_A)
        turned = roots.mT @ torch.stack([products[place].of_B for place in places]) @ roots
        values = torch.linalg.eigvalsh(turned).clamp_min(0.0).sqrt().flip(-1)
        for place, row in zip(places, values, strict=True):
            found[place] = row
    return found


def energy_rank(values: np.ndarray, share: float) -> int:
    """Fewest directions that hold `share` of the energy Σs², of singular values sorted downwards; 0 where there is
    none."""
    energy = np.cumsum(np.square(values, dtype=np.float64))
    if not len(energy) or energy[-1] == 0.0:
        return 0
    # Summation order may cost the last bits.
    return int(np.searchsorted(energy, share * energy[-1] * (1.0 - 1e-12))) + 1


def gram_singular_values(gram: Tensor) -> Tensor:
    """Singular values of a matrix from its `(n, n)` Gram in fp64, largest first; NaN where the Gram is not finite."""
    if not gram.isfinite().all():
        return gram.new_full((gram.shape[0],), math.nan)
    return torch.linalg.eigvalsh(gram).clamp_min(0.0).sqrt().flip(0)


def matrix_singular_values(shard: Tensor, layout: TensorLayout) -> Tensor:
    """All `(min(out, in),)` singular values of a matrix from its shards, largest first, in fp64; a collective.

    The Gram over the dimension that is not split (hidden, for the layers of a transformer) is a sum of local ones and
    all that travels: no process ever holds the matrix.
    """
    local = shard.detach().double()
    split = 0 if layout.dim is None else layout.dim
    gram = local.t() @ local if split == 0 else local @ local.t()
    if layout.dim is not None and tensor_size() > 1:
        dist.all_reduce(gram, group=tensor_group())
    return gram_singular_values(gram)[: min(layout.full_shape)]
