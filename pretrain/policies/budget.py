"""What `rank.budget` leaves for the ranks of all factored layers together.

A budget of parameters: Σ rank·(in + out) ≤ budget · Σ in·out, at any time. A budget of FLOPs, which are proportional to
parameters times samples: what was spent so far, plus what the present ranks will spend until the end, is at most that
share of what the dense layers would spend over the whole run.
"""

from collections.abc import Mapping, Sequence

from model.config import Projection
from pretrain.policies.limits import direction_cost
from pretrain.policies.policy import Policy, RankConfig
from pretrain.train_state import GrowthRecord, rank_periods


def dense_parameters(factored: Sequence[Projection]) -> int:
    """Numbers in the dense weights that the factors stand for."""
    return sum(projection.in_features * projection.out_features for projection in factored)


def affordable_parameters(
    rank: RankConfig,
    factored: Sequence[Projection],
    ranks: Mapping[str, int],
    growth: Sequence[GrowthRecord],
    consumed_samples: int,
    samples_of_the_run: int,
) -> int | None:
    """Most parameters that all factors may have from now on; None without a budget.

    `ranks`: the present ones; `growth`: the growth events so far. The last two arguments count sequences: consumed so
    far, and at the end of the run.
    """
    if rank.budget is None:
        return None
    allowed = rank.budget * dense_parameters(factored)
    if rank.budget_unit == "parameters":
        return int(allowed)
    periods = rank_periods(ranks, growth, consumed_samples)
    spent = sum(_parameters(factored, period.ranks) * period.samples for period in periods)
    return int((allowed * samples_of_the_run - spent) / (samples_of_the_run - consumed_samples))


def _parameters(factored: Sequence[Projection], ranks: Mapping[str, int]) -> int:
    return sum(ranks[projection.name] * direction_cost(projection) for projection in factored)


def check_budget(
    policy: type[Policy], rank: RankConfig, factored: Sequence[Projection], ranks: Mapping[str, int]
) -> None:
    """ValueError if the `ranks` at the start already cost more than the budget, if the policy refuses a budget that is
    set, or if it requires one that is not set."""
    if rank.budget is None:
        if rank.budget_unit != "parameters":
            raise ValueError(f"rank.budget_unit is {rank.budget_unit}, and there is no budget: set rank.budget")
        if policy.budget == "required":
            raise ValueError(f"rank.policy={rank.policy} grows up to a budget, and there is none: set rank.budget")
        return
    if policy.budget == "refused":
        raise ValueError(
            f"rank.budget {rank.budget:g} is for policies that decide by themselves, and rank.policy is {rank.policy}: "
            "leave rank.budget out or change the policy"
        )
    start, dense = _parameters(factored, ranks), dense_parameters(factored)
    if start > rank.budget * dense:
        raise ValueError(
            f"rank.budget {rank.budget:g} allows {int(rank.budget * dense):,} parameters in factored layers, and "
            f"rank {_rank_text(ranks)} starts with {start:,} ({start / dense:.3f} of the dense {dense:,}): raise "
            "rank.budget or start with a lower rank.initial"
        )


def _rank_text(ranks: Mapping[str, int]) -> str:
    """`16`, or `8 to 32` where layers differ."""
    least, most = min(ranks.values()), max(ranks.values())
    return f"{least}" if least == most else f"{least} to {most}"
