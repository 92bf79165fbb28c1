"""What one process holds in memory, from config, ranks and parallel layout alone: nothing is built.

ZeRO (Rajbhandari et al. 2019, arXiv 1910.02054, section 3) over d data-parallel processes, with N trained numbers on a
tensor-parallel process, e bytes each, in DeepSpeed 0.19.8:

| stage | weights | gradients                         | masters | moments | with the optimizer offloaded             |
|-------|---------|-----------------------------------|---------|---------|------------------------------------------|
| 0     | 4·N     | 4·N                               | –       | 8·N     |                                          |
| 1     | e·N     | e·N                               | 4·N/d   | 8·N/d   | masters and moments on the host          |
| 2     | e·N     | e·W                               | 4·N/d   | 8·N/d   | and gradients                            |
| 3     | e·N/d   | e·N/d                             | 4·N/d   | 8·N/d   | and gradients                            |

On 1 and 2 each optimizer group is one flat tensor, padded to a multiple of 2·d; stage 2 keeps the gradients of whole
parameters, W numbers of all those that reach into the process's partition. On 3 every parameter is cut, and some are
gathered (the small ones always; others from their forward to their backward pass, see `gathered_numbers`).

Beside weights and optimizer a step needs most memory at one of these places (`_fullest`): in the loss; in the output
layer's backward pass; when its gradient goes into the reduction's bucket; in the last layer's backward pass; or when
all gradients are reduced and stepped. A layer's gradients appear as its activations are freed, so with one micro-step
all gradients and all activations are never there together.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from model.config import ModelConfig, Recompute
from model.costs.activations import FP32_BYTES, Activations, activation_bytes, loss_bytes, loss_in_place
from model.costs.communication import padded_group
from model.costs.parameter_shards import ParameterShard, parameter_shards
from pretrain.config.parallel import ParallelLayout
from pretrain.schedule import has_weight_decay

ELEMENT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
_STAGE_0_BUCKET = 500_000_000


@dataclass(frozen=True)
class ZeroBuffers:
    """The settings of DeepSpeed's ZeRO section that decide about memory, counted in numbers; with DeepSpeed's
    defaults."""

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
    """Everything except model and ranks that decides what a process holds, computes and sends."""

    layout: ParallelLayout
    micro_batch: int
    precision: str
    stage: int
    offload: bool = False
    recompute: Recompute = "none"
    zero: ZeroBuffers = ZeroBuffers()
    within_documents: bool = False
    gpu: bool = False
    """Whether processes compute on GPUs, where loss, attention and dropout keep less."""

    @property
    def element_bytes(self) -> int:
        return ELEMENT_BYTES[self.precision]


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one process, the fullest one."""

    weights: int
    gradients: int
    """Gradients that are kept from one micro-step to the next."""
    optimizer: int
    """Masters, where they are not the weights themselves, and both moments."""
    activations: int
    """Activations of a micro-batch between its passes, and of the one layer that is being recomputed."""
    buffers: int
    """Buckets of the gradients' reduction, and gathered parameters."""
    fullest: int
    """Most bytes that gradients, activations and buffers have together at any time of a step."""
    host: int
    """Host memory of an offloaded optimizer."""
    aside: int
    """Host memory that is needed for a while: the fp32 model while it is built, masters and moments during a growth
    event."""

    @property
    def total(self) -> int:
        """Most bytes on the device at any time."""
        return self.weights + self.optimizer + self.fullest


@dataclass(frozen=True)
class _States:
    """Bytes of one process that do not depend on activations."""

    weights: int
    gradients: int
    optimizer: int
    bucket: int
    """Buckets of the reduction, from the first gradient to the last."""
    standing: int
    """Buffers that are always there."""
    step: int
    """Gradients, and what reducing and stepping need beside them, when the activations are gone."""
    host: int = 0


def optimizer_groups(shards: Iterable[ParameterShard]) -> list[list[ParameterShard]]:
    """Trained parameters as `pretrain/engine/build.py` groups them: with weight decay and without."""
    trained = [shard for shard in shards if shard.trained]
    decayed = [shard for shard in trained if has_weight_decay(shard.name, len(shard.shape))]
    others = [s for s in trained if s not in decayed]
    return [group for group in (decayed, others) if group]


def plan_memory(model: ModelConfig, ranks: Mapping[str, int], setup: Setup) -> MemoryPlan:
    """Memory of one process of a run whose ranks are `ranks`; empty `ranks` for a dense model."""
    layout, e = setup.layout, setup.element_bytes
    shards = parameter_shards(model, ranks, layout.tensor)
    activations = activation_bytes(
        model,
        ranks,
        tensor_size=layout.tensor,
        sequences=setup.micro_batch,
        element_bytes=e,
        recompute=setup.recompute,
        gpu=setup.gpu,
        within_documents=setup.within_documents,
    )
    states = _partitioned(shards, setup) if setup.stage == 3 else _flat(shards, setup)
    return MemoryPlan(
        states.weights,
        states.gradients,
        states.optimizer,
        activations.peak,
        states.bucket + states.standing,
        _fullest(model, shards, setup, states, activations),
        states.host,
        max(FP32_BYTES * total_numbers(shards), states.optimizer),
    )


def _fullest(
    model: ModelConfig, shards: Sequence[ParameterShard], setup: Setup, states: _States, activations: Activations
) -> int:
    """Most bytes beside weights and optimizer at any time of a step.

    The loss turns its softmax, in fp32, into the gradient of the logits. In place (`model/layers/cross_entropy.py`) it
    needs no memory beside the logits.
    """
    e, tensor = setup.element_bytes, setup.layout.tensor
    tokens = setup.micro_batch * model.sequence_length
    logits = tokens * model.padded_vocabulary // tensor
    output = next(s for s in reversed(shards) if s.name.startswith(("output_layer.", "embedding.word_embeddings.")))
    output_gradient = output.numbers * e if output.trained else 0
    in_mlp = tokens * model.ffn_width // tensor * e * (3 if model.gated else 2)
    again = setup.layout.accumulation > 1
    before = states.standing + activations.kept + (states.gradients if again or setup.stage == 3 else 0)
    # Stage 1 reduces in the last micro-step, and keeps the bucket of the first until then.
    bucket = states.bucket if again and setup.stage == 1 else 0
    copied = e != FP32_BYTES and not loss_in_place(tensor, setup.gpu)
    loss = before + bucket + (logits * e if copied else 0)
    behind = before - tokens * loss_bytes(model, tensor, e, setup.gpu)
    in_output = tokens * model.hidden * e + output_gradient
    output_layer = behind + bucket + logits * e + in_output
    first_reduced = behind + states.bucket + in_output if setup.stage > 1 else 0
    # From stage 2 on the bucket has taken the gradient of the output layer; with more micro-steps it is counted above.
    kept_gradient = output_gradient if setup.stage < 2 and not again else 0
    last_layer = behind + states.bucket + kept_gradient + activations.recomputed + in_mlp
    return max(loss, output_layer, first_reduced, last_layer, states.standing + states.step)


def _flat(shards: Sequence[ParameterShard], setup: Setup) -> _States:
    """Stages 0, 1 and 2: whole weights, one flat tensor a group."""
    e, processes, zero = setup.element_bytes, setup.layout.data, setup.zero
    groups = [[shard.numbers for shard in group] for group in optimizer_groups(shards)]
    frozen = sum(shard.numbers for shard in shards if not shard.trained)
    trained = sum(sum(group) for group in groups)
    if setup.stage == 0:
        weights, gradients = (frozen + trained) * e, trained * e
        step = gradients + min(trained, _STAGE_0_BUCKET) * e
        return _States(weights, gradients, 2 * FP32_BYTES * trained, bucket=0, standing=0, step=step)
    padded = [padded_group(sum(group), processes) for group in groups]
    partition = sum(padded) // processes
    touched = _most_touched(groups, [size // processes for size in padded], processes)
    largest = max(max(group) for group in groups)
    bucket = zero.reduce_bucket_size * e * (2 if zero.overlap_comm else 1)
    weights, state = (frozen + sum(padded)) * e, 3 * FP32_BYTES * partition
    in_fp32 = max(padded) // processes * (e + (FP32_BYTES if e != FP32_BYTES else 0))
    if setup.offload:
        host = state + (FP32_BYTES + e) * partition + e * largest
        host += e * touched if setup.stage == 2 and setup.layout.accumulation > 1 else 0
        gradients = trained * e if setup.stage == 1 else 0
        # Gradients go to the host one parameter at a time.
        return _States(weights, gradients, 0, bucket, largest * e, gradients + bucket, host)
    if setup.stage == 1:
        gradients = trained * e
        return _States(weights, gradients, state, bucket, 0, max(gradients + bucket, in_fp32) + touched * e)
    return _States(weights, touched * e, state, bucket, 0, touched * e + max(bucket, in_fp32))


def _partitioned(shards: Sequence[ParameterShard], setup: Setup) -> _States:
    """Stage 3: every parameter cut into equal parts."""
    e, processes, zero = setup.element_bytes, setup.layout.data, setup.zero
    partition = sum(-(-shard.numbers // processes) for shard in shards)
    trained = sum(-(-shard.numbers // processes) for shard in shards if shard.trained)
    largest = max(shard.numbers for shard in shards)
    gathered = sum(gathered_numbers(shards, zero)) + largest + zero.stage3_prefetch_bucket_size
    bucket = zero.reduce_bucket_size * e
    whole = trained * processes * e
    scattered = min(bucket, whole)  # a second copy, while the bucket is reduced
    filled = bucket if whole > bucket else 0
    standing = min(gathered, total_numbers(shards)) * e + bucket
    state = 3 * FP32_BYTES * trained
    if setup.offload:
        host = state + (FP32_BYTES + e) * trained
        return _States(partition * e, 0, 0, filled, standing, scattered, host)
    step = trained * (e + FP32_BYTES) + scattered
    return _States(partition * e, trained * e, state, filled, standing, step)


def gathered_numbers(shards: Iterable[ParameterShard], zero: ZeroBuffers) -> tuple[int, int]:
    """What stage 3 leaves gathered: small parameters always, others from their forward to their backward pass.

    Where DeepSpeed 0.19.8 prefetches, it does so at every module, up to the limit on live parameters. Parameters that
    it finds gathered already are not released before their next use.
    """
    small = sum(s.numbers for s in shards if s.numbers <= zero.stage3_param_persistence_threshold)
    ahead = zero.stage3_max_live_parameters if zero.stage3_prefetch_bucket_size else 0
    return small, min(total_numbers(shards) - small, max(zero.stage3_max_reuse_distance // 2, ahead))


def total_numbers(shards: Iterable[ParameterShard]) -> int:
    return sum(shard.numbers for shard in shards)


def _most_touched(groups: Sequence[Sequence[int]], partitions: Sequence[int], processes: int) -> int:
    """Most numbers, over all processes, of the whole parameters that reach into a process's partitions."""
    touched = [0] * processes
    for group, partition in zip(groups, partitions, strict=True):
        start = 0
        for numbers in group:
            for process in range(start // partition, (start + numbers - 1) // partition + 1):
                touched[process] += numbers
            start += numbers
    return max(touched)
