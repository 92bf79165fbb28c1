"""Which ranks a run will have: at the start, after the events of a schedule, and at most.

A measuring policy decides by what it measures, so only its bounds are known beforehand: the break-even rank of each
layer, `rank.budget`, and that a rank at most doubles in one decision.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from model.config import ModelConfig, factored_projections
from pretrain.config.run import RunConfig
from pretrain.policies import affordable_parameters, check_due, rank_cap
from pretrain.policies.policy import direction_cost
from pretrain.schedule import samples_before


@dataclass(frozen=True)
class Moment:
    """The ranks at one time of the run."""

    name: str
    model: ModelConfig
    ranks: Mapping[str, int]
    """By `Projection.name`; empty for a dense model."""


def moments(config: RunConfig) -> list[Moment]:
    """The run from its start to its largest ranks, and the dense model for comparison."""
    model, ranks = config.model, config.initial_ranks()
    found = [Moment("start", model, ranks)] if ranks else []
    if config.rank.policy == "schedule":
        for event in config.rank.events:
            found.append(Moment(f"step {event.step}", model, dict.fromkeys(ranks, event.rank)))
    elif ranks and config.rank.policy != "fixed":
        found.append(Moment("cap" if config.rank.budget is None else "budget", model, largest_ranks(config)))
    return [*found, Moment("dense", dense_twin(model), {})]


def dense_twin(model: ModelConfig) -> ModelConfig:
    """The same architecture without factors."""
    return model.model_copy(update={"parametrization": "dense", "trained": "all"})


def largest_ranks(config: RunConfig) -> dict[str, int]:
    """The most that growth can come to when layers share it evenly. A budget of FLOPs leaves most for late growth, so
    it is taken as if nothing had grown before the last decision."""
    rank, train, ranks = config.rank, config.train, config.initial_ranks()
    layers = {projection.name: projection for projection in factored_projections(config.model)}
    decisions = [step for step in range(1, train.steps) if check_due(step, rank)]
    consumed, whole = (
        samples_before(step, train.global_batch, train.batch_ramp) for step in (decisions[-1], train.steps)
    )
    affordable = affordable_parameters(rank, list(layers.values()), ranks, [], consumed, whole)
    left = math.inf if affordable is None else affordable - sum(ranks[n] * direction_cost(p) for n, p in layers.items())
    caps = {n: min(rank_cap(p, rank.quantum), ranks[n] << len(decisions)) for n, p in layers.items()}
    growing = list(layers)
    while growing:
        for name in list(growing):
            cost = rank.quantum * direction_cost(layers[name])
            if cost > left or ranks[name] + rank.quantum > caps[name]:
                growing.remove(name)
                continue
            ranks[name] += rank.quantum
            left -= cost
    return ranks
