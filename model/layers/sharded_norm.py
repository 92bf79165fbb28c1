"""RMSNorm and LayerNorm of a stream that is split along hidden, exact and not per shard.

    RMSNorm(x) = g ⊙ x / rms(x),              rms² = mean(x²) + ε
    LayerNorm(x) = g ⊙ (x − μ) / σ + β,       σ² = mean((x − μ)²) + ε

Each process sends what it knows of its own shard, and combines what it gets of all p:
rms² = mean_i(rms_i²) + ε;  μ = mean_i(μ_i);  σ² = mean_i(σ_i²) + mean_i((μ_i − μ)²) + ε  (Chan et al. 1983).
Sending root means and not sums keeps fp16 in range, and never forming E[x²] − μ² keeps the digits when |μ| ≫ σ.
The fused norm of the factored layer shares these formulas. On CUDA `model/layers/norm_kernels.py` computes them; one
process alone has whole rows, and torch's own fused kernels.
"""

import torch
from torch import Tensor, nn

from model.collectives import copy_to_group
from model.config import NormKind
from model.layers.bottleneck import down
from model.layers.layer_norm import layer_norm
from model.process_groups import tensor_size


def local_statistics(shard: Tensor, kind: NormKind) -> tuple[Tensor, Tensor]:
    """What one process knows of `shard (tokens, width/tp)`: `(tokens, 1)` its rms, or `(tokens, 2)` its mean and
    standard deviation, in fp32; and the shard, for LayerNorm without its mean."""
    if shard.is_cuda:
        from model.layers.norm_kernels import fused_statistics

        return fused_statistics(shard, centres=kind == "layernorm")
    if kind == "rmsnorm":
        return _root_mean_square(shard), shard
    mean = shard.mean(-1, keepdim=True, dtype=torch.float32)
    centred = (shard - mean).to(shard.dtype)
    return torch.cat([mean, _root_mean_square(centred)], dim=-1), centred


def _root_mean_square(values: Tensor) -> Tensor:
    """`(tokens, 1)` in fp32, with a zero gradient where all are zero. Autograd saves `values` as they are: a square in
    fp32 would keep a copy of 16-bit ones at twice their size."""
    norm = torch.linalg.vector_norm(values, dim=-1, keepdim=True, dtype=torch.float32)
    return norm / values.shape[-1] ** 0.5


def mean_and_scale(statistics: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Mean over hidden (RMSNorm: zero) and 1/rms or 1/σ, each `(tokens, 1)`, from the `statistics (tokens, tp, k)` of
    all processes."""
    spread = statistics[..., -1].square().mean(-1, keepdim=True)
    if statistics.shape[-1] == 1:
        return torch.zeros_like(spread), (spread + epsilon).rsqrt()
    means = statistics[..., 0]
    mean = means.mean(-1, keepdim=True)
    return mean, (spread + (means - mean).square().mean(-1, keepdim=True) + epsilon).rsqrt()


def scaled(product: Tensor, statistics: Tensor, rows: Tensor, epsilon: float) -> Tensor:
    """`A norm(x)`, `(tokens, rank)`, from the `product` of A ⊙ g with what `local_statistics` left of x, the
    `statistics (tokens, tp, k)` and, for LayerNorm, the `rows (tp, 2, rank)` A g and A β of all processes."""
    if product.is_cuda:
        from model.layers.norm_kernels import fused_scale

        return fused_scale(product, statistics, rows, epsilon)
    mean, scale = mean_and_scale(statistics, epsilon)
    if statistics.shape[-1] == 1:
        return (product * scale).to(product.dtype)  # fp32 times 16 bits is computed in fp32
    between = (statistics[..., 0] - mean) @ rows[:, 0].float()
    return ((product + between) * scale + rows[:, 1].float().sum(dim=0)).to(product.dtype)


def new_sharded_vector(full_size: int, value: float) -> nn.Parameter:
    """A parameter `(full_size/tp)` that carries the marks of a tensor-parallel shard."""
    parameter = nn.Parameter(torch.full((full_size // tensor_size(),), value))
    mark_sharded(parameter, dim=0)
    return parameter


def mark_sharded(parameter: nn.Parameter, dim: int, stride: int = 1) -> None:
    """Marks a shard as megatron-core does; DeepSpeed counts the norm of an unmarked parameter on one process only."""
    parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
    parameter.partition_dim = dim  # type: ignore[attr-defined]
    parameter.partition_stride = stride  # type: ignore[attr-defined]


class ShardedNorm(nn.Module):
    """A norm on its own, in front of layers that do not fuse it: `stream (seq, batch, hidden/tp)` to the same shape."""

    def __init__(self, kind: NormKind, hidden: int, epsilon: float) -> None:
        super().__init__()
        self.kind = kind
        self.epsilon = epsilon
        self.weight = new_sharded_vector(hidden, 1.0)
        self.bias = new_sharded_vector(hidden, 0.0) if kind == "layernorm" else None

    def forward(self, stream: Tensor) -> Tensor:
        """Normalizes over the full hidden size, with one small all-reduce forward and one backward."""
        if tensor_size() == 1:
            if self.bias is not None:
                return layer_norm(stream, self.weight, self.bias, self.epsilon)
            return nn.functional.rms_norm(stream, self.weight.shape, self.weight, self.epsilon)
        tokens = stream.flatten(0, -2)
        # fp32 for the exchange: two numbers a token are not worth rounding.
        nothing = tokens.new_empty(tokens.shape[0], 0, dtype=torch.float32)
        statistics, _ = local_statistics(tokens, self.kind)
        _, statistics, _ = down(nothing, nothing[:0], None, statistics, nothing[:0])
        mean, scale = mean_and_scale(copy_to_group(statistics), self.epsilon)
        normalized = ((tokens.float() - mean) * scale).to(stream.dtype) * self.weight
        if self.bias is not None:
            normalized = normalized + self.bias
        return normalized.view_as(stream)
