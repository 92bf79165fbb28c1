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

from collections.abc import Mapping, Sequence

import numpy as np

from model.config import Projection
from pretrain.policies.limits import limit_growth
from pretrain.policies.policy import LayerMeasurement, MeasuringPolicy, RankConfig


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


class ExplainedRatioPolicy(MeasuringPolicy):
    """Grows every layer to the used rank that explains its product, plus the buffer."""

    needs = frozenset({"product"})
    grows_untrained = True

    def targets(self, step: int, layers: Sequence[LayerMeasurement], room: int | None) -> dict[str, int]:
        wanted = {layer.projection.name: self._wanted_rank(layer) for layer in layers}
        current = {layer.projection.name: layer.rank for layer in layers}
        return {name: rank for name, rank in wanted.items() if rank > current[name]}

    def untrained_ranks(self, layers: Sequence[LayerMeasurement]) -> dict[str, int]:
        """Ranks at which the rule stops on layers that training never changes.

        Growth preserves the function, so it only adds zeros to the singular values, until the largest explain enough.
        """
        unbounded = self._rank.model_copy(update={"start_step": 0, "stop_step": None, "budget": None})
        current = list(layers)
        while grown := limit_growth(self.targets(0, current, None), current, unbounded, 0):
            current = [_with_rank(layer, grown.get(layer.projection.name, layer.rank)) for layer in current]
        return {layer.projection.name: layer.rank for layer in current}

    @classmethod
    def check_start(cls, rank: RankConfig, factored: Sequence[Projection], ranks: Mapping[str, int]) -> None:
        for projection in factored:
            present = ranks[projection.name]
            if present <= rank.buffer:
                raise ValueError(
                    f"rank.policy=explained_ratio uses the rank less rank.buffer, and {present} - {rank.buffer} leaves "
                    f"none of {projection.name}: raise rank.initial or lower rank.buffer"
                )

    def _wanted_rank(self, layer: LayerMeasurement) -> int:
        full = min(layer.projection.in_features, layer.projection.out_features)
        buffer = self._rank.buffer
        return buffer + explaining_rank(layer.singular_values, full, layer.rank - buffer, buffer, self._rank.threshold)


def _with_rank(layer: LayerMeasurement, rank: int) -> LayerMeasurement:
    padded = np.concatenate([layer.singular_values, np.zeros(rank - layer.rank)])
    return LayerMeasurement(layer.projection, rank, padded)
