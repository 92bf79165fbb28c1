"""Every parameter of a model as one tensor-parallel process holds it, from config and ranks alone.

The names, their order and their sizes are those of `build_model(...).named_parameters()`: what an optimizer partitions,
and where the cuts fall, can be known without building anything.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from model.config import ModelConfig, Projection, projections


@dataclass(frozen=True)
class ParameterShard:
    """What one process holds of one parameter."""

    name: str
    shape: tuple[int, ...]
    trained: bool

    @property
    def numbers(self) -> int:
        return math.prod(self.shape)


def parameter_shards(config: ModelConfig, ranks: Mapping[str, int], tensor_size: int) -> list[ParameterShard]:
    """All parameters of a process, in the model's own order; `ranks` maps `Projection.name` to rank."""
    return list(_Shards(config, ranks, tensor_size).all())


@dataclass(frozen=True)
class _Shards:
    config: ModelConfig
    ranks: Mapping[str, int]
    processes: int

    def all(self) -> Iterator[ParameterShard]:
        config = self.config
        vocabulary = config.padded_vocabulary // self.processes
        yield self._other("embedding.word_embeddings.weight", vocabulary, config.hidden)
        if config.learned_positions:
            yield self._other("embedding.position_embeddings.weight", config.sequence_length, self._stream)
        linears = projections(config)
        for layer in range(config.layers):
            yield from self._layer(*linears[4 * layer : 4 * layer + 4])
        yield from self._norm("decoder.final_layernorm.", self._stream)
        if not config.tied_embeddings:
            yield self._other("output_layer.weight", vocabulary, config.hidden)

    @property
    def _stream(self) -> int:
        """Width of the residual stream on one process."""
        return self.config.hidden // (self.processes if self.config.parametrization == "factored" else 1)

    def _layer(self, qkv: Projection, proj: Projection, fc1: Projection, fc2: Projection) -> Iterator[ParameterShard]:
        # megatron-core builds `linear_proj` before `linear_qkv`.
        for norm, linears in (("input_layernorm", (proj, qkv)), ("pre_mlp_layernorm", (fc1, fc2))):
            if not any(linear.fused_norm for linear in linears):
                yield from self._norm(f"decoder.layers.{qkv.layer}.{norm}.", self._stream)
            for linear in linears:
                yield from self._linear(linear)

    def _linear(self, linear: Projection) -> Iterator[ParameterShard]:
        column = linear.normed
        in_stream = self.config.parametrization == "factored"
        alone = linear.factored and not linear.additive
        rows = linear.out_features // (self.processes if column or alone else 1)
        columns = linear.in_features // (self.processes if not column or alone else 1)
        if linear.fused_norm:
            yield from self._norm(f"{linear.name}.norm_", columns)
        factors: list[ParameterShard] = []
        if linear.factored:
            rank = self.ranks[linear.name]
            factors = [
                ParameterShard(f"{linear.name}.A", (rank, columns), trained=True),
                ParameterShard(f"{linear.name}.B", (rows, rank), trained=True),
            ]
        if alone:
            yield from factors
        else:
            trained = self.config.trained == "all" and not linear.additive
            yield ParameterShard(f"{linear.name}.weight", (rows, columns), trained)
        if self.config.biases:
            split = column or in_stream
            yield self._other(f"{linear.name}.bias", linear.out_features // (self.processes if split else 1))
        if linear.additive:
            yield from factors

    def _norm(self, prefix: str, width: int) -> Iterator[ParameterShard]:
        for name in self.config.norm_parameters:
            yield self._other(prefix + name, width)

    def _other(self, name: str, *shape: int) -> ParameterShard:
        return ParameterShard(name, shape, self.config.trained == "all")
