"""Where a rank is decided: what a policy wants, held to the limits of all policies.

`limit_growth` says what layers get of the ranks they want:

- ranks are multiples of `rank.quantum`, and at most double per growth event;
- no layer passes the rank at which two factors hold as many numbers as the dense weight;
- all layers together stay within `rank.budget`;
- nothing grows before `rank.start_step` or after `rank.stop_step`.

`truncated_ranks` is the other direction: what a layer may lose because hardly any of its product is there.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from model.config import Projection, round_up
from pretrain.policies.policy import LayerMeasurement, Policy, RankConfig, in_growth_window

_LEARNED = 1e-6
"""A direction below this share of the largest singular value has not begun to learn."""


def decide_ranks(
    policy: Policy, rank: RankConfig, step: int, layers: Sequence[LayerMeasurement], affordable: int | None
) -> dict[str, int]:
    """The new ranks after `step` steps, by `Projection.name`, of the layers that change; empty: none does.

    What truncation frees can be had by other layers at once; a layer that is cut does not grow in the same decision.
    `affordable`: parameters that all layers together may have afterwards; None: any number.
    """
    lower = truncated_ranks(layers, rank)
    room = None if affordable is None else affordable - factor_parameters(layers, lower)
    growing = [layer for layer in layers if layer.projection.name not in lower]
    return lower | limit_growth(policy.targets(step, growing, room), growing, rank, step, room)


def limit_growth(
    targets: Mapping[str, int],
    layers: Sequence[LayerMeasurement],
    rank: RankConfig,
    step: int,
    room: int | None = None,
) -> dict[str, int]:
    """The ranks that layers get after `step` steps, by `Projection.name`; layers that stay as they are are left out.

    Where `room` parameters are not enough for all, layers get one quantum after the other in the order of `targets`.
    """
    if not in_growth_window(step, rank):
        return {}
    by_name = {layer.projection.name: layer for layer in layers}
    wanted = {
        name: min(round_up(target, rank.quantum), largest_rank(by_name[name], rank.quantum))
        for name, target in targets.items()
    }
    present = {name: by_name[name].rank for name in wanted}
    costs = {name: direction_cost(by_name[name].projection) for name in wanted}
    granted = grant_quanta(present, wanted, costs, rank.quantum, room)
    return {name: new for name, new in granted.items() if new > present[name]}


def grant_quanta(
    present: Mapping[str, int], wanted: Mapping[str, int], costs: Mapping[str, int], quantum: int, room: int | None
) -> dict[str, int]:
    """The ranks when layers get one quantum after the other, in the order of `wanted`, up to what they want.

    `costs`: parameters of one direction; `room`: those that there are for all, None: any number. A start off the
    quantum is mended by the first growth.
    """
    granted = {name: present[name] for name in wanted}
    left = math.inf if room is None else room
    growing = list(wanted)
    while growing:
        for name in list(growing):
            step_up = quantum - granted[name] % quantum
            if granted[name] >= wanted[name] or step_up * costs[name] > left:
                growing.remove(name)
                continue
            granted[name] += step_up
            left -= step_up * costs[name]
    return granted


def largest_rank(layer: LayerMeasurement, quantum: int) -> int:
    """The rank that a layer may have after one growth event."""
    doubled = 2 * layer.rank // quantum * quantum
    return min(doubled, rank_cap(layer.projection, quantum))


def rank_cap(projection: Projection, quantum: int) -> int:
    """Largest multiple of `quantum` at which factoring this layer does not cost more than the dense weight."""
    return projection.break_even_rank // quantum * quantum


def direction_cost(projection: Projection) -> int:
    """Parameters of one direction: a row of A and a column of B."""
    return projection.in_features + projection.out_features


def factor_parameters(layers: Sequence[LayerMeasurement], changed: Mapping[str, int]) -> int:
    """Parameters of all factors, with the ranks in `changed` instead of the present ones."""
    return sum(changed.get(layer.projection.name, layer.rank) * direction_cost(layer.projection) for layer in layers)


def truncated_ranks(layers: Sequence[LayerMeasurement], rank: RankConfig) -> dict[str, int]:
    """The lower ranks of layers whose smallest directions hold no more than `rank.truncate` of the energy of B·A.

    A layer whose product is zero has not begun to learn and stays as it is.
    """
    lower = {}
    for layer in layers:
        energy = layer.singular_values**2
        if rank.truncate == 0.0 or not energy.sum() > 0.0:
            continue
        tails = np.append(np.cumsum(energy[::-1])[::-1], 0.0)  # tails[k]: energy beyond the first k
        kept = int(np.argmax(tails <= rank.truncate * energy.sum()))
        new_rank = round_up(max(kept, 1), rank.quantum)
        # The balanced basis divides by the singular values it keeps.
        learned = new_rank < layer.rank and layer.singular_values[new_rank - 1] > _LEARNED * layer.singular_values[0]
        if learned:
            lower[layer.projection.name] = new_rank
    return lower
