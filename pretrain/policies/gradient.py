"""Growth where the gradient asks for it: layers compete for one budget, and grow along what they lack.

`pretrain/growth/probe.py` measures, for each layer, the energy of the dense gradient G = ∂L/∂W along its leading
directions outside the spans of both factors, as far as two independent batches agree on it (`LayerMeasurement.demand`).
A quantum of directions is worth its energy over the parameters it costs,

    worth = Σ demand / (quantum · (in + out)),

and the quanta worth most are granted until the event's share of the budget is spent. A share is what is left of the
budget, divided evenly over the decisions left until `rank.stop_step`. The last quantum may exceed the share, so that
expensive layers can grow too; later shares are smaller in return. Without a budget every layer with a demand gets one
quantum.

A layer takes part only if its update uses half of its rank (`used_rank` of the cumulative update): half of the
directions that an additive layer can have, a quarter of those of a factored one. That is the null of this policy:
energy outside the span is 1 - rank/in on untrained factors whatever the labels, and agreement alone does not tell
learning either, since every batch agrees about the frequencies of the labels. Comparing with shuffled labels on the
spot does not help: a trained model meets them with a gradient that is orders of magnitude larger (docs/lab-notes.md).
"""

import heapq
from collections.abc import Mapping, Sequence

from model.config import Projection
from pretrain.policies.excess_explained_ratio import used_rank
from pretrain.policies.limits import direction_cost, largest_rank
from pretrain.policies.policy import LayerMeasurement, MeasuringPolicy, RankConfig, in_growth_window

PROBED_STEPS = 3
"""Number of training steps before a decision in which `pretrain/growth/probe.py` measures."""

NEEDED_SHARE = 0.5
"""Share of a layer's rank that its update must use before it may ask for more."""


class GradientPolicy(MeasuringPolicy):
    """Grants quanta of directions to the layers where they are worth most."""

    needs = frozenset({"product", "update", "demand"})
    truncates = True

    def targets(self, step: int, layers: Sequence[LayerMeasurement], room: int | None) -> dict[str, int]:
        asking = [layer for layer in layers if self._may_ask(layer)]
        if room is None:
            return {layer.projection.name: layer.rank + self._rank.quantum for layer in asking}
        share = room / self._decisions_left(step)
        offers = [offer for layer in asking for offer in self._offers(layer)]
        heapq.heapify(offers)
        granted: dict[str, int] = {}
        while offers and share > 0:
            _, name, rank, cost = heapq.heappop(offers)
            if cost <= room and granted.get(name, rank) == rank:  # later quanta only on top of earlier ones
                share, room = share - cost, room - cost
                granted[name] = rank + self._rank.quantum
        return granted

    @classmethod
    def check_start(cls, rank: RankConfig, factored: Sequence[Projection], ranks: Mapping[str, int]) -> None:
        check_probe(rank, factored, ranks)

    def _may_ask(self, layer: LayerMeasurement) -> bool:
        used = used_rank(layer, self._rank.threshold)
        return used >= NEEDED_SHARE * layer.rank and bool(layer.demand[:1].sum() > 0.0)

    def _offers(self, layer: LayerMeasurement) -> list[tuple[float, str, int, int]]:
        """(-worth, name, rank before, cost) of each quantum for which there are measured directions. The last quantum
        may have fewer directions than a full one, and is worth less accordingly."""
        quantum, projection = self._rank.quantum, layer.projection
        cost = quantum * direction_cost(projection)
        room = largest_rank(layer, quantum) - layer.rank
        return [
            (-float(layer.demand[first : first + quantum].sum()) / cost, projection.name, layer.rank + first, cost)
            for first in range(0, min(room, len(layer.demand)), quantum)
        ]

    def _decisions_left(self, step: int) -> int:
        last = self._steps - 1
        return sum(in_growth_window(later, self._rank) for later in range(step, last + 1, self._rank.check_every)) or 1


def check_probe(rank: RankConfig, factored: Sequence[Projection], ranks: Mapping[str, int]) -> None:
    """ValueError if a probe does not fit beside the factors at the start, or if decisions leave no steps to measure."""
    for projection in factored:
        left = min(projection.in_features, projection.out_features) - ranks[projection.name]
        if rank.probe > left:
            raise ValueError(
                f"rank.probe {rank.probe} is wider than what rank {ranks[projection.name]} leaves of {projection.name} "
                f"({projection.out_features} x {projection.in_features}), {left} directions: lower rank.probe"
            )
    if rank.probe < rank.quantum:
        raise ValueError(
            f"rank.probe {rank.probe} finds fewer directions than one rank.quantum {rank.quantum} has: "
            "raise rank.probe or lower rank.quantum"
        )
    if 0 < rank.start_step < PROBED_STEPS:
        raise ValueError(
            f"rank.start_step {rank.start_step} leaves no {PROBED_STEPS} steps to measure gradients before the first "
            f"decision: set it to 0, or to {PROBED_STEPS} or more"
        )
    if rank.check_every < PROBED_STEPS:
        raise ValueError(
            f"rank.check_every {rank.check_every} leaves no {PROBED_STEPS} steps to measure gradients before a "
            f"decision: raise it to {PROBED_STEPS} or more"
        )
