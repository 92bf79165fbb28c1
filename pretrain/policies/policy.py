"""What a rank policy is given and asked, and the limits that hold for all of them.

A policy is a pure decision: singular values in, target ranks out. It touches no model, process or file, so process 0
can decide for all and a test can call it with numbers. A policy says what it wants; `limit_growth` says what it gets:

- ranks are multiples of `rank.quantum`, and at most double per event;
- no layer passes the rank at which two factors hold as many numbers as the dense weight;
- nothing shrinks, and nothing grows before `rank.start_step` or after `rank.stop_step`.

Steps are counted in optimizer steps taken: an event at step 100 happens after 100 steps, before the one with index 100.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from model.config import Projection


class RankEvent(BaseModel):
    """One line of a growth schedule."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    step: int = Field(ge=1, description="optimizer steps taken before it")
    rank: int = Field(ge=1, description="rank of every factored layer afterwards")


class RankConfig(BaseModel):
    """Ranks at the start, and who decides about their growth."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    policy: Literal["fixed", "schedule", "explained_ratio"] = Field("fixed", description="who decides")
    initial: int = Field(64, ge=1, description="rank of every factored layer at the start")
    quantum: int = Field(16, ge=1, description="grown ranks are multiples of it")
    check_every: int = Field(100, ge=1, description="steps between two decisions of a measuring policy")
    start_step: int = Field(0, ge=0, description="no growth before it")
    stop_step: int | None = Field(None, ge=0, description="no growth after it; none: until the end")
    events: tuple[RankEvent, ...] = Field((), description="steps and ranks, for policy schedule")
    buffer: int = Field(16, ge=2, description="directions beyond the used rank, for policy explained_ratio")
    threshold: float = Field(
        0.9, gt=0.0, lt=1.0, description="explained ratio that suffices, for policy explained_ratio"
    )


@dataclass(frozen=True)
class LayerMeasurement:
    """One factored layer as a policy sees it."""

    projection: Projection
    rank: int
    singular_values: np.ndarray
    """`(rank,)` singular values of B·A, largest first; empty in steps for which `needs_spectra` is false."""


class Policy(Protocol):
    """A way to decide about ranks."""

    def due(self, step: int) -> bool:
        """Whether ranks may change after `step` steps; `targets` is asked only then."""

    def needs_spectra(self, step: int) -> bool:
        """Whether `targets` reads singular values at this step."""

    def targets(self, step: int, layers: Sequence[LayerMeasurement]) -> dict[str, int]:
        """The rank wanted for each layer that should grow, by `Projection.name`, before any limit."""


def in_growth_window(step: int, rank: RankConfig) -> bool:
    """Whether `rank.start_step` and `rank.stop_step` allow growth after `step` steps."""
    return step >= rank.start_step and (rank.stop_step is None or step <= rank.stop_step)


def rank_cap(projection: Projection, quantum: int) -> int:
    """Largest multiple of `quantum` at which factoring this layer does not cost more than the dense weight."""
    return projection.break_even_rank // quantum * quantum


def limit_growth(
    targets: Mapping[str, int], layers: Sequence[LayerMeasurement], rank: RankConfig, step: int
) -> dict[str, int]:
    """The ranks that layers get after `step` steps, by `Projection.name`; layers that stay as they are are left out."""
    if not in_growth_window(step, rank):
        return {}
    granted = {}
    for layer in layers:
        name = layer.projection.name
        if name not in targets:
            continue
        wanted = -(-targets[name] // rank.quantum) * rank.quantum
        doubled = 2 * layer.rank // rank.quantum * rank.quantum
        new_rank = min(wanted, doubled, rank_cap(layer.projection, rank.quantum))
        if new_rank > layer.rank:
            granted[name] = new_rank
    return granted
