"""Where a run stands, and what it has still before it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter

from pretrain.config.run import RunConfig
from pretrain.growth.augmentation import GrowthRecord
from pretrain.schedule import samples_before


@dataclass
class TrainState:
    """What a resumed run must know besides masters and moments."""

    step: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    left_out: list[list[int]] = field(default_factory=list)
    """`[first, end)` of the samples that were left out when the run turned back."""
    growth: list[GrowthRecord] = field(default_factory=list)

    def leave_out(self, end: int) -> list[int]:
        """Goes on with sample `end`; the samples before it that were never trained on, or trained on in vain."""
        window = [self.consumed_samples, end]
        self.left_out.append(window)
        self.consumed_samples, self.skipped_in_a_row = end, 0
        return window


def saved_progress(state: Mapping[str, Any]) -> TrainState:
    """Out of a checkpoint's state; pydantic's `ValidationError` where it says something else."""
    return TypeAdapter(TrainState).validate_python({**state["train"], "growth": state["growth"]})


def samples_of_the_run(config: RunConfig, step: int, consumed: int) -> int:
    """Sequences consumed at the end by a run that has `consumed` behind it at `step`, whatever its batches were."""
    train = config.train
    end, now = (samples_before(moment, train.global_batch, train.batch_ramp) for moment in (train.steps, step))
    return consumed + end - now
