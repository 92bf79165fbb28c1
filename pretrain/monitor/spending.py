"""What a run has spent on its loss so far: FLOPs as they were executed, and seconds of training.

Seconds are those of steps, of policy decisions and of growth events; validations, checkpoints and the time between two
lives of a run are left out, so that runs that validate or save more often can stand in one picture.
"""

from collections.abc import Mapping
from typing import Any

from model.config import ModelConfig
from model.costs.arithmetic import training_flops_per_token


class Spending:
    """Adds up steps; `flops` and `seconds` are what all of them took."""

    def __init__(self, model: ModelConfig, ranks: Mapping[str, int]) -> None:
        self.flops, self.seconds = 0.0, 0.0
        self._model = model
        self.set_ranks(ranks)

    def set_ranks(self, ranks: Mapping[str, int]) -> None:
        """Of the steps from now on."""
        self._flops_per_sequence = self._model.sequence_length * training_flops_per_token(self._model, ranks)

    def step(self, sequences: int, seconds: float) -> None:
        self.flops += sequences * self._flops_per_sequence
        self.seconds += seconds

    def take_up(self, line: Mapping[str, Any], step: int) -> None:
        """Goes on from a line of `metrics.jsonl`; of the steps between it and `step`, which were not logged, each is
        taken to have cost what the line's own did."""
        unlogged = step - line["step"]
        self.flops = line["training_flops"] + unlogged * line["global_batch"] * self._flops_per_sequence
        self.seconds = line["training_seconds"] + unlogged * line["step_seconds"]

    def record(self) -> dict[str, float]:
        """Fields of a line of `metrics.jsonl`."""
        return {"training_flops": self.flops, "training_seconds": self.seconds}
