"""What a run has spent on its loss so far: FLOPs as they were executed, and seconds of training.

Seconds are those of steps, of policy decisions and of growth events; validations, checkpoints and the time between two
lives of a run are left out, so that runs that validate or save more often can stand in one picture.
"""

from collections.abc import Mapping
from typing import Any

from model.config import ModelConfig
from model.costs.arithmetic import training_flops_per_token


class Spending:
    """Sums of a run so far: `flops` executed, and `seconds` of training."""

    def __init__(self, model: ModelConfig, ranks: Mapping[str, int]) -> None:
        self.flops, self.seconds = 0.0, 0.0
        self._model = model
        self.set_ranks(ranks)

    def set_ranks(self, ranks: Mapping[str, int]) -> None:
        """Sets the ranks of the coming steps."""
        self._flops_per_sequence = self._model.sequence_length * training_flops_per_token(self._model, ranks)

    def step(self, sequences: int, seconds: float) -> None:
        self.flops += sequences * self._flops_per_sequence
        self.seconds += seconds

    def continue_from(self, line: Mapping[str, Any], step: int) -> None:
        """Continues from a line of `metrics.jsonl`. The steps between that line and `step` were not logged: each is
        assumed to have cost as much as the line's own."""
        unlogged = step - line["step"]
        self.flops = line["training_flops"] + unlogged * line["global_batch"] * self._flops_per_sequence
        self.seconds = line["training_seconds"] + unlogged * line["step_seconds"]

    def record(self) -> dict[str, float]:
        """Fields of a line of `metrics.jsonl`."""
        return {"training_flops": self.flops, "training_seconds": self.seconds}
