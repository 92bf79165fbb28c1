"""All policies by name; builds the one that `rank.policy` names, and checks its settings."""

from collections.abc import Mapping, Sequence

from model.config import Projection
from pretrain.policies.budget import check_budget
from pretrain.policies.excess_explained_ratio import ExcessExplainedRatioPolicy
from pretrain.policies.explained_ratio import ExplainedRatioPolicy
from pretrain.policies.fixed import FixedPolicy
from pretrain.policies.gradient import GradientPolicy
from pretrain.policies.policy import Policy, RankConfig
from pretrain.policies.scheduled import ScheduledPolicy

POLICIES: dict[str, type[Policy]] = {
    "fixed": FixedPolicy,
    "schedule": ScheduledPolicy,
    "explained_ratio": ExplainedRatioPolicy,
    "excess_explained_ratio": ExcessExplainedRatioPolicy,
    "gradient": GradientPolicy,
}
"""Policies that `rank.policy` may name."""


def build_policy(rank: RankConfig, steps: int) -> Policy:
    """The policy that `rank.policy` names, for a run of `steps` steps."""
    return POLICIES[rank.policy](rank, steps)


def with_defaults(rank: RankConfig, steps: int) -> RankConfig:
    """The settings with the policy's defaults filled in, for a run of `steps` steps."""
    return POLICIES[rank.policy].completed(rank, steps)


def check_rank_config(rank: RankConfig, factored: Sequence[Projection], steps: int) -> None:
    """ValueError if ranks do not fit the layers, or the policy cannot do what is asked within `steps` steps."""
    policy = POLICIES[rank.policy]
    if not factored:
        if policy.grows:
            raise ValueError(
                f"rank.policy={rank.policy} has nothing to grow in a dense model: set model.parametrization=factored "
                "or rank.policy=fixed"
            )
        return
    if rank.schedule and not policy.follows_schedule:
        raise ValueError(
            f"rank.schedule belongs to rank.policy=schedule, and the policy is {rank.policy}: change one of them"
        )
    if policy.grows and rank.initial % rank.quantum:
        raise ValueError(
            f"rank.initial {rank.initial} is not a multiple of rank.quantum {rank.quantum}, and ranks grow in its "
            "multiples: change one of them"
        )
    if rank.stop_step is not None and rank.stop_step < rank.start_step:
        raise ValueError(
            f"rank.stop_step {rank.stop_step} is before rank.start_step {rank.start_step}: change one of them"
        )
    policy.check(rank, factored, steps)
    if rank.truncate and not policy.truncates:
        raise ValueError(
            f"rank.truncate {rank.truncate:g} is for policies that look at what was learned, and rank.policy is "
            f"{rank.policy}: leave rank.truncate out or change the policy"
        )
    check_start_ranks(rank, factored, {projection.name: rank.initial for projection in factored})


def check_start_ranks(rank: RankConfig, factored: Sequence[Projection], ranks: Mapping[str, int]) -> None:
    """ValueError if the policy cannot begin, or go on, at these `ranks`."""
    policy = POLICIES[rank.policy]
    for projection in factored:
        present = ranks[projection.name]
        if present > projection.break_even_rank:
            raise ValueError(
                f"rank.initial {present} is above the break-even rank {projection.break_even_rank} of "
                f"{projection.name} ({projection.out_features} x {projection.in_features}), where factors cost more "
                "than the dense weight: lower rank.initial"
            )
        if policy.grows and 2 * present < rank.quantum:
            raise ValueError(
                f"rank.quantum {rank.quantum} is more than twice the rank {present} of {projection.name}, and ranks at "
                "most double in one growth event: lower rank.quantum"
            )
    policy.check_start(rank, factored, ranks)
    check_budget(policy, rank, factored, ranks)
