"""The factored layer under tensor parallelism, with the norm in front of it fused into its one all-reduce.

    y = B (A norm(x)) + b,      A (rank, in),  B (out, rank)

Bottleneck layout (published as BOOST, arXiv 2512.12131): the stream is split along hidden, A along its columns, B along
its rows, and the rank never. Process i computes

    h_i = A_i (g_i ⊙ x_i)  ── all-reduce (rank wide) ──>  h = Σ h_i / rms(x)  ──>  y_i = B_i h

where the statistics of the norm ride in the same all-reduce; backward there is one all-reduce of the gradient of h.
LayerNorm centres each shard on its own mean μ_i first, and mends the difference with row sums that ride along as extra
rows:

    A LN(x) = (Σ A_i (g_i ⊙ (x_i − μ_i)) + Σ (μ_i − μ) A_i g_i) / σ + Σ A_i β_i

Growing the rank appends rows to every A_i and columns to every B_i: nothing is resharded, any rank is legal for any p.
"""

from dataclasses import dataclass

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from model.config import NormKind
from model.layers.bottleneck import down, up
from model.layers.layer_norm import normed_down
from model.layers.sharded_norm import local_statistics, mark_sharded, new_sharded_vector, scaled
from model.process_groups import tensor_size


@dataclass
class Probe:
    """Directions that a layer carries for a while beside its own: plain tensors `A (k, in/tp)` and `B (out/tp, k)`.

    One of them is zero, so the output is what it was, and the gradient of the zero one is a sketch of the dense
    gradient G = ∂L/∂W: that of B = 0 is G Aᵀ, that of A = 0 is Bᵀ G.
    """

    A: Tensor
    B: Tensor


class FactoredLinear(nn.Module):
    """A linear layer of megatron-core's layer specs whose weight is the product of two sharded factors.

    `input_size` and `output_size` are the full sizes. `stride` is 2 for gate-and-up (see `model/sharding.py`). The
    parameters come empty; `model/initialization.py` fills them.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        rank: int,
        config: TransformerConfig,
        bias: bool,
        norm: NormKind | None = None,
        stride: int = 1,
        **_megatron: object,  # what megatron-core hands to every linear layer and this one has no use for
    ) -> None:
        super().__init__()
        self.input_size, self.output_size, self.stride = input_size, output_size, stride
        self.norm, self.epsilon = norm, config.layernorm_epsilon
        self.norm_weight = new_sharded_vector(input_size, 1.0) if norm else None
        self.norm_bias = new_sharded_vector(input_size, 0.0) if norm == "layernorm" else None
        processes = tensor_size()
        self.set_factors(torch.empty(rank, input_size // processes), torch.empty(output_size // processes, rank))
        self.probe: Probe | None = None
        self.bias = new_sharded_vector(output_size, 0.0) if bias else None
        if self.bias is not None:
            mark_sharded(self.bias, dim=0, stride=stride)

    def set_factors(self, A: Tensor, B: Tensor) -> None:
        """Takes shards `A (rank, in/tp)` and `B (out/tp, rank)` of any common rank as new parameters."""
        self.A, self.B, self.rank = nn.Parameter(A), nn.Parameter(B), len(A)
        mark_sharded(self.A, dim=1)
        mark_sharded(self.B, dim=0, stride=self.stride)

    def forward(self, hidden: Tensor) -> tuple[Tensor, None]:
        """`hidden (seq, batch, in/tp)` to `(seq, batch, out/tp)`. No bias is left to the caller, though megatron-core
        asks for that (`skip_bias_add`): a product adds it in passing, where it would be a kernel of its own."""
        A: Tensor = self.A
        B: Tensor = self.B
        if self.probe is not None:  # its columns of the bottleneck ride in the same collectives
            A, B = torch.cat([A, self.probe.A]), torch.cat([B, self.probe.B], dim=1)
        output = up(self._bottleneck(hidden.flatten(0, -2), A), B, self.bias)
        return output.view(*hidden.shape[:-1], -1), None

    def _bottleneck(self, tokens: Tensor, A: Tensor) -> Tensor:
        """`A norm(x)`, `(tokens, in/tp)` to `(tokens, rank)`, the same on all processes."""
        nothing = tokens.new_empty(0, A.shape[0])
        if self.norm is None or self.norm_weight is None:
            no_statistics = tokens.new_empty(tokens.shape[0], 0, dtype=torch.float32)
            return down(tokens, A, None, no_statistics, nothing)[0]
        if self.norm_bias is not None and tensor_size() == 1:
            return normed_down(tokens, A, self.norm_weight, self.norm_bias, self.epsilon)
        statistics, values = local_statistics(tokens, self.norm)
        sums = nothing
        if self.norm_bias is not None:
            sums = torch.stack([self.norm_weight, self.norm_bias]) @ A.t()
        product, everyone, rows = down(values, A, self.norm_weight, statistics, sums)
        return scaled(product, everyone, rows, self.epsilon)

    def extra_repr(self) -> str:
        return f"in={self.input_size}, out={self.output_size}, rank={self.rank}, norm={self.norm}"
