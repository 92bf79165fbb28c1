"""The explained-ratio rule of InRank-Efficient (arXiv 2306.11250), kept for fidelity and comparison.

A layer has rank r + b: r used directions and b = `rank.buffer` more. With s all min(in, out) singular values of B·A,
the zeros beyond its rank included, k directions explain

    ratio(k) = 1 - var(s with its k largest entries zeroed) / var(s)

k runs over r … r+b-1; the first with a ratio above `rank.threshold` becomes the used rank (none: the last one), and
the layer's rank becomes k + b. That is the published code, except that directions we add start with a zero column in
B.

**The criterion measures its own initialisation.** On factors that were never trained, initialised and buffered as in
the published code, it goes on growing until it stops near the ranks reported as intrinsic to the trained networks (254
for GPT-2 small's MLP, 287 for GPT-2 medium's; `tools/null_rank.py`). `untrained_ranks` gives the number for a run of
ours; show it beside any rank that this policy finds.
"""

from collections.abc import Sequence

import numpy as np

from pretrain.policies.policy import LayerMeasurement, Measured, RankConfig, check_due, limit_growth


def explained_ratio(singular_values: np.ndarray, kept: int) -> float:
    """Share of the variance of all singular values that the `kept` largest explain; 1 for a layer that is zero."""
    variance = float(np.var(singular_values))
    if variance == 0.0:
        return 1.0
    tail = singular_values.copy()
    tail[:kept] = 0.0
    return 1.0 - float(np.var(tail)) / variance


def explaining_rank(singular_values: np.ndarray, full: int, used: int, buffer: int, threshold: float) -> int:
    """The used rank that the rule asks for; `singular_values (<= full,)` largest first, full = min(in, out)."""
    spectrum = np.zeros(full)
    spectrum[: len(singular_values)] = singular_values
    for kept in range(used, used + buffer):
        if explained_ratio(spectrum, kept) > threshold:
            return kept
    return used + buffer - 1


class ExplainedRatioPolicy:
    """Grows every layer to the used rank that explains its product, plus the buffer."""

    needs: frozenset[Measured] = frozenset({"product"})

    def __init__(self, rank: RankConfig) -> None:
        self._rank = rank

    def due(self, step: int) -> bool:
        return check_due(step, self._rank)

    def targets(self, step: int, layers: Sequence[LayerMeasurement], room: int | None) -> dict[str, int]:
        wanted = {layer.projection.name: self._wanted_rank(layer) for layer in layers}
        current = {layer.projection.name: layer.rank for layer in layers}
        return {name: rank for name, rank in wanted.items() if rank > current[name]}

    def _wanted_rank(self, layer: LayerMeasurement) -> int:
        full = min(layer.projection.in_features, layer.projection.out_features)
        buffer = self._rank.buffer
        return buffer + explaining_rank(layer.singular_values, full, layer.rank - buffer, buffer, self._rank.threshold)


def untrained_ranks(layers: Sequence[LayerMeasurement], rank: RankConfig) -> dict[str, int]:
    """The null of a run: the rank each layer would reach if training never changed it, from its measurement before
    step 0.

    Growth preserves the function, so it adds zeros to the singular values and the rule soon stops.
    """
    policy = ExplainedRatioPolicy(rank)
    unbounded = rank.model_copy(update={"start_step": 0, "stop_step": None, "budget": None})
    current = list(layers)
    while True:
        grown = limit_growth(policy.targets(0, current, None), current, unbounded, 0)
        if not grown:
            return {layer.projection.name: layer.rank for layer in current}
        current = [_with_rank(layer, grown.get(layer.projection.name, layer.rank)) for layer in current]


def _with_rank(layer: LayerMeasurement, rank: int) -> LayerMeasurement:
    padded = np.concatenate([layer.singular_values, np.zeros(rank - layer.rank)])
    return LayerMeasurement(layer.projection, rank, padded)
