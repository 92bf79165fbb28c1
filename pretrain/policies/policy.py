"""What a rank policy is given and asked.

A policy is a pure decision: measurements in, target ranks out. It touches no model, process or file, so process 0 can
decide for all and a test can call it with numbers. A policy says what it wants; `pretrain/policies/limits.py` says what
it gets.

Steps are counted in optimizer steps taken: an event at step 100 happens after 100 steps, before the one with index 100.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from model.config import Projection

MOST_DEFAULT_DECISIONS = 10
STEPS_PER_DEFAULT_DECISION = 200
SHORTEST_DEFAULT_INTERVAL = 10
"""Shortest default of `rank.check_every`, in steps. By default a run decides at most ten times, at most once in 200 of
its steps, and never twice within ten steps."""


class ScheduleEntry(BaseModel):
    """One line of a growth schedule."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    step: int = Field(ge=1, description="optimizer steps taken before it")
    rank: int = Field(ge=1, description="rank of every factored layer afterwards")


class RankConfig(BaseModel):
    """Ranks at the start, and who decides about their growth."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    policy: Literal["fixed", "schedule", "explained_ratio", "excess_explained_ratio", "gradient"] = Field(
        "fixed", description="who decides: nobody (fixed), a list (schedule), or a rule that measures (docs/ranks.md)"
    )
    initial: int = Field(
        64,
        ge=1,
        description="rank of every factored layer at the start. An eighth to a quarter of model.hidden is a "
        "beginning; higher where ranks stay fixed",
    )
    quantum: int = Field(
        16, ge=1, description="grown ranks are multiples of it. Multiples of 16 suit kernels and tensor parallelism"
    )
    check_every: int = Field(
        0,
        ge=0,
        description="steps between two decisions of a measuring policy; 0: ten decisions, in short runs fewer",
    )
    start_step: int = Field(0, ge=0, description="no growth before it")
    stop_step: int | None = Field(
        None,
        ge=0,
        description="no growth after it; none: a quarter of train.steps after rank.start_step. Late growth did "
        "worse in our race",
    )
    schedule: tuple[ScheduleEntry, ...] = Field((), description="steps and ranks, for policy schedule")
    buffer: int = Field(16, ge=2, description="directions beyond the used rank, for the explained-ratio policies")
    threshold: float = Field(
        0.9,
        gt=0.0,
        lt=1.0,
        description="explained ratio that suffices, for all policies that look at spectra. Higher: more growth",
    )
    budget: float | None = Field(
        None,
        gt=0.0,
        le=1.0,
        description="most that factors may cost, as a share of the dense weights (additive: besides these); none: "
        "no bound but that of the layers",
    )
    budget_unit: Literal["parameters", "flops"] = Field(
        "parameters", description="what the budget counts: parameters at any time, or FLOPs of the whole run"
    )
    probe: int = Field(16, ge=1, description="directions of the gradient that policy gradient measures")
    directed: bool = Field(
        True, description="new rows of A along the measured gradient, for policy gradient; false: random, as a control"
    )
    truncate: float = Field(
        0.0,
        ge=0.0,
        lt=1.0,
        description="share of the energy below which measuring policies cut the smallest directions off; 0: ranks "
        "never fall",
    )
    track: bool = Field(
        False,
        description="log spectra of updates, gradients and representations at every validation. To study how a "
        "run learns, dense ones included",
    )


@dataclass(frozen=True)
class LayerMeasurement:
    """One factored layer as a policy sees it."""

    projection: Projection
    rank: int
    singular_values: np.ndarray
    """`(rank,)` singular values of B·A, largest first."""
    update_values: np.ndarray = field(default_factory=lambda: np.empty(0))
    """Singular values of the cumulative update B·A - B₀·A₀, largest first; at most twice as many."""
    demand: np.ndarray = field(default_factory=lambda: np.empty(0))
    """`(<= probe,)` energy of the gradient along its leading directions outside the factors' spans, as far as two
    batches agree on it; largest first."""


Measured = Literal["product", "update", "demand"]
"""Measurements that a policy may need besides ranks: the three arrays of `LayerMeasurement`."""


BudgetUse = Literal["refused", "heeded", "required"]
"""What a policy does with `rank.budget`: refuses it, heeds it if it is set, or requires it."""


class Policy(ABC):
    """A way to decide about ranks. Other code reads what it declares here, and never asks which policy it is."""

    needs: ClassVar[frozenset[Measured]] = frozenset()
    """What must be measured before `targets` is asked; the rest of a `LayerMeasurement` is empty."""
    budget: ClassVar[BudgetUse] = "refused"
    """What it does with `rank.budget`."""
    grows: ClassVar[bool] = True
    """Whether ranks may change at all."""
    measures: ClassVar[bool] = False
    """Whether it decides by what it measures, so that its ranks are not known beforehand."""
    truncates: ClassVar[bool] = False
    """Whether `rank.truncate` may lower ranks when it has decided."""
    follows_schedule: ClassVar[bool] = False
    """Whether it carries `rank.schedule` out."""
    grows_untrained: ClassVar[bool] = False
    """Whether it would grow factors that training never changed. Then a run records how far (`untrained_ranks`)."""
    defaults: ClassVar[Mapping[str, Any]] = {}
    """Defaults of this policy for settings of section `rank`, in place of the section's own."""

    def __init__(self, rank: RankConfig, steps: int) -> None:
        """The policy with these settings, for a run of `steps` steps."""
        self._rank, self._steps = rank, steps

    @abstractmethod
    def due(self, step: int) -> bool:
        """Whether ranks may change after `step` steps; `targets` is asked only then."""

    @abstractmethod
    def targets(self, step: int, layers: Sequence[LayerMeasurement], room: int | None) -> dict[str, int]:
        """The wanted rank of each layer that should grow, by `Projection.name`, before any limit; the most urgent layer
        first.

        `room`: parameters that the budget leaves for new directions; None without a budget.
        """

    def untrained_ranks(self, layers: Sequence[LayerMeasurement]) -> dict[str, int]:
        """The rank each layer would reach if training never changed it, from its measurement before step 0."""
        return {layer.projection.name: layer.rank for layer in layers}

    @classmethod
    def completed(cls, rank: RankConfig, steps: int) -> RankConfig:
        """The settings with defaults filled in where nothing was set, for a run of `steps` steps."""
        return rank.model_copy(
            update={key: value for key, value in cls.defaults.items() if key not in rank.model_fields_set}
        )

    @classmethod  # noqa: B027  (most have nothing to check)
    def check(cls, rank: RankConfig, factored: Sequence[Projection], steps: int) -> None:
        """ValueError if the policy cannot do within `steps` steps what the settings ask."""

    @classmethod  # noqa: B027
    def check_start(cls, rank: RankConfig, factored: Sequence[Projection], ranks: Mapping[str, int]) -> None:
        """ValueError if the policy cannot begin, or go on, at these `ranks`."""


class MeasuringPolicy(Policy):
    """A policy that decides every `rank.check_every` steps by what it measures, within a budget if there is one."""

    budget: ClassVar[BudgetUse] = "heeded"
    measures = True

    def due(self, step: int) -> bool:
        return check_due(step, self._rank)

    @classmethod
    def completed(cls, rank: RankConfig, steps: int) -> RankConfig:
        """The settings with `rank.stop_step` and `rank.check_every` filled in.

        Growth during a quarter of the run did better in the race than during half of it (docs/results.md). So few
        decisions cost under half a percent of a run of 200 steps or more, wherever growth stops (docs/lab-notes.md).
        """
        rank = super().completed(rank, steps)
        stop = rank.start_step + steps // 4 if rank.stop_step is None else rank.stop_step
        every = rank.check_every or _default_interval(rank.start_step, min(stop, steps - 1), steps)
        return rank.model_copy(update={"check_every": every, "stop_step": stop})

    @classmethod
    def check(cls, rank: RankConfig, factored: Sequence[Projection], steps: int) -> None:
        if not any(check_due(step, rank) for step in range(1, steps)):
            raise ValueError(
                f"rank.policy={rank.policy} decides every {rank.check_every} steps from {rank.start_step} to "
                f"{rank.stop_step}, and so never in a run of {steps}: set a lower rank.check_every or raise "
                "rank.stop_step"
            )


def _default_interval(start: int, stop: int, steps: int) -> int:
    """Steps between decisions from `start` to `stop`; the first one is at `start`, unless that is 0.

    A run that may decide only once also does so at `start`, since decisions fall on multiples of the interval.
    """
    decisions = max(1, min(MOST_DEFAULT_DECISIONS, steps // STEPS_PER_DEFAULT_DECISION))
    intervals = decisions - (1 if start > 0 else 0)
    window = max(stop - start, 0)
    return max(SHORTEST_DEFAULT_INTERVAL, math.ceil(window / intervals) if intervals else window + 1)


def in_growth_window(step: int, rank: RankConfig) -> bool:
    """Whether `rank.start_step` and `rank.stop_step` allow growth after `step` steps."""
    return step >= rank.start_step and (rank.stop_step is None or step <= rank.stop_step)


def check_due(step: int, rank: RankConfig) -> bool:
    """Whether a measuring policy decides after `step` steps."""
    return step > 0 and in_growth_window(step, rank) and (step - rank.start_step) % rank.check_every == 0
