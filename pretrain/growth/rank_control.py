"""Asks the policy of a run: measures what it needs to know, and counts what asking costs.

A policy is a pure decision about numbers; a growth event carries out what it decides. Between the two stands
`RankControl`: it attaches probes to the steps before a decision, takes the measurements, and knows the budget.
"""

import statistics
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from model.config import factored_projections
from model.costs.arithmetic import gram_flops, probe_flops_per_token
from model.gpt import EspalierModel
from pretrain.checkpoint.format import open_tensors
from pretrain.checkpoint.reader import CheckpointReader
from pretrain.config.run import RunConfig
from pretrain.distributed import is_first_process, together
from pretrain.errors import CheckpointError
from pretrain.growth.event import (
    RankMeasurement,
    RankPlan,
    layer_measurements,
    plan_ranks,
)
from pretrain.growth.initial_values import initial_factors
from pretrain.growth.probe import GradientProbe
from pretrain.growth.spectra import measure_spectra, measure_updates
from pretrain.policies.budget import affordable_parameters
from pretrain.policies.gradient import PROBED_STEPS
from pretrain.policies.select import build_policy
from pretrain.schedule import global_batch_at
from pretrain.train_state import TrainState

PROBE_NAME = "probe.safetensors"
"""Extra file of a checkpoint written between two probed steps."""


@dataclass(frozen=True)
class Answer:
    """What the policy wants, and what asking it cost."""

    plan: RankPlan | None
    """New ranks; None if ranks stay."""
    directions: Mapping[str, Tensor]
    """Measured rows `(any, in/tp)` for layers that grow, by `Projection.name`."""
    seconds: float
    """Seconds of measuring and deciding, and those by which probed steps were longer than the other ones."""
    flops: float
    """FLOPs of Gram matrices, and of the probes in the steps before."""


class RankControl:
    """Decides about the ranks of one run."""

    def __init__(self, config: RunConfig, model: EspalierModel) -> None:
        self._config = config
        self._policy = build_policy(config.rank, config.train.steps)
        self._probe = GradientProbe(config.rank.probe, config.run.seed) if "demand" in self._policy.needs else None
        updates_needed = "update" in self._policy.needs
        self._initial = together(lambda: initial_factors(model, config)) if updates_needed else {}
        self._plain_seconds: list[float] = []
        self._probed_seconds: list[float] = []

    def due(self, step: int) -> bool:
        """Whether the policy decides after `step` steps."""
        return self._policy.due(step)

    def ask(self, model: EspalierModel, state: TrainState) -> Answer:
        """The policy's answer after the steps so far, the same on all processes; a collective."""
        start = time.perf_counter()
        flops = self._flops(model, state.step)
        needs = self._policy.needs
        measured = RankMeasurement(
            product=measure_spectra(model) if "product" in needs else {},
            update=measure_updates(model, self._initial) if "update" in needs else {},
            demand={} if self._probe is None else self._probe.demand(model),
        )
        affordable = self._affordable_parameters(model, state)
        plan = plan_ranks(model, self._policy, self._config.rank, state.step, measured, affordable)
        directed = measured.demand if self._config.rank.directed else {}
        directions = {name: demand.rows for name, demand in directed.items()}
        return Answer(plan, directions, time.perf_counter() - start + self._extra_seconds(), flops)

    def mean_untrained_rank(self, model: EspalierModel) -> float | None:
        """The mean rank that the policy would reach if training never changed the factors (the policy's null); None if
        it would not grow them."""
        if not self._policy.grows_untrained:
            return None
        layers = layer_measurements(model, RankMeasurement(product=measure_spectra(model)))
        ranks = self._policy.untrained_ranks(layers)
        return sum(ranks.values()) / len(ranks)

    def _affordable_parameters(self, model: EspalierModel, state: TrainState) -> int | None:
        return affordable_parameters(
            self._config.rank,
            factored_projections(self._config.model),
            model.ranks(),
            state.growth,
            state.consumed_samples,
            self._config.samples_at_end(state.step, state.consumed_samples),
        )

    # Probed steps -----------------------------------------------------------------------------------------------------

    def before_step(self, model: EspalierModel, step: int) -> None:
        """Attaches the probe if a decision waits for the gradient of training step `step`."""
        left = self._steps_to_decision(step)
        if self._probe is not None and left is not None:
            self._probe.attach(model, step, left)

    def after_step(self, model: EspalierModel, loss_scale: float) -> None:
        """Takes what the probe has seen in a step that it `probes`; a collective."""
        if self._probe is not None:
            self._probe.collect(model, loss_scale)

    def probes(self, step: int) -> bool:
        """Whether a decision waits for the gradient of training step `step`."""
        return self._steps_to_decision(step) is not None

    def note_seconds(self, step: int, seconds: float) -> None:
        """Notes the seconds of training step `step`."""
        if self._probe is not None:
            (self._probed_seconds if self.probes(step) else self._plain_seconds).append(seconds)

    def _steps_to_decision(self, step: int) -> int | None:
        if self._probe is None:
            return None
        return next((left for left in range(1, PROBED_STEPS + 1) if self._policy.due(step + left)), None)

    # Costs ------------------------------------------------------------------------------------------------------------

    def _flops(self, model: EspalierModel, step: int) -> float:
        """FLOPs of the measurements for the coming decision: Gram matrices, and the probes of the steps before."""
        config, ranks, flops = self._config.model, model.ranks(), 0
        if "product" in self._policy.needs:
            flops += gram_flops(config, ranks)
        if "update" in self._policy.needs:
            flops += gram_flops(config, {name: rank + len(self._initial[name][0]) for name, rank in ranks.items()})
        if self._probe is not None and self._probe.measuring:
            train = self._config.train
            batches = [
                global_batch_at(step - left, train.global_batch, train.batch_ramp)
                for left in range(1, PROBED_STEPS + 1)
            ]
            tokens = sum(batches) * config.sequence_length
            flops += tokens * probe_flops_per_token(config, ranks, self._config.rank.probe)
        return float(flops)

    def _extra_seconds(self) -> float:
        """Seconds by which the probed steps since the last decision were longer than the plain ones; 0 if there are
        none of either kind. It compares medians, since single steps can be far longer than others."""
        plain, probed = self._plain_seconds, self._probed_seconds
        self._plain_seconds, self._probed_seconds = [], []
        return len(probed) * (statistics.median(probed) - statistics.median(plain)) if plain and probed else 0.0

    # Checkpoints ------------------------------------------------------------------------------------------------------

    def extra_files(self, model: EspalierModel, stack: ExitStack) -> dict[str, Path]:
        """Files of a measurement in progress, for a checkpoint; a collective. They exist on process 0, from which
        checkpoints take extra files, until `stack` is closed."""
        measured = {} if self._probe is None else self._probe.tensors(model)
        return {PROBE_NAME: together(lambda: _written_probe(measured, stack))} if measured else {}

    def restore(self, model: EspalierModel, reader: CheckpointReader) -> None:
        """Continues a measurement that was in progress when the checkpoint was written."""
        if self._probe is not None and PROBE_NAME in reader.extra_files:
            handle, shapes = open_tensors(reader.extra_file(PROBE_NAME))
            self._probe.load(model, {name: handle.get_tensor(name) for name in shapes})


def _written_probe(tensors: dict[str, Tensor], stack: ExitStack) -> Path:
    if not is_first_process():
        return Path(PROBE_NAME)
    try:
        path = Path(stack.enter_context(tempfile.TemporaryDirectory())) / PROBE_NAME
        save_file(tensors, path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{PROBE_NAME} could not be written ({error}): free space in the temporary folder, or set TMPDIR"
        ) from error
    return path
