"""The control: ranks never change."""

from collections.abc import Sequence

from pretrain.policies.policy import LayerMeasurement


class FixedPolicy:
    """Every layer keeps its initial rank."""

    def due(self, step: int) -> bool:
        return False

    def needs_spectra(self, step: int) -> bool:
        return False

    def targets(self, step: int, layers: Sequence[LayerMeasurement]) -> dict[str, int]:
        return {}
