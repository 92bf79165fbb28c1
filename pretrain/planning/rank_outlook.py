"""Which ranks a run will have: at the start, after the entries of a schedule, and at most.

A measuring policy decides by what it measures, so only its bounds are known beforehand: the break-even rank of each
layer, `rank.budget`, and that a rank at most doubles in one decision.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from model.config import ModelConfig, factored_projections
from pretrain.config.run import RunConfig
from pretrain.policies.budget import affordable_parameters
from pretrain.policies.limits import direction_cost, grant_quanta, rank_cap
from pretrain.policies.policy import check_due
from pretrain.policies.select import POLICIES
from pretrain.schedule import samples_before


@dataclass(frozen=True)
class Outlook:
    """The ranks at one time of the run."""

    name: str
    model: ModelConfig
    ranks: Mapping[str, int]
    """Ranks by `Projection.name`; empty for a dense model."""


def outlooks(config: RunConfig) -> list[Outlook]:
    """The run from its start to its largest ranks, and the dense model for comparison."""
    model, ranks = config.model, config.initial_ranks()
    found = [Outlook("start", model, ranks)] if ranks else []
    for entry in config.rank.schedule:
        found.append(Outlook(f"step {entry.step}", model, dict.fromkeys(ranks, entry.rank)))
    if ranks and POLICIES[config.rank.policy].measures:
        found.append(Outlook("cap" if config.rank.budget is None else "budget", model, largest_ranks(config)))
    return [*found, Outlook("dense", dense_twin(model), {})]


def dense_twin(model: ModelConfig) -> ModelConfig:
    """The same architecture without factors."""
    return model.model_copy(update={"parametrization": "dense", "trained": "all"})


def largest_ranks(config: RunConfig) -> dict[str, int]:
    """The largest ranks that growth can reach when layers share it evenly.

    A budget of FLOPs leaves most for late growth, so the ranks are computed as if nothing grew before the last
    decision.
    """
    rank, train, ranks = config.rank, config.train, config.initial_ranks()
    layers = {projection.name: projection for projection in factored_projections(config.model)}
    decisions = [step for step in range(1, train.steps) if check_due(step, rank)]
    consumed, whole = (
        samples_before(step, train.global_batch, train.batch_ramp) for step in (decisions[-1], train.steps)
    )
    affordable = affordable_parameters(rank, list(layers.values()), ranks, [], consumed, whole)
    costs = {name: direction_cost(projection) for name, projection in layers.items()}
    room = None if affordable is None else affordable - sum(ranks[name] * cost for name, cost in costs.items())
    caps = {n: min(rank_cap(p, rank.quantum), ranks[n] << len(decisions)) for n, p in layers.items()}
    return grant_quanta(ranks, caps, costs, rank.quantum, room)
