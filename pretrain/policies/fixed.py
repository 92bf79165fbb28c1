"""The control: ranks never change."""

from collections.abc import Sequence

from pretrain.policies.policy import LayerMeasurement, Policy


class FixedPolicy(Policy):
    """Every layer keeps its initial rank."""

    grows = False

    def due(self, step: int) -> bool:
        return False

    def targets(self, step: int, layers: Sequence[LayerMeasurement], room: int | None) -> dict[str, int]:
        return {}
