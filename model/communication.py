"""What a training step sends between processes, collective by collective, from config and ranks alone.

With T tokens a micro-batch, p tensor-parallel processes, rank r, k statistics a token (RMSNorm 1, LayerNorm 2; as two
numbers each in 16 bits) and m extra rows (LayerNorm 2, RMSNorm none), the numbers of each message are

| where                                | forward                                      | backward                    |
|--------------------------------------|----------------------------------------------|-----------------------------|
| factored layer                       | all-reduce T·r                               | all-reduce T·r              |
| factored layer with its norm         | all-reduce (T + p·m)·(r + p·k)               | all-reduce T·r              |
| norm on its own in the split stream  | all-reduce T·p·k, in fp32                    | all-reduce T·p·k, in fp32   |
| dense column layer in the stream     | all-gather T·in                              | reduce-scatter T·in         |
| dense row layer in the stream        | reduce-scatter T·out                         | all-gather T·out            |
| embedding / output of the stream     | reduce-scatter / all-gather T·hidden         | the mirror                  |
| megatron-core's column layer         | none                                         | all-reduce T·in             |
| megatron-core's row layer, embedding | all-reduce T·out                             | none                        |
| additive column / row layer          | as megatron-core's                           | and all-reduce r·in / r·out |
| cross entropy                        | 3 all-reduces T, in fp32                     | none                        |

A message's size is that of the whole tensor: the buffer of an all-reduce, the result of an all-gather, the input of a
reduce-scatter.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from model.config import ModelConfig, Projection, projections

Kind = Literal[
    "all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "reduce", "gather", "scatter", "barrier"
]
Group = Literal["tensor", "data", "other"]

FP32_BYTES = 4


@dataclass(frozen=True)
class Collective:
    """One collective of one process."""

    kind: Kind
    group: Group
    bytes: int
    """Of the whole message."""

    def sent_bytes(self, processes: int) -> float:
        """What each of so many processes sends, and receives, in a ring, on average."""
        passes = {"barrier": 0, "all_reduce": 2}.get(self.kind, 1)
        return passes * self.bytes * (processes - 1) / processes


@dataclass(frozen=True)
class Total:
    count: int
    bytes: int


def total(collectives: Iterable[Collective], kind: Kind | None = None, group: Group | None = None) -> Total:
    """Number and bytes of one kind or all, in one group or all."""
    counted = [c for c in collectives if kind in (None, c.kind) and group in (None, c.group)]
    return Total(len(counted), sum(c.bytes for c in counted))


@dataclass(frozen=True)
class StepCollectives:
    """In order of execution, but that `backward` is in the order of the forward pass."""

    forward: list[Collective]
    backward: list[Collective]


def tensor_collectives(
    config: ModelConfig, ranks: Mapping[str, int], tensor_size: int, tokens: int, element_bytes: int
) -> StepCollectives:
    """Collectives of one micro-batch of `tokens` tokens, loss included, in each tensor-parallel group.

    `ranks` maps `Projection.name` to the rank (with a gradient probe: plus its directions). `element_bytes` is the size
    of a number of the stream.
    """
    if tensor_size == 1:
        return StepCollectives([], [])
    step = _Step(config, tensor_size, tokens, element_bytes)
    return StepCollectives(list(step.forward(ranks)), list(step.backward(ranks)))


@dataclass(frozen=True)
class _Step:
    config: ModelConfig
    processes: int
    tokens: int
    element_bytes: int

    @property
    def in_stream(self) -> bool:
        return self.config.parametrization == "factored"

    @property
    def statistics(self) -> int:
        """Numbers that a norm sends for each token and process, before they are split for 16 bits."""
        return 1 if self.config.family == "llama" else 2

    def forward(self, ranks: Mapping[str, int]) -> Iterator[Collective]:
        stream = self.tokens * self.config.hidden
        yield self._message("reduce_scatter" if self.in_stream else "all_reduce", stream)
        for projection in projections(self.config):
            outputs = self.tokens * projection.out_features
            if projection.factored and self.in_stream:
                yield self._message("all_reduce", self._bottleneck(projection, ranks[projection.name]))
            elif self.in_stream and projection.normed:
                yield self._norm()
                yield self._message("all_gather", self.tokens * projection.in_features)
            elif not projection.normed:
                yield self._message("reduce_scatter" if self.in_stream else "all_reduce", outputs)
        if self.in_stream:
            yield self._norm()
            yield self._message("all_gather", stream)
        for _ in ("maximum", "predicted logit", "sum of exponentials"):
            yield Collective("all_reduce", "tensor", self.tokens * FP32_BYTES)

    def backward(self, ranks: Mapping[str, int]) -> Iterator[Collective]:
        stream = self.tokens * self.config.hidden
        trained_below = self.config.trained == "all"  # whether the gradient goes any further down
        if self.in_stream:
            yield self._message("all_gather", stream)
        for projection in projections(self.config):
            inputs, rank = self.tokens * projection.in_features, ranks.get(projection.name, 0)
            if projection.factored and self.in_stream:
                yield self._message("all_reduce", self.tokens * rank)
            elif self.in_stream and projection.normed:
                yield self._norm()
                yield self._message("reduce_scatter", inputs)
            elif self.in_stream:
                yield self._message("all_gather", self.tokens * projection.out_features)
            elif projection.normed and trained_below:
                yield self._message("all_reduce", inputs)
            if projection.additive:
                whole = projection.in_features if projection.normed else projection.out_features
                yield self._message("all_reduce", rank * whole)
                trained_below = True
        if self.in_stream:
            yield self._norm()
        yield self._message("reduce_scatter" if self.in_stream else "all_reduce", stream)

    def _message(self, kind: Kind, numbers: int) -> Collective:
        return Collective(kind, "tensor", numbers * self.element_bytes)

    def _norm(self) -> Collective:
        return Collective("all_reduce", "tensor", self.tokens * self.processes * self.statistics * FP32_BYTES)

    def _bottleneck(self, projection: Projection, rank: int) -> int:
        """Numbers of the buffer of a factored layer's forward all-reduce: `model/collectives.py`."""
        if not projection.fused_norm:
            return self.tokens * rank
        columns = self.statistics * (1 if self.element_bytes == FP32_BYTES else 2)
        rows = 2 if self.config.family == "gpt2" else 0
        return (self.tokens + self.processes * rows) * (rank + self.processes * columns)
