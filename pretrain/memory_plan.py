"""What one process holds in memory, from config, ranks and layout alone: nothing is built.

ZeRO (Rajbhandari et al. 2019, arXiv 1910.02054, section 3) over d data-parallel processes, with N trained numbers on a
tensor-parallel process, e bytes each, in DeepSpeed 0.19.8:

| stage | weights | gradients                         | masters | moments | with the optimizer offloaded             |
|-------|---------|-----------------------------------|---------|---------|------------------------------------------|
| 0     | 4·N     | 4·N                               | –       | 8·N     |                                          |
| 1     | e·N     | e·N                               | 4·N/d   | 8·N/d   | masters and moments on the host          |
| 2     | e·N     | e·W                               | 4·N/d   | 8·N/d   | and gradients                            |
| 3     | e·N/d   | e·N/d                             | 4·N/d   | 8·N/d   | and gradients                            |

On 1 and 2 each optimizer group is one flat tensor, padded to a multiple of 2·d; stage 2 keeps the gradients of whole
parameters, W numbers of all those that reach into the process's partition. On 3 every parameter is cut. Beside that
there are buckets of the gradient reduction, on stage 3 gathered parameters (the small ones always; others from their
forward to their backward pass, see `gathered_numbers`), and what a step needs when the activations are gone: the
gradient's partition once more, in fp32.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from model.activations import FP32_BYTES, activation_bytes
from model.communication import TensorTraffic
from model.config import ModelConfig, Recompute, round_up
from model.parameter_shards import ParameterShard, parameter_shards
from pretrain.layout import Layout

ELEMENT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
_ALIGNMENT = 2
"""DeepSpeed 0.19.8 pads each optimizer group to a multiple of this and the number of data-parallel processes."""
_STAGE_0_BUCKET = 500_000_000


@dataclass(frozen=True)
class ZeroBuffers:
    """The settings of DeepSpeed's ZeRO section that decide about memory, in numbers; its own defaults."""

    reduce_bucket_size: int = 500_000_000
    overlap_comm: bool = False
    stage3_param_persistence_threshold: int = 100_000
    stage3_max_live_parameters: int = 1_000_000_000
    stage3_max_reuse_distance: int = 1_000_000_000
    stage3_prefetch_bucket_size: int = 50_000_000

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> "ZeroBuffers":
        """From a `zero_optimization` section."""
        return cls(**{key: settings[key] for key in cls.__dataclass_fields__ if key in settings})


@dataclass(frozen=True)
class Setup:
    """Everything but model and ranks that decides what a process holds, computes and sends."""

    layout: Layout
    micro_batch: int
    precision: str
    stage: int
    offload: bool = False
    recompute: Recompute = "none"
    zero: ZeroBuffers = ZeroBuffers()

    @property
    def element_bytes(self) -> int:
        return ELEMENT_BYTES[self.precision]


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one process, the fullest one."""

    weights: int
    gradients: int
    """Kept from one micro-step to the next."""
    optimizer: int
    """Masters, where they are not the weights themselves, and both moments."""
    activations: int
    buffers: int
    """Of communication: reduction buckets, the largest message, gathered parameters; and of the logits' gradient."""
    step: int
    """What reducing and stepping need when the activations are gone, the gradients included."""
    host: int
    """In host memory, with the optimizer offloaded."""
    aside: int
    """In host memory for a while: the model when it is built, in fp32, and masters and moments during an event."""

    @property
    def total(self) -> int:
        """On the device at its fullest."""
        return self.weights + self.optimizer + max(self.gradients + self.activations + self.buffers, self.step)


def optimizer_groups(shards: Iterable[ParameterShard]) -> list[list[ParameterShard]]:
    """Trained parameters as `pretrain/engine.py` groups them: with weight decay and without."""
    trained = [shard for shard in shards if shard.trained]
    decayed = [s for s in trained if len(s.shape) > 1 and not s.name.endswith((".A", ".B"))]
    others = [s for s in trained if s not in decayed]
    return [group for group in (decayed, others) if group]


def plan_memory(model: ModelConfig, ranks: Mapping[str, int], setup: Setup) -> MemoryPlan:
    """Of one process of a run whose ranks are `ranks`; for a dense model they are empty."""
    layout, e = setup.layout, setup.element_bytes
    shards = parameter_shards(model, ranks, layout.tensor)
    activations = activation_bytes(
        model,
        ranks,
        tensor_size=layout.tensor,
        sequences=setup.micro_batch,
        element_bytes=e,
        recompute=setup.recompute,
    ).peak
    passing = _passing_bytes(model, ranks, setup)
    state = _partitioned(shards, setup) if setup.stage == 3 else _flat(shards, setup)
    aside = max(FP32_BYTES * total_numbers(shards), state["optimizer"])
    return MemoryPlan(**{**state, "activations": activations, "buffers": state["buffers"] + passing, "aside": aside})


def _passing_bytes(model: ModelConfig, ranks: Mapping[str, int], setup: Setup) -> int:
    """The largest message between tensor-parallel processes, and the gradient of the logits."""
    tokens, tensor = setup.micro_batch * model.sequence_length, setup.layout.tensor
    step = TensorTraffic(model, tensor, tokens, setup.element_bytes).step(ranks)
    largest = max((message.bytes for message in step.forward + step.backward), default=0)
    return largest + tokens * model.padded_vocabulary // tensor * setup.element_bytes


def _flat(shards: Sequence[ParameterShard], setup: Setup) -> dict[str, int]:
    """Stages 0, 1 and 2: whole weights, one flat tensor a group."""
    e, processes, zero = setup.element_bytes, setup.layout.data, setup.zero
    groups = [[shard.numbers for shard in group] for group in optimizer_groups(shards)]
    frozen = sum(shard.numbers for shard in shards if not shard.trained)
    trained = sum(sum(group) for group in groups)
    if setup.stage == 0:
        bucket = min(trained, _STAGE_0_BUCKET) * e
        weights, gradients = (frozen + trained) * e, trained * e
        return _sizes(weights, gradients, 2 * FP32_BYTES * trained, 0, gradients + bucket)
    padded = [round_up(sum(group), _ALIGNMENT * processes) for group in groups]
    partition = sum(padded) // processes
    touched = _most_touched(groups, [size // processes for size in padded], processes)
    largest = max(max(group) for group in groups)
    bucket = zero.reduce_bucket_size * e * (2 if zero.overlap_comm else 1)
    weights, state = (frozen + sum(padded)) * e, 3 * FP32_BYTES * partition
    in_fp32 = max(padded) // processes * (e + (FP32_BYTES if e != FP32_BYTES else 0))
    if setup.offload:
        host = state + (FP32_BYTES + e) * partition + e * largest
        host += e * touched if setup.layout.accumulation > 1 else 0
        gradients = trained * e if setup.stage == 1 else 0
        buffers = bucket + 2 * largest * e  # one of them to pass gradients on to the host
        return _sizes(weights, gradients, 0, buffers, gradients + buffers, host)
    if setup.stage == 1:
        gradients = trained * e
        return _sizes(weights, gradients, state, bucket, max(gradients + bucket, in_fp32) + touched * e)
    copies = 2 if setup.layout.accumulation > 1 else 1
    buffers = bucket + largest * e + (copies - 1) * touched * e
    return _sizes(weights, touched * e, state, buffers, touched * e + in_fp32)


def _partitioned(shards: Sequence[ParameterShard], setup: Setup) -> dict[str, int]:
    """Stage 3: every parameter cut into equal parts."""
    e, processes, zero = setup.element_bytes, setup.layout.data, setup.zero
    partition = sum(-(-shard.numbers // processes) for shard in shards)
    trained = sum(-(-shard.numbers // processes) for shard in shards if shard.trained)
    largest = max(shard.numbers for shard in shards)
    gathered = sum(gathered_numbers(shards, zero)) + largest + zero.stage3_prefetch_bucket_size
    bucket = 2 * zero.reduce_bucket_size * e  # one to fill, one to scatter from
    buffers = min(gathered, total_numbers(shards)) * e + bucket + largest * e
    state = 3 * FP32_BYTES * trained
    if setup.offload:
        return _sizes(partition * e, 0, 0, buffers, bucket, state + (FP32_BYTES + e) * trained)
    return _sizes(partition * e, trained * e, state, buffers, trained * (e + FP32_BYTES) + bucket)


def gathered_numbers(shards: Iterable[ParameterShard], zero: ZeroBuffers) -> tuple[int, int]:
    """What stage 3 leaves gathered: small parameters always, others from their forward to their backward pass.

    Where DeepSpeed 0.19.8 fetches ahead, it does so for every module that is reached, up to the limit on live
    parameters, and what it finds gathered on the way it does not release before its next use.
    """
    small = sum(s.numbers for s in shards if s.numbers <= zero.stage3_param_persistence_threshold)
    ahead = zero.stage3_max_live_parameters if zero.stage3_prefetch_bucket_size else 0
    return small, min(total_numbers(shards) - small, max(zero.stage3_max_reuse_distance // 2, ahead))


def total_numbers(shards: Iterable[ParameterShard]) -> int:
    return sum(shard.numbers for shard in shards)


def _sizes(weights: int, gradients: int, optimizer: int, buffers: int, step: int, host: int = 0) -> dict[str, int]:
    return {
        "weights": weights,
        "gradients": gradients,
        "optimizer": optimizer,
        "buffers": buffers,
        "step": step,
        "host": host,
    }


def _most_touched(groups: Sequence[Sequence[int]], partitions: Sequence[int], processes: int) -> int:
    """Numbers of the whole parameters that reach into a process's partitions, for the process with most of them."""
    touched = [0] * processes
    for group, partition in zip(groups, partitions, strict=True):
        start = 0
        for numbers in group:
            for process in range(start // partition, (start + numbers - 1) // partition + 1):
                touched[process] += numbers
            start += numbers
    return max(touched)
