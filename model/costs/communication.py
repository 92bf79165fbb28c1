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

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from model.config import ModelConfig, Projection, projections, round_up

Kind = Literal[
    "all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "reduce", "gather", "scatter", "barrier"
]
Group = Literal["tensor", "data", "other"]

FP32_BYTES = 4
_ZERO_ALIGNMENT = 2
"""DeepSpeed 0.19.8 pads each optimizer group to a multiple of this and the number of data-parallel processes."""


@dataclass(frozen=True)
class Collective:
    """One collective of one process."""

    kind: Kind
    group: Group
    bytes: int
    """Size of the whole message."""

    def sent_bytes(self, processes: int) -> float:
        """What each of so many processes sends, and receives, on average, if the message goes round in a ring."""
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


@dataclass
class StepCollectives:
    """Collectives of a forward pass in its order, and of its backward pass in any order."""

    forward: list[Collective] = field(default_factory=list)
    backward: list[Collective] = field(default_factory=list)

    def add(self, other: "StepCollectives") -> None:
        self.forward += other.forward
        self.backward += other.backward


@dataclass(frozen=True)
class TensorTraffic:
    """Collectives in each tensor-parallel group for one micro-batch of `tokens` tokens, `element_bytes` a number of the
    stream."""

    config: ModelConfig
    processes: int
    tokens: int
    element_bytes: int

    def step(self, ranks: Mapping[str, int]) -> StepCollectives:
        """Collectives of the whole model with these `ranks`, as `tensor_collectives` gives them."""
        stream, step = self.tokens * self.config.hidden, StepCollectives()
        if self.processes == 1:
            return step
        if self._in_stream:
            step.add(self._pair("reduce_scatter", "all_gather", stream))  # embedding
        else:
            step.forward.append(self._message("all_reduce", stream))
        below = self.config.trained == "factors"  # nothing is trained below the first factors: no gradient goes there
        for projection in projections(self.config):
            step.add(self.projection(projection, ranks.get(projection.name), input_gradient=not below))
            below = below and not projection.factored
        if self._in_stream:
            step.add(self._norm())
            step.add(self._pair("all_gather", "reduce_scatter", stream))  # output layer
        else:
            step.backward.append(self._message("all_reduce", stream))
        step.forward += [Collective("all_reduce", "tensor", self.tokens * FP32_BYTES)] * 3  # cross entropy
        return step

    def projection(self, projection: Projection, rank: int | None, *, input_gradient: bool = True) -> StepCollectives:
        """Collectives of one linear layer of a model on several processes, with the norm in front of it."""
        inputs, outputs = self.tokens * projection.in_features, self.tokens * projection.out_features
        sent = StepCollectives()
        if self._in_stream and rank is not None:
            sent.forward.append(self._message("all_reduce", self._bottleneck(projection, rank)))
            sent.backward.append(self._message("all_reduce", self.tokens * rank))
        elif self._in_stream and projection.normed:
            sent.add(self._norm())
            sent.add(self._pair("all_gather", "reduce_scatter", inputs))
        elif self._in_stream:
            sent.add(self._pair("reduce_scatter", "all_gather", outputs))
        elif projection.normed:
            sent.backward += [self._message("all_reduce", inputs)] if input_gradient else []
        else:
            sent.forward.append(self._message("all_reduce", outputs))
        if projection.additive and rank is not None:
            whole = projection.in_features if projection.normed else projection.out_features
            sent.backward.append(self._message("all_reduce", rank * whole))
        if projection.kind == "qkv" and self.config.groups < self.processes:
            # megatron-core 0.16.1 puts the groups together, and every process takes its heads.
            sent.forward.append(self._message("all_gather", outputs))
            if input_gradient or projection.factored:
                sent.backward.append(self._message("reduce_scatter", outputs))
        return sent

    @property
    def _in_stream(self) -> bool:
        return self.config.parametrization == "factored"

    def _message(self, kind: Kind, numbers: int) -> Collective:
        return Collective(kind, "tensor", numbers * self.element_bytes)

    def _pair(self, forward: Kind, backward: Kind, numbers: int) -> StepCollectives:
        return StepCollectives([self._message(forward, numbers)], [self._message(backward, numbers)])

    def _norm(self) -> StepCollectives:
        numbers = self.tokens * self.processes * self.config.norm_statistics
        message = Collective("all_reduce", "tensor", numbers * FP32_BYTES)
        return StepCollectives([message], [message])

    def _bottleneck(self, projection: Projection, rank: int) -> int:
        """Numbers in the buffer of a factored layer's forward all-reduce (`model/layers/bottleneck.py`)."""
        if not projection.normed:
            return self.tokens * rank
        # In 16 bits every statistic is sent in two parts.
        columns = self.config.norm_statistics * (1 if self.element_bytes == FP32_BYTES else 2)
        rows = 2 if self.config.norm == "layernorm" else 0
        return (self.tokens + self.processes * rows) * (rank + self.processes * columns)


def tensor_collectives(
    config: ModelConfig, ranks: Mapping[str, int], tensor_size: int, tokens: int, element_bytes: int
) -> StepCollectives:
    """Collectives of forward and backward pass of the whole model, loss included. `ranks` maps `Projection.name` to the
    rank (with a gradient probe: plus its directions)."""
    return TensorTraffic(config, tensor_size, tokens, element_bytes).step(ranks)


def padded_group(numbers: int, processes: int) -> int:
    """Numbers of an optimizer group's flat tensor, of which each of `processes` holds an equal part."""
    return round_up(numbers, _ZERO_ALIGNMENT * processes)


def gradient_and_parameter_bytes(
    stage: int, group_sizes: Sequence[int], processes: int, micro_steps: int, element_bytes: int
) -> dict[Kind, int]:
    """Bytes by kind that a step of ZeRO 0, 1 or 2 asks for in each data-parallel group, a few numbers for norm and
    overflow aside.

    `group_sizes`: numbers of this process's trained parameters in each optimizer group. With N of them all, DeepSpeed
    0.19.8 sends gradients by all-reduce on every stage (its `reduce_scatter` setting says which part is kept), N once a
    step on stages 0 and 1 and N every micro-step on stage 2; on 1 and 2 one all-gather a group brings back what was
    updated, padded.
    """
    if processes == 1:
        return {}
    reductions = micro_steps if stage == 2 else 1
    sent: dict[Kind, int] = {"all_reduce": reductions * sum(group_sizes) * element_bytes}
    if stage > 0:
        padded = [padded_group(size, processes) for size in group_sizes]
        sent["all_gather"] = sum(padded) * element_bytes
    return sent
