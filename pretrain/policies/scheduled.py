"""Growth by a given list of steps and ranks, the same for every factored layer.

It measures nothing, so it grows untrained factors as readily as trained ones: compare it with a fixed rank of the
same budget.
"""

from collections.abc import Sequence

from model.config import Projection
from pretrain.policies.policy import LayerMeasurement, Policy, RankConfig, in_growth_window


class ScheduledPolicy(Policy):
    """Gives every layer the rank of a schedule entry after the entry's step."""

    follows_schedule = True

    def __init__(self, rank: RankConfig, steps: int) -> None:
        super().__init__(rank, steps)
        self._ranks = {entry.step: entry.rank for entry in rank.schedule}

    def due(self, step: int) -> bool:
        return step in self._ranks

    def targets(self, step: int, layers: Sequence[LayerMeasurement], room: int | None) -> dict[str, int]:
        wanted = self._ranks[step]
        return {layer.projection.name: wanted for layer in layers if layer.rank < wanted}

    @classmethod
    def check(cls, rank: RankConfig, factored: Sequence[Projection], steps: int) -> None:
        check_schedule(rank, factored, steps)


def check_schedule(rank: RankConfig, projections: Sequence[Projection], steps: int) -> None:
    """ValueError if an entry of the schedule could not happen exactly as written."""
    if not rank.schedule:
        raise ValueError(
            "rank.policy=schedule needs at least one step and rank: set rank.schedule, or rank.policy=fixed"
        )
    narrowest = min(projections, key=lambda projection: projection.break_even_rank)
    step, current = 0, rank.initial
    for entry in rank.schedule:
        here = f"rank.schedule asks for rank {entry.rank} at step {entry.step}"
        if entry.step <= step:
            raise ValueError(f"{here}, behind an entry at step {step}: put the entries in ascending order of step")
        if entry.rank <= current:
            raise ValueError(
                f"{here}, where it is {current} already: let the ranks ascend from rank.initial {rank.initial}"
            )
        if entry.rank % rank.quantum:
            raise ValueError(f"{here}, which is no multiple of rank.quantum {rank.quantum}: change one of them")
        if entry.rank > 2 * current:
            raise ValueError(
                f"{here}, more than double the {current} before it: put an entry of rank {2 * current} between"
            )
        if entry.rank > narrowest.break_even_rank:
            raise ValueError(
                f"{here}, above the break-even rank {narrowest.break_even_rank} of {narrowest.name} "
                f"({narrowest.out_features} x {narrowest.in_features}), where factors cost more than the dense weight: "
                "lower it"
            )
        if not in_growth_window(entry.step, rank):
            stop = "the end" if rank.stop_step is None else str(rank.stop_step)
            raise ValueError(
                f"{here}, outside rank.start_step {rank.start_step} to rank.stop_step {stop}: "
                "move the entry or the limits"
            )
        if entry.step >= steps:
            raise ValueError(f"{here}, and the run ends at train.steps {steps}: move the entry or lengthen the run")
        step, current = entry.step, entry.rank
