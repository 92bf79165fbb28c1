"""Initial values that depend on the run seed, the parameter's name and its full shape alone.

Each value is drawn whole from a generator seeded with a hash of seed and name, and then sliced (to the last bits of a
QR factorization, which depend on the number of threads).

Factors start as the truncated SVD of a dense draw W ~ N(0, s²), split by square roots: B = U √Σ, A = √Σ Vᵀ (spectral
initialization, Khodak et al., arXiv 2105.01029). No SVD is needed for it: the singular vectors of a Gaussian matrix are
uniform (QR of Gaussian draws), and its singular values follow the law of Marchenko and Pastur, so Σ holds its upper
quantiles.

In an additive layer, W0 + B A, W0 is the dense model's own draw, B starts at zero and A with orthonormal rows: the
first function is the dense model's, and the first gradient of B is that of W along the rows of A.
"""

import hashlib
import math

import numpy as np
import torch
from torch import Tensor

from model.config import ModelConfig, Projection, projections

_GRID = 8192
_HOST = torch.device("cpu")


def generator_for(seed: int, *key: object) -> torch.Generator:
    """A generator for one draw; `key` is the parameter's name and whatever else tells the draw apart."""
    text = ":".join(str(part) for part in (seed, *key))
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1)


def gaussian_singular_values(rows: int, columns: int, count: int, std: float) -> Tensor:
    """Expected `count` largest singular values of a `rows x columns` Gaussian matrix with entries of deviation `std`.

    s² / (std²·n) follows the Marchenko-Pastur law with ratio c = m/n (m the smaller side, n the larger) on
    [(1 - √c)², (1 + √c)²]; the k-th largest is its quantile at 1 - (k - ½)/m.
    """
    smaller, larger = min(rows, columns), max(rows, columns)
    ratio = smaller / larger
    low, high = (1 - math.sqrt(ratio)) ** 2, (1 + math.sqrt(ratio)) ** 2
    # x = low + (high - low)·sin²(angle) takes the square-root edges out of the density √((high-x)(x-low)) / (2π c x).
    angle = np.linspace(0, math.pi / 2, _GRID)
    x = low + (high - low) * np.sin(angle) ** 2
    weight = (np.sin(angle) * np.cos(angle)) ** 2 / np.maximum(x, np.finfo(float).tiny)
    cumulative = np.concatenate([[0.0], np.cumsum((weight[1:] + weight[:-1]) / 2)])
    levels = 1.0 - (np.arange(1, count + 1) - 0.5) / smaller
    quantiles = np.interp(levels, cumulative / cumulative[-1], x)
    return torch.from_numpy(std * np.sqrt(larger * quantiles)).float()


def orthonormal_columns(size: int, count: int, generator: torch.Generator, device: torch.device = _HOST) -> Tensor:
    """`(size, count)` with orthonormal columns, uniformly distributed, on `device`; drawn on the host, so that they are
    the same everywhere, but for the sign of each column."""
    locked = device.type == "cuda"  # so that the copy waits for nothing
    drawn = torch.randn(size, count, generator=generator, pin_memory=locked).to(device, non_blocking=True)
    return cholesky_orthonormal(drawn) if drawn.is_cuda else torch.linalg.qr(drawn).Q


def cholesky_orthonormal(columns: Tensor) -> Tensor:
    """Q of `columns (size, count)` = X = Q R, R with a positive diagonal: X L⁻ᵀ with L Lᵀ = Xᵀ X, whose condition is
    that of X squared, and so in fp64. A handful of kernels, where Householder's reflections take several a column."""
    double = columns.double()
    root, _ = torch.linalg.cholesky_ex(double.t() @ double)
    return torch.linalg.solve_triangular(root, double.t(), upper=False).t().to(columns.dtype)


def residual_scale(config: ModelConfig) -> float:
    """Factor of the initial entries of layers that add to the stream: 1/√(2·layers), as in GPT-2, since each layer adds
    twice."""
    return 1.0 / math.sqrt(2 * config.layers)


def initial_factor(config: ModelConfig, projection: Projection, side: str, rank: int, seed: int) -> Tensor:
    """Full `A (rank, in)` or `B (out, rank)` of a projection at its initial rank; `side` is "A" or "B"."""
    if projection.additive:
        if side == "B":
            return torch.zeros(projection.out_features, rank)
        return orthonormal_columns(projection.in_features, rank, generator_for(seed, f"{projection.name}.A")).t()
    std = config.initial_std * (residual_scale(config) if projection.residual else 1.0)
    roots = gaussian_singular_values(projection.out_features, projection.in_features, rank, std).sqrt()
    generator = generator_for(seed, f"{projection.name}.{side}")
    if side == "A":
        return roots.unsqueeze(1) * orthonormal_columns(projection.in_features, rank, generator).t()
    return orthonormal_columns(projection.out_features, rank, generator) * roots


def initial_dense(name: str, shape: tuple[int, ...], std: float, seed: int) -> Tensor:
    """Full Gaussian draw of a dense weight, an embedding or a position table."""
    return torch.randn(shape, generator=generator_for(seed, name)) * std


def initial_tensor(config: ModelConfig, name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """The full tensor that parameter `name` starts from; the rank of a factor is read from its `shape`."""
    module, _, leaf = name.rpartition(".")
    owner = next((projection for projection in projections(config) if projection.name == module), None)
    if owner is not None and leaf in ("A", "B"):
        return initial_factor(config, owner, leaf, shape[0 if leaf == "A" else 1], seed)
    if leaf.endswith("bias"):
        return torch.zeros(shape)
    if "norm" in name:
        return torch.ones(shape)
    scale = residual_scale(config) if owner is not None and owner.residual else 1.0
    return initial_dense(name, shape, config.initial_std * scale, seed)


def new_directions(
    name: str, step: int, count: int, size: int, norm: float, seed: int, device: torch.device = _HOST
) -> Tensor:
    """Rows `(count, size)` for a growing A, on `device`: orthonormal, uniformly distributed, scaled to `norm`.

    They depend on seed, step and name alone, so that an event that is done again gives the same model.
    """
    return norm * orthonormal_columns(size, count, generator_for(seed, name, "growth", step), device).t()
