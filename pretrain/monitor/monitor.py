"""Shows a run while it goes: TensorBoard, `metrics.jsonl`, `events.jsonl`, the console, and the summary at its end.

Process 0 has an active monitor; those of the other processes do nothing, so the training loop has no branches. `step`
counts the optimizer steps taken.

Training never ends because it could not be shown: a writer that fails with an OSError (a full disk) is switched off
after one warning. A failed checkpoint is another matter (`pretrain/checkpoint/saver.py`).
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from model.config import factored_projections, projections
from model.costs.arithmetic import total_parameters, trained_parameters, training_flops_per_token
from pretrain.config.run import RunConfig
from pretrain.devices import peak_flops
from pretrain.disk import JsonLines, json_text, replace_text
from pretrain.loss import perplexity
from pretrain.monitor import figures
from pretrain.monitor.board import Board, memory_scalars
from pretrain.monitor.console import Console
from pretrain.monitor.spectrum_report import (
    Measurement,
    effective_ranks_of_updates,
    rounded,
    spectrum_scalars,
    tracking_record,
    tracking_scalars,
)
from pretrain.monitor.spending import Spending
from pretrain.monitor.summary import dense_flops_ratio, summary_text
from pretrain.train_state import GrowthRecord, StepMetrics, TrainState, Validation

SPECTRA_FILE = "spectra.json"
"""The newest singular values of the factored layers."""


class Monitor:
    """Shows a run. `ranks`: the model's present ones; `state`: the state at the start or of the resumed checkpoint."""

    def __init__(
        self,
        folder: Path,
        config: RunConfig,
        ranks: Mapping[str, int],
        *,
        active: bool,
        processes: int = 1,
        state: TrainState | None = None,
    ) -> None:
        state = state or TrainState()
        resumed_step = state.step
        self._folder, self._config, self._ranks = folder, config, dict(ranks)
        self._active, self._processes = active, processes
        self._console = Console(config.train.steps, resumed_step, silent=not active)
        self._layers = factored_projections(config.model)
        self._labels = {layer.name: layer.label for layer in projections(config.model)}
        self.rank_history = [(period.step, period.ranks) for period in state.rank_periods(ranks)]
        """The steps at which ranks changed, and the ranks from there on."""
        self._since_logged: list[StepMetrics] = []
        self._warned = False
        self._board: Board | None = None
        self._spending = Spending(config.model, ranks)
        self._lm_loss: float | None = None
        self._metrics, self._events = JsonLines(folder / "metrics.jsonl"), JsonLines(folder / "events.jsonl")
        self._tracking = JsonLines(folder / "tracking.jsonl")
        self._tracked: list[tuple[int, dict[str, float]]] = []
        if not active:
            return
        self._attempt(lambda: self._open(resumed_step))
        self._show_ranks(resumed_step)

    def _open(self, resumed_step: int) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._metrics.cut(resumed_step)
        self._events.cut(None)
        self._tracking.cut(resumed_step)
        self._tracked = [(line["step"], effective_ranks_of_updates(line)) for line in self._tracking.read()]
        logged = self._metrics.read()
        if logged and "training_flops" in logged[-1]:  # lines of earlier versions lack it
            self._spending.continue_from(logged[-1], resumed_step)
        self._board = Board(self._folder / "tensorboard", self._config, resumed_step, self._spending)

    def train_step(self, step: int, metrics: StepMetrics) -> None:
        """Takes a step's metrics; the first, the last and every train.log_every-th are shown, with the pace since the
        last one shown."""
        if not self._active:
            return
        self._since_logged.append(metrics)
        self._spending.step(metrics.global_batch, metrics.step_seconds)
        self._lm_loss = metrics.lm_loss
        if step != 1 and step % self._config.train.log_every and step != self._config.train.steps:
            return
        seconds = sum(one.step_seconds for one in self._since_logged)
        sequences = sum(one.global_batch for one in self._since_logged)
        tokens_per_second = sequences * self._config.model.sequence_length / seconds
        step_seconds = seconds / len(self._since_logged)
        self._since_logged.clear()
        pace = {"step_seconds": step_seconds, "tokens_per_second": tokens_per_second, "mean_rank": self._mean_rank()}
        record = {"step": step, **asdict(metrics), **pace, **self._spending.record()}
        self._attempt(lambda: self._metrics.append(record))
        scalars: dict[str, float] = {
            "train/lm_loss": metrics.lm_loss,
            "train/grad_norm": metrics.grad_norm,
            "train/learning_rate": metrics.learning_rate,
            "train/skipped_steps": metrics.skipped_steps,
            "train/consumed_tokens": metrics.consumed_tokens,
            "train/global_batch": metrics.global_batch,
            "time/step_seconds": step_seconds,
        }
        if metrics.loss_scale is not None:
            scalars["train/loss_scale"] = metrics.loss_scale
        scalars |= self._throughput(tokens_per_second) | self._rank_scalars() | memory_scalars()
        self._scalars(step, scalars)
        self._to_board(lambda board: board.loss("train/lm_loss", metrics.lm_loss, self._spending))
        self._progress(step, metrics, tokens_per_second)

    def validation(self, step: int, found: Mapping[str, Validation]) -> None:
        """Shows validations, by the name of the held-out set; the first one also under plain `validation/`."""
        if not self._active:
            return
        first = next(iter(found.values()))
        named = {name: validation.facts() for name, validation in found.items() if name}
        scalars = {f"validation/{key}": value for key, value in first.facts().items()}
        for name, facts in named.items():
            scalars |= {f"validation/{name}/{key}": value for key, value in facts.items()}
        self._scalars(step, scalars)
        self._to_board(lambda board: board.loss("validation/lm_loss", first.lm_loss, self._spending))
        self.log_record("validation", step, **first.facts(), **({"sets": named} if named else {}))

    def decision(self, step: int, seconds: float, flops: float) -> None:
        """Shows a policy's decision: its seconds, without those of growth, and the FLOPs of its measurements."""
        if not self._active:
            return
        self._spending.seconds += seconds
        self._record("decision", step, {"seconds": seconds, "flops": flops})
        self._scalars(step, {"time/decision_seconds": seconds})

    def growth(self, growth: GrowthRecord) -> None:
        """Shows a growth event, after which ranks have changed."""
        if not self._active:
            return
        step, logit_change = growth.step, growth.logit_change
        self._ranks |= growth.after
        self._spending.seconds += growth.seconds
        self._spending.set_ranks(self._ranks)
        self.rank_history.append((step, dict(self._ranks)))
        facts = {"layers": len(growth.after), "mean_rank": self._mean_rank(), "seconds": growth.seconds}
        moved = {} if logit_change is None else {"logit_change": logit_change}
        self._record("growth", step, {**facts, **moved, "before": growth.before, "after": growth.after})
        self._console.log_record("growth", step, facts)
        scalars = {f"growth/{name}": value for name, value in moved.items()}
        self._scalars(step, {"time/growth_seconds": growth.seconds, **scalars})
        self._show_ranks(step)

    def spectra(self, step: int, singular_values: Mapping[str, ArrayLike]) -> None:
        """Shows singular values of the factored layers, by `Projection.name`, largest first."""
        if not self._active or not singular_values:
            return
        spectra = {name: np.asarray(values) for name, values in singular_values.items()}
        scalars = {}
        for name, values in spectra.items():
            for kind, value in spectrum_scalars(values).items():
                scalars[f"spectrum/{self._labels[name]}/{kind}"] = value
        self._scalars(step, scalars)
        self._attempt(lambda: self._keep_spectra(step, spectra))
        self._figure(step, "spectrum/singular_values", lambda: figures.spectrum_curves(spectra, self._layers))

    def _keep_spectra(self, step: int, spectra: Mapping[str, np.ndarray]) -> None:
        values = {self._labels[name]: rounded(spectrum) for name, spectrum in spectra.items()}
        replace_text(self._folder / SPECTRA_FILE, json_text({"step": step, "singular_values": values}) + "\n")

    def tracking(self, step: int, measurement: Measurement) -> None:
        """Shows spectra of updates, gradients and representations (`rank.track`)."""
        if not self._active:
            return
        record = {"step": step, **tracking_record(measurement, self._labels)}
        self._attempt(lambda: self._tracking.append(record))
        self._scalars(step, tracking_scalars(record))
        stream = [figures.StreamPlace(name, index) for index, name in enumerate(measurement.representation)]
        layers = projections(self._config.model)
        for quantity, places in (("update", layers), ("gradient", layers), ("representation", stream)):
            spectra = getattr(measurement, quantity)
            if spectra:
                draw = partial(figures.spectrum_curves, spectra, places)
                self._figure(step, f"track/{quantity}/singular_values", draw)
        self._tracked.append((step, effective_ranks_of_updates(record)))
        self._figure(step, "track/update/effective_rank_map", lambda: figures.effective_rank_map(self._tracked))

    def log_record(self, kind: str, step: int, **facts: Any) -> None:
        """Writes a log record, such as a checkpoint, a resume or a fault."""
        if not self._active:
            return
        self._record(kind, step, facts)
        self._console.log_record(kind, step, facts)

    def summary(self, facts: Mapping[str, Any]) -> None:
        """Shows the facts that `pretrain.monitor.summary.summarize` returned, and writes them to a file."""
        if not self._active:
            return
        self._attempt(lambda: replace_text(self._folder / "summary.json", json_text(dict(facts), indent=2) + "\n"))
        self._console.print(summary_text(facts, self._folder))

    def close(self) -> None:
        """Ends the progress line and writes out what is buffered."""
        self._console.close()
        if self._board is not None:
            self._attempt(self._board.close)

    def _attempt(self, write: Callable[[], None]) -> bool:
        """Runs `write`; an OSError, such as a full disk, gives one warning and does not end the run."""
        try:
            write()
        except OSError as error:
            if not self._warned:
                self._console.print(
                    f"warning: {self._folder} cannot be written ({error}); training goes on, its records are incomplete"
                )
                self._warned = True
            return False
        return True

    def _to_board(self, write: Callable[[Board], None]) -> None:
        board = self._board
        if board is not None and not self._attempt(lambda: write(board)):
            self._board = None  # its background thread has ended: it would raise the same error for ever

    def _scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        self._to_board(lambda board: board.scalars(step, scalars))

    def _figure(self, step: int, tag: str, draw: Callable[[], Any]) -> None:
        self._to_board(lambda board: board.figure(step, tag, draw()))

    def _show_ranks(self, step: int) -> None:
        if not self._ranks:
            return
        self._scalars(step, self._rank_scalars())
        history, steps = self.rank_history, self._config.train.steps
        self._figure(step, "rank/map", lambda: figures.rank_map(history, steps, self._layers))

    def _rank_scalars(self) -> dict[str, float]:
        """Scalars of ranks. They are written at every logged step, so that their curves are staircases."""
        if not self._ranks:
            return {}
        return {
            **{f"rank/{self._labels[name]}": rank for name, rank in self._ranks.items()},
            "rank/mean": sum(self._ranks.values()) / len(self._ranks),
            "rank/total_parameters": total_parameters(self._config.model, self._ranks),
            "rank/trained_parameters": trained_parameters(self._config.model, self._ranks),
        }

    def _mean_rank(self) -> float | None:
        return sum(self._ranks.values()) / len(self._ranks) if self._ranks else None

    def _throughput(self, tokens_per_second: float) -> dict[str, float]:
        flops = training_flops_per_token(self._config.model, self._ranks) * tokens_per_second / self._processes
        scalars = {
            "throughput/tokens_per_second": tokens_per_second,
            "throughput/tflops_per_device": flops / 1e12,
            "throughput/dense_equivalent_speedup": dense_flops_ratio(self._config, self._ranks),
        }
        peak = peak_flops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
        if peak is not None and self._config.train.precision != "fp32":
            scalars["throughput/mfu"] = flops / peak
        return scalars

    def _progress(self, step: int, metrics: StepMetrics, tokens_per_second: float) -> None:
        rank = self._mean_rank()
        shown = {
            "loss": f"{metrics.lm_loss:.4f}",
            "ppl": f"{perplexity(metrics.lm_loss):.2f}",
            "tokens/s": f"{tokens_per_second:,.0f}",
            "rank": "dense" if rank is None else f"{rank:.1f}",
        }
        self._console.progress(step, shown)

    def _record(self, kind: str, step: int, facts: Mapping[str, Any]) -> None:
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        self._attempt(lambda: self._events.append({"time": time, "step": step, "event": kind, **facts}))
        self._to_board(lambda board: board.log_record(step, kind, facts, self._lm_loss))
