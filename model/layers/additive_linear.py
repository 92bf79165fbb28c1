"""Megatron-core's linear layers with a frozen weight and a trained low-rank update of it.

    y = W0 x + B (A x) + b,      W0 (out, in) frozen,  A (rank, in),  B (out, rank)

InRank as in its paper (Zhao et al., arXiv 2306.11250, section 4); with B = 0 at the start also low-rank adaptation of a
dense model (Hu et al., arXiv 2106.09685). The stream is whole on every process, W0 is split as megatron-core splits it,
and the update rides in the collective that W0 needs anyway: the forward pass has none of its own.

| layer  | W0           | A            | B            | collective                                   |
|--------|--------------|--------------|--------------|----------------------------------------------|
| column | (out/p, in)  | whole        | (out/p, rank)| backward: the gradient of x, of both paths   |
| row    | (out, in/p)  | (rank, in/p) | whole        | forward: W0_i x_i + B A_i x_i, as one sum    |

What one process computes for the whole factor is a part of its gradient, by its rows of B or columns of A. The
parameter itself passes through `copy_to_group`, so these parts are added up in the backward pass: rank·in numbers a
column layer, rank·out a row layer, and all copies of the factor stay equal.
"""

from typing import Literal

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from torch import Tensor, nn

from model.collectives import copy_to_group
from model.layers.factored_linear import Probe
from model.layers.sharded_norm import mark_sharded
from model.process_groups import tensor_size


class _LowRankUpdate(nn.Module):
    """The trained factors beside a frozen weight; mixed into megatron-core's layers."""

    whole: Literal["A", "B"]
    """The factor that every tensor-parallel process holds whole."""
    stride: int
    """Stride of the shards of B, where B is split (see `model/sharding.py`)."""
    input_size: int
    weight: Tensor
    bias: nn.Parameter | None
    probe: Probe | None

    def set_factors(self, A: Tensor, B: Tensor) -> None:
        """Takes this process's `A (rank, in or in/tp)` and `B (out/tp or out, rank)` of any common rank as new
        parameters."""
        self.A, self.B, self.rank = nn.Parameter(A), nn.Parameter(B), len(A)
        if self.whole == "A":
            mark_sharded(self.B, dim=0, stride=self.stride)
        else:
            mark_sharded(self.A, dim=1)

    def _low_rank(self, hidden: Tensor) -> Tensor:
        """`B A x`: `(..., in)` to `(..., out/tp)` in a column layer, `(..., in/tp)` to this process's part of the sum
        `(..., out)` in a row layer."""
        update = self._product(hidden, self.A, self.B)
        return update if self.probe is None else update + self._product(hidden, self.probe.A, self.probe.B)

    def _product(self, hidden: Tensor, A: Tensor, B: Tensor) -> Tensor:
        if self.whole == "A":
            A = copy_to_group(A)
        else:
            B = copy_to_group(B)
        return nn.functional.linear(nn.functional.linear(hidden, A), B)


class AdditiveColumnParallelLinear(_LowRankUpdate, ColumnParallelLinear):
    """`(seq, batch, in)` to `(seq, batch, out/tp)`, and the bias `(out/tp)` if it is left to the caller."""

    whole = "A"

    def __init__(self, input_size: int, output_size: int, *, rank: int, stride: int = 1, **settings: object) -> None:
        super().__init__(input_size, output_size, stride=stride, **settings, disable_grad_reduce=True)
        self.stride, self.probe = stride, None
        self.weight.requires_grad_(False)
        self.set_factors(torch.empty(rank, input_size), torch.empty(output_size // tensor_size(), rank))

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        hidden = copy_to_group(input_)
        # Not megatron-core 0.16.1's `linear_with_frozen_weight`: it gives the bias no gradient.
        added = None if self.skip_bias_add else self.bias
        output = nn.functional.linear(hidden, self.weight, added) + self._low_rank(hidden)
        return output, self.bias if self.skip_bias_add else None


class AdditiveRowParallelLinear(_LowRankUpdate, RowParallelLinear):
    """`(seq, batch, in/tp)` to `(seq, batch, out)`, and the bias `(out)` if it is left to the caller."""

    whole = "B"

    def __init__(self, input_size: int, output_size: int, *, rank: int, **settings: object) -> None:
        super().__init__(input_size, output_size, **settings)
        self.stride, self.probe = 1, None
        self.weight.requires_grad_(False)
        self.set_factors(torch.empty(rank, input_size // tensor_size()), torch.empty(output_size, rank))

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        partial = nn.functional.linear(input_, self.weight) + self._low_rank(input_)
        output = reduce_from_tensor_model_parallel_region(partial)
        if self.skip_bias_add or self.bias is None:
            return output, self.bias
        return output + self.bias, None
