"""Learning rate and global batch as pure functions of the step, and the config sections they read.

A step is an optimizer step, counted from 0: `step` is the number of steps already taken when it begins. With warm-up
w, peak rate p, minimum m and N steps in all, the rate is p·(step+1)/(w+1) below w, p at w, and from there

    linear   m + (p - m)·(1 - t)                t = (step - w) / (N - w)
    cosine   m + (p - m)·(1 + cos πt)/2
    wsd      p until N - d, then linear to m     d = decay_steps (warm up, stay, decay)

The minimum would be reached at step N, the first one not taken: no step is spent at a rate of zero.
"""

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class OptimizerConfig(BaseModel):
    """AdamW, and the two ends of the learning rate."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    learning_rate: float = Field(
        1e-3,
        gt=0.0,
        description="peak learning rate. Tune it anew for each parametrization: in our race the best rate of "
        "factored models was two to eight times the dense one's",
    )
    minimum_learning_rate: float = Field(0.0, ge=0.0, description="learning rate at the end of the decay")
    beta1: float = Field(0.9, ge=0.0, lt=1.0, description="decay of Adam's first moment")
    beta2: float = Field(0.95, ge=0.0, lt=1.0, description="decay of Adam's second moment")
    epsilon: float = Field(1e-8, gt=0.0, description="number added to Adam's denominator")
    weight_decay: float = Field(0.1, ge=0.0, description="decoupled decay of dense weights; factors have none")

    @model_validator(mode="after")
    def _minimum_is_below_the_peak(self) -> "OptimizerConfig":
        if self.minimum_learning_rate > self.learning_rate:
            raise ValueError(
                f"optimizer.minimum_learning_rate {self.minimum_learning_rate:g} is above optimizer.learning_rate "
                f"{self.learning_rate:g}: change one of them"
            )
        return self


def has_weight_decay(name: str, dimensions: int) -> bool:
    """Whether `optimizer.weight_decay` holds for a parameter: for dense weights and embeddings alone.

    On a factor it would be a nuclear-norm pressure on the product, since (‖A‖² + ‖B‖²) / 2 ≥ ‖BA‖_*, and fight growth.
    """
    return dimensions > 1 and not name.endswith((".A", ".B"))


class ScheduleConfig(BaseModel):
    """Shape of the learning rate over the run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    shape: Literal["constant", "linear", "cosine", "wsd"] = Field(
        "cosine",
        description="learning rate after the warm-up: constant, linear or cosine decay over the rest of the run, "
        "or wsd (stay at the peak, then a linear tail)",
    )
    warmup_steps: int = Field(
        0, ge=0, description="steps of linear warm-up. More of them when the loss becomes NaN or spikes early"
    )
    decay_steps: int = Field(0, ge=0, description="length of the tail of wsd")


class BatchRamp(BaseModel):
    """A global batch that grows from `start` by `increment`, at even intervals, to train.global_batch at `steps`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    start: int = Field(ge=1, description="global batch of the first step, in sequences")
    increment: int = Field(ge=1, description="sequences added each time")
    steps: int = Field(ge=1, description="step from which on train.global_batch holds")


def check_schedule(schedule: ScheduleConfig, steps: int) -> None:
    """ValueError if warm-up and tail do not fit into the run."""
    if schedule.warmup_steps >= steps:
        raise ValueError(
            f"schedule.warmup_steps {schedule.warmup_steps} leaves nothing of train.steps {steps}: "
            "lower the former or raise the latter"
        )
    if schedule.shape != "wsd" and schedule.decay_steps:
        raise ValueError(
            f"schedule.decay_steps {schedule.decay_steps} belongs to schedule.shape=wsd, and the shape is "
            f"{schedule.shape}: leave it out or change the shape"
        )
    if schedule.shape == "wsd" and schedule.decay_steps == 0:
        raise ValueError("schedule.shape=wsd needs the length of its tail: set schedule.decay_steps")
    if schedule.warmup_steps + schedule.decay_steps > steps:
        raise ValueError(
            f"schedule.warmup_steps {schedule.warmup_steps} + schedule.decay_steps {schedule.decay_steps} are more "
            f"than train.steps {steps}: lower one of them"
        )


def check_ramp(ramp: BatchRamp, global_batch: int, steps: int) -> None:
    """ValueError if the ramp does not lead from its start to the global batch within the run."""
    if ramp.start >= global_batch:
        raise ValueError(
            f"train.batch_ramp.start {ramp.start} is not below train.global_batch {global_batch}: "
            "lower the start or leave train.batch_ramp out"
        )
    if (global_batch - ramp.start) % ramp.increment:
        raise ValueError(
            f"train.batch_ramp goes from {ramp.start} to train.global_batch {global_batch}, and "
            f"{global_batch - ramp.start} is not a multiple of train.batch_ramp.increment {ramp.increment}: "
            "change one of the three"
        )
    if ramp.steps > steps:
        raise ValueError(
            f"train.batch_ramp.steps {ramp.steps} is more than train.steps {steps}: "
            "lower the former or raise the latter"
        )
    if ramp_begins(ramp, global_batch)[0] == 0:
        raise ValueError(
            f"train.batch_ramp adds {(global_batch - ramp.start) // ramp.increment} increments in {ramp.steps} steps: "
            "raise train.batch_ramp.steps or train.batch_ramp.increment"
        )


def learning_rate(step: int, schedule: ScheduleConfig, optimizer: OptimizerConfig, steps: int) -> float:
    """Learning rate of step `step` (0: the first) in a run of `steps` steps."""
    peak, minimum = optimizer.learning_rate, optimizer.minimum_learning_rate
    warmup = schedule.warmup_steps
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if schedule.shape == "constant":
        return peak
    decay = schedule.decay_steps if schedule.shape == "wsd" else steps - warmup
    progress = min(max(step - (steps - decay), 0) / decay, 1.0)
    if schedule.shape == "cosine":
        return minimum + (peak - minimum) * (1.0 + math.cos(math.pi * progress)) / 2.0
    return minimum + (peak - minimum) * (1.0 - progress)


def ramp_begins(ramp: BatchRamp, global_batch: int) -> list[int]:
    """The step at which each increment begins, ascending; the last one is `ramp.steps`."""
    increments = (global_batch - ramp.start) // ramp.increment
    return [ramp.steps * number // increments for number in range(1, increments + 1)]


def global_batch_at(step: int, global_batch: int, ramp: BatchRamp | None) -> int:
    """Sequences in step `step`."""
    if ramp is None or step >= ramp.steps:
        return global_batch
    return ramp.start + ramp.increment * sum(begin <= step for begin in ramp_begins(ramp, global_batch))


def samples_before(step: int, global_batch: int, ramp: BatchRamp | None) -> int:
    """Sequences consumed when step `step` begins; with the number of steps: those of the whole run."""
    if ramp is None:
        return step * global_batch
    grown = sum(max(step - begin, 0) for begin in ramp_begins(ramp, global_batch))
    return step * ramp.start + ramp.increment * grown
