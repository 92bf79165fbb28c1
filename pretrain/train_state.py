"""The state of a run: results of a step, a validation and a growth event, and what a checkpoint keeps of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter

from pretrain.loss import perplexity


@dataclass(frozen=True)
class StepMetrics:
    """One logged step, the same on every process."""

    lm_loss: float
    """Mean over all predicted tokens of the step, in nats per token."""
    grad_norm: float
    """Norm of the whole gradient, before clipping."""
    learning_rate: float
    step_seconds: float
    """Wall-clock time of this step."""
    global_batch: int
    """Sequences in the step."""
    consumed_samples: int
    consumed_tokens: int
    skipped_steps: int
    loss_scale: float | None = None
    """Loss scale; fp16 only."""


@dataclass(frozen=True)
class Validation:
    """What a validation found in one held-out set."""

    lm_loss: float
    """Mean over all predicted tokens, in nats per token."""
    bits_per_byte: float | None = None
    """Causal objective only: hidden tokens are no text."""
    accuracy: float | None = None
    """Share of the tokens predicted right; masked objective only."""

    def facts(self) -> dict[str, float]:
        """The results that exist for this objective, by name."""
        facts = {"lm_loss": self.lm_loss, "ppl": perplexity(self.lm_loss)}
        others = {"bits_per_byte": self.bits_per_byte, "accuracy": self.accuracy}
        return facts | {name: value for name, value in others.items() if value is not None}


@dataclass(frozen=True)
class GrowthRecord:
    """What a growth event did to the layers that changed.

    `before`, `after`: their ranks; `seconds`: how long training stood still; `logit_change`: how far the logits of a
    fixed batch moved, as a share of their scale (None where directions were cut, and in records of earlier versions).
    """

    step: int
    consumed_samples: int
    before: dict[str, int]
    after: dict[str, int]
    seconds: float
    logit_change: float | None = None


@dataclass(frozen=True)
class RankPeriod:
    """A stretch of a run in which ranks stayed the same."""

    step: int
    """Steps taken when the period began."""
    samples: int
    """Sequences trained on during the period."""
    ranks: dict[str, int]


def rank_periods(ranks: Mapping[str, int], growth: Sequence[GrowthRecord], consumed_samples: int) -> list[RankPeriod]:
    """The periods of a run from its start to its present `ranks` and `consumed_samples`: one more than growth events.

    A record has only the layers that changed. Only the present ranks are those of all layers, so the walk goes
    backwards.
    """
    current, end, periods = dict(ranks), consumed_samples, []
    for record in reversed(growth):
        periods.append(RankPeriod(record.step, end - record.consumed_samples, dict(current)))
        current |= record.before
        end = record.consumed_samples
    periods.append(RankPeriod(0, end, current))
    return periods[::-1]


@dataclass
class TrainState:
    """What a resumed run must know besides masters and moments."""

    step: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    left_out: list[list[int]] = field(default_factory=list)
    """Windows `[first, end)` of the samples that were left out at rollbacks."""
    growth: list[GrowthRecord] = field(default_factory=list)

    def leave_out(self, end: int) -> list[int]:
        """Skips to sample `end`; the window `[first, end)` of samples that are left out, which were trained on in vain
        or not at all."""
        window = [self.consumed_samples, end]
        self.left_out.append(window)
        self.consumed_samples, self.skipped_in_a_row = end, 0
        return window

    def rank_periods(self, ranks: Mapping[str, int]) -> list[RankPeriod]:
        """The periods of the run so far; `ranks` are the present ones."""
        return rank_periods(ranks, self.growth, self.consumed_samples)


def saved_progress(state: Mapping[str, Any]) -> TrainState:
    """The run's state from the state of a checkpoint; pydantic's `ValidationError` if it is not one."""
    return TypeAdapter(TrainState).validate_python({**state["train"], "growth": state["growth"]})
