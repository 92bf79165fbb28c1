"""Writes a run's TensorBoard files: scalars, pictures, records as text and as marks on the loss, settings, and the
first charts.

TensorBoard's horizontal axis is a whole number, the step. The loss against FLOPs and against seconds therefore has
separate writers, in folders that TensorBoard shows as separate runs: there the "step" counts 10⁹ FLOPs, or seconds. The
tags are the same in every run, so runs that are shown together share their charts.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from matplotlib.figure import Figure
from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData  # type: ignore[import-untyped]
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from pretrain.config.run import RunConfig
from pretrain.monitor.spectrum_report import TRACKING_CHARTS
from pretrain.monitor.spending import Spending

UNMARKED = ("validation", "decision", "null", "checkpoint")
"""Kinds of records without a mark on the loss: they have curves of their own, come before the first loss, or are too
many."""
CHARTS = {
    "Espalier": {
        "loss, with events": ["Multiline", ["train/lm_loss", "validation/lm_loss", "event/.*"]],
        "mean rank": ["Multiline", ["rank/mean"]],
        "loss against FLOPs (10⁹)": ["Multiline", ["by_gflops/.*"]],
        "loss against seconds of training": ["Multiline", ["by_seconds/.*"]],
        "rank by layer and projection": ["Multiline", ["rank/layer_.*"]],
        "throughput": ["Multiline", ["throughput/tokens_per_second"]],
    }
}
_SETTINGS = {
    "model": ("family", "parametrization", "factored_layers", "layers", "hidden", "heads", "sequence_length"),
    "train": ("objective", "steps", "global_batch", "precision", "clip"),
    "optimizer": ("learning_rate", "minimum_learning_rate", "beta1", "beta2", "weight_decay"),
    "schedule": ("shape", "warmup_steps"),
    "rank": ("policy", "initial", "quantum", "budget", "budget_unit", "threshold"),
    "parallel": ("tensor",),
    "deepspeed": ("stage",),
    "run": ("seed",),
}
"""Settings in the table of hyperparameters, by section."""
_FIRST_SETTINGS = ("model.parametrization", "optimizer.learning_rate", "rank.budget", "rank.initial", "rank.policy")
"""Columns of the table of hyperparameters that are shown at first; TensorBoard shows five."""


class Board:
    """Writes one run's TensorBoard files; OSError if something cannot be written."""

    def __init__(self, folder: Path, config: RunConfig, resumed_step: int, spending: Spending) -> None:
        self._main = _writer(folder, resumed_step)
        self._by_gflops = _writer(folder / "by_gflops", _gflops(spending))
        self._by_seconds = _writer(folder / "by_seconds", round(spending.seconds))
        self._main.add_custom_scalars(CHARTS | (TRACKING_CHARTS if config.rank.track else {}))
        metrics = ("validation/lm_loss", "train/lm_loss", "rank/mean", "rank/total_parameters")
        for summary in hparams(_hyperparameters(config), dict.fromkeys(metrics)):
            _put_first(summary)
            self._main.file_writer.add_summary(summary)  # type: ignore[attr-defined]  # torch declares it as None

    def scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        for tag, value in scalars.items():
            self._main.add_scalar(tag, value, step)

    def loss(self, name: str, lm_loss: float, spending: Spending) -> None:
        """Writes a loss of training or validation against FLOPs and seconds; against steps it is one of the scalars."""
        self._by_gflops.add_scalar(f"by_gflops/{name}", lm_loss, _gflops(spending))
        self._by_seconds.add_scalar(f"by_seconds/{name}", lm_loss, round(spending.seconds))

    def figure(self, step: int, tag: str, figure: Figure) -> None:
        self._main.add_figure(tag, figure, step)

    def log_record(self, step: int, kind: str, facts: Mapping[str, Any], lm_loss: float | None) -> None:
        """Writes a log record as text, and as a mark at the height of the last loss, if there is one."""
        rows = [f"| {name} | {_shown(value)} |" for name, value in facts.items() if not isinstance(value, Mapping)]
        self._main.add_text(f"event/{kind}", "\n".join([f"| {kind} | step {step} |", "|---|---|", *rows]), step)
        if lm_loss is not None and kind not in UNMARKED:
            self._main.add_scalar(f"event/{kind}", lm_loss, step)

    def close(self) -> None:
        for writer in (self._main, self._by_gflops, self._by_seconds):
            writer.close()


def memory_scalars() -> dict[str, float]:
    """Bytes this process holds now, on the host and on its device, by TensorBoard tag."""
    scalars: dict[str, float] = {"memory/resident_bytes": psutil.Process().memory_info().rss}
    if torch.cuda.is_available():
        scalars["memory/device_allocated_bytes"] = torch.cuda.memory_allocated()
        scalars["memory/device_peak_bytes"] = torch.cuda.max_memory_allocated()
    return scalars


def _writer(folder: Path, reached: int) -> SummaryWriter:
    """A writer into `folder`; TensorBoard drops what an earlier start of the run wrote there after `reached`."""
    return SummaryWriter(str(folder), purge_step=reached + 1 if reached else 0, flush_secs=10)


def _gflops(spending: Spending) -> int:
    return int(spending.flops // 1e9)


def _hyperparameters(config: RunConfig) -> dict[str, bool | float | str]:
    found = {f"{name}.{key}": getattr(getattr(config, name), key) for name, keys in _SETTINGS.items() for key in keys}
    return {name: value for name, value in found.items() if value is not None}


def _put_first(summary: Summary) -> None:
    """Declares the first settings to differ between runs: TensorBoard shows those before the others, each sorted by
    name."""
    data = summary.value[0].metadata.plugin_data
    declared = HParamsPluginData.FromString(data.content)
    for setting in declared.experiment.hparam_infos:
        setting.differs = setting.name in _FIRST_SETTINGS
    data.content = declared.SerializeToString()


def _shown(value: object) -> str:
    """Text of one cell of a Markdown table; TensorBoard itself removes HTML."""
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return " ".join(text.replace("|", "\\|").split())
