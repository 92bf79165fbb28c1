"""Linear algebra on sharded factors from small Gram matrices: spans, orthonormal bases, and the balanced basis.

A tall factor's Gram (rank x rank, or k x k for k directions) is a sum of local ones, so everything here costs one small
all-reduce and leaves tensors where they are. A factor may also be whole on every process (`sharded=False`), and then
nothing is summed.

Balanced basis of B·A (rank x rank matrices alone, with symmetric roots R_A² = A Aᵀ, R_B² = Bᵀ B):

    R_B R_A = P S Qᵀ,     B' = B T,  T = R_A Q S^-½,     A' = T⁻¹ A,  T⁻¹ = S^-½ Pᵀ R_B

B' and A' have orthogonal columns and rows of squared length S, the singular values of B·A; cutting the last ones is the
best approximation of lower rank (Eckart and Young 1936).
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from model.process_groups import tensor_group, tensor_size

_NEGLIGIBLE = 1e-12
"""Eigenvalues of a Gram below this share of its largest are rounding in fp64."""


def is_sharded(parameter: Tensor) -> bool:
    """Whether tensor-parallel processes hold different parts of a parameter, by the mark of megatron-core."""
    return bool(getattr(parameter, "tensor_model_parallel", False))


def summed(local: Tensor, sharded: bool) -> Tensor:
    """The sum over tensor-parallel processes of what their shards contribute; as it is where each holds all."""
    if sharded and tensor_size() > 1:
        dist.all_reduce(local, group=tensor_group())
    return local


def symmetric_root(gram: Tensor) -> Tensor:
    """The positive semi-definite square root of a Gram matrix."""
    values, vectors = torch.linalg.eigh(gram)
    return vectors * values.clamp_min(0.0).sqrt() @ vectors.t()


def _pseudo_inverse(gram: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(gram)
    known = values > _NEGLIGIBLE * values[-1].clamp_min(torch.finfo(gram.dtype).tiny)
    return vectors * torch.where(known, 1.0 / values, 0.0) @ vectors.t()


def orthonormal(columns: Tensor, sharded: bool) -> Tensor:
    """An orthonormal basis of the span of `columns (size/tp, k)`, in fp64; where it has fewer than k dimensions the
    rest is zero. A collective of all processes: eigenvectors may come in another sign or order on another processor,
    and those of process 0 count."""
    local = columns.double()
    values, vectors = torch.linalg.eigh(summed(local.t() @ local, sharded))
    known = values > _NEGLIGIBLE * values[-1].clamp_min(torch.finfo(values.dtype).tiny)
    transform = (vectors * torch.where(known, values.clamp_min(0.0).rsqrt(), 0.0)).contiguous()  # as NCCL wants it
    dist.broadcast(transform, src=0)
    return local @ transform


def in_order_orthonormal(columns: Tensor, sharded: bool) -> Tensor:
    """`columns (size/tp, k)`, which must be independent, made orthonormal from the first to the last; a collective."""
    local = columns.double()
    gram = summed(local.t() @ local, sharded)
    gram += _NEGLIGIBLE * gram.trace() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve_triangular(torch.linalg.cholesky(gram), local.t(), upper=False).t()


def outside(columns: Tensor, span: Tensor, sharded: bool) -> Tensor:
    """`columns (size/tp, k)` without their part in the column space of `span (size/tp, rank)`, in fp64; a
    collective."""
    local, basis = columns.double(), span.detach().double()
    both = summed(torch.cat([basis.t() @ basis, basis.t() @ local], dim=1), sharded)
    gram, overlap = both[:, : basis.shape[1]], both[:, basis.shape[1] :]
    return local - basis @ (_pseudo_inverse(gram) @ overlap)


@dataclass(frozen=True)
class BasisChange:
    """`B' = B T`, `A' = T⁻¹ A`, with `T (rank, kept)` and its inverse `(kept, rank)`, in fp64."""

    forward: Tensor
    inverse: Tensor


def balanced_basis(of_A: Tensor, of_B: Tensor, kept: int) -> BasisChange:
    """Change of basis to the `kept` largest singular directions of B·A, from `A Aᵀ` and `Bᵀ B`. Their singular values
    must not be zero."""
    root_A, root_B = symmetric_root(of_A), symmetric_root(of_B)
    P, S, Qt = torch.linalg.svd(root_B @ root_A)
    scale = S[:kept].rsqrt()
    return BasisChange(root_A @ Qt[:kept].t() * scale, scale.unsqueeze(1) * P[:, :kept].t() @ root_B)
