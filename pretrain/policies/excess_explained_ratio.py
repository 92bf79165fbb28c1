"""The explained-ratio rule on what was learned: the spectrum of the cumulative update, not of the product.

With s the singular values of D = B·A - B₀·A₀, the update uses

    used = min { k : Σ_{i≤k} s_i² ≥ threshold · Σ_i s_i² }

directions. D of a factored layer has up to 2·rank of them, since B₀ δA and δB A₀ both count. D of an additive layer is
B·A itself and has up to rank, so each of its directions counts twice. A layer's rank is used up when that count is at
least the rank; then it grows to the count + `rank.buffer`.

**Its null is zero.** On factors that were never trained D is nothing but rounding: singular values at or below
`ROUNDING` times the largest of the product are taken for that, so `used` is 0 and nothing grows, whatever the
initialization, the width, the threshold or the buffer (`tools/null_rank.py`). A model trained on labels that were
shuffled does learn something, their frequencies: its updates are narrower than those of real text, but not nothing
(docs/lab-notes.md, at a threshold of 0.9).
"""

from collections.abc import Sequence

from model.spectrum import energy_rank
from pretrain.policies.policy import LayerMeasurement, MeasuringPolicy

ROUNDING = 0.005
"""Relative error of rounding both factors to bf16, up to 2⁻⁹ for each entry. A smaller update cannot be told from
rounding."""


def used_rank(layer: LayerMeasurement, threshold: float) -> int:
    """Directions that hold `threshold` of the energy of the cumulative update; 0 before anything was learned."""
    product = layer.singular_values
    floor = ROUNDING * float(product[0]) if len(product) else 0.0
    return energy_rank(layer.update_values[layer.update_values > floor], threshold)


def used_up(layer: LayerMeasurement, threshold: float) -> int:
    """The rank that the update uses up. An update that uses half of the directions it can have uses up all of the
    rank."""
    return used_rank(layer, threshold) * (2 if layer.projection.additive else 1)


class ExcessExplainedRatioPolicy(MeasuringPolicy):
    """Grows the layers whose update uses their rank up, the fullest first."""

    needs = frozenset({"product", "update"})
    truncates = True

    def targets(self, step: int, layers: Sequence[LayerMeasurement], room: int | None) -> dict[str, int]:
        used = {layer.projection.name: used_up(layer, self._rank.threshold) for layer in layers}
        full = [layer for layer in layers if used[layer.projection.name] >= layer.rank]
        full.sort(key=lambda layer: used[layer.projection.name] / layer.rank, reverse=True)
        return {layer.projection.name: used[layer.projection.name] + self._rank.buffer for layer in full}
