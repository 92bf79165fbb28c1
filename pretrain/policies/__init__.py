"""Rank policies: pure decisions about which layer grows to which rank, one module each."""

from collections.abc import Mapping, Sequence

from model.config import Projection
from pretrain.policies.budget import affordable_parameters, check_budget
from pretrain.policies.excess_explained_ratio import ExcessExplainedRatioPolicy
from pretrain.policies.explained_ratio import ExplainedRatioPolicy
from pretrain.policies.fixed import FixedPolicy
from pretrain.policies.gradient import GradientPolicy, check_probe
from pretrain.policies.policy import (
    LayerMeasurement,
    Policy,
    RankConfig,
    RankEvent,
    check_due,
    decide_ranks,
    limit_growth,
    rank_cap,
    truncated_ranks,
    with_default_pace,
)
from pretrain.policies.scheduled import ScheduledPolicy, check_events

__all__ = [
    "LayerMeasurement",
    "Policy",
    "RankConfig",
    "RankEvent",
    "affordable_parameters",
    "build_policy",
    "check_due",
    "check_rank_config",
    "check_start_ranks",
    "decide_ranks",
    "limit_growth",
    "rank_cap",
    "truncated_ranks",
    "with_default_pace",
]


def build_policy(rank: RankConfig, steps: int) -> Policy:
    """The policy that `rank.policy` names, for a run of `steps` steps."""
    if rank.policy == "schedule":
        return ScheduledPolicy(rank)
    if rank.policy == "explained_ratio":
        return ExplainedRatioPolicy(rank)
    if rank.policy == "excess_explained_ratio":
        return ExcessExplainedRatioPolicy(rank)
    if rank.policy == "gradient":
        return GradientPolicy(rank, steps)
    return FixedPolicy()


def check_rank_config(rank: RankConfig, factored: Sequence[Projection], steps: int) -> None:
    """ValueError if ranks do not fit the layers, or the policy cannot do what is asked within `steps` steps."""
    if not factored:
        if rank.policy != "fixed":
            raise ValueError(
                f"rank.policy={rank.policy} has nothing to grow in a dense model: set model.parametrization=factored "
                "or rank.policy=fixed"
            )
        return
    if rank.events and rank.policy != "schedule":
        raise ValueError(
            f"rank.events belongs to rank.policy=schedule, and the policy is {rank.policy}: change one of them"
        )
    if rank.policy != "fixed" and rank.initial % rank.quantum:
        raise ValueError(
            f"rank.initial {rank.initial} is not a multiple of rank.quantum {rank.quantum}, and ranks grow in its "
            "multiples: change one of them"
        )
    if rank.stop_step is not None and rank.stop_step < rank.start_step:
        raise ValueError(
            f"rank.stop_step {rank.stop_step} is before rank.start_step {rank.start_step}: change one of them"
        )
    if rank.policy == "schedule":
        check_events(rank, factored, steps)
    elif rank.policy != "fixed" and not any(check_due(step, rank) for step in range(1, steps)):
        raise ValueError(
            f"rank.policy={rank.policy} decides every {rank.check_every} steps from {rank.start_step} to "
            f"{rank.stop_step}, and so never in a run of {steps}: set a lower rank.check_every or raise rank.stop_step"
        )
    if rank.truncate and rank.policy not in ("excess_explained_ratio", "gradient"):
        raise ValueError(
            f"rank.truncate {rank.truncate:g} is for policies that look at what was learned, and rank.policy is "
            f"{rank.policy}: leave rank.truncate out or change the policy"
        )
    check_start_ranks(rank, factored, {projection.name: rank.initial for projection in factored})


def check_start_ranks(rank: RankConfig, factored: Sequence[Projection], ranks: Mapping[str, int]) -> None:
    """ValueError if the policy cannot begin, or go on, at these `ranks`."""
    for projection in factored:
        present = ranks[projection.name]
        if present > projection.break_even_rank:
            raise ValueError(
                f"rank.initial {present} is above the break-even rank {projection.break_even_rank} of "
                f"{projection.name} ({projection.out_features} x {projection.in_features}), where factors cost more "
                "than the dense weight: lower rank.initial"
            )
        if rank.policy != "fixed" and 2 * present < rank.quantum:
            raise ValueError(
                f"rank.quantum {rank.quantum} is more than twice the rank {present} of {projection.name}, and ranks at "
                "most double in one event: lower rank.quantum"
            )
        if rank.policy == "explained_ratio" and present <= rank.buffer:
            raise ValueError(
                f"rank.policy=explained_ratio uses the rank less rank.buffer, and {present} - {rank.buffer} leaves "
                f"none of {projection.name}: raise rank.initial or lower rank.buffer"
            )
    if rank.policy == "gradient":
        check_probe(rank, factored, ranks)
    check_budget(rank, factored, ranks)
