"""Dense layers inside a stream that is split along hidden, for models whose MLPs alone are factored.

The column-parallel layer gathers its input along hidden, the row-parallel one scatters its sum along hidden: forward
and backward move what Megatron's two all-reduces move, and the stream outside stays split.
"""

from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

from model.collectives import gather_stream, scatter_stream
from model.layers.sharded_norm import new_sharded_vector


class StreamColumnParallelLinear(ColumnParallelLinear):
    """`(seq, batch, in/tp)` to `(seq, batch, out/tp)`; the gather's backward reduces, so the layer must not."""

    def __init__(self, input_size: int, output_size: int, **settings: object) -> None:
        super().__init__(input_size, output_size, **settings, disable_grad_reduce=True)

    def forward(
        self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, Tensor | None]:
        return super().forward(gather_stream(input_), weight, runtime_gather_output)


class StreamRowParallelLinear(RowParallelLinear):
    """`(seq, batch, in/tp)` to `(seq, batch, out/tp)`; the bias is split as its output is."""

    def __init__(self, input_size: int, output_size: int, *, bias: bool, **settings: object) -> None:
        super().__init__(input_size, output_size, bias=False, **settings)
        self.bias = new_sharded_vector(output_size, 0.0) if bias else None

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        partial = self._forward_impl(
            input=input_,
            weight=self.weight,
            bias=None,
            gradient_accumulation_fusion=self.gradient_accumulation_fusion,
            allreduce_dgrad=False,
            sequence_parallel=False,
            tp_group=None,
            grad_output_buffer=None,
        )
        return scatter_stream(partial), self.bias
