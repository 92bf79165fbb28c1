"""The pictures of a run's report; each is a page-wide matplotlib figure.

Text of a run, such as its name, is drawn as it is: no formulas in it.
"""

from collections.abc import Callable, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from model.config import factored_projections
from pretrain.monitor import figures
from tools.run_report.history import Point, RunHistory

RUN_COLOURS = ("tab:blue", "tab:orange")
"""Colours of the run, and of the one beside it."""
EVENT_COLOURS = {
    "growth": "tab:green",
    "resume": "tab:purple",
    "rollback": "tab:red",
    "spike": "tab:red",
    "skipped": "tab:brown",
    "fault": "black",
    "stopped": "tab:gray",
}
_OTHER = "tab:pink"
_WIDTH_INCHES = 10.0
AXES: dict[str, tuple[str, Callable[[Point], float]]] = {
    "flops": ("training FLOPs", lambda point: point.flops),
    "seconds": ("seconds of training", lambda point: point.seconds),
}

matplotlib.rcParams["text.parse_math"] = False
matplotlib.rcParams["svg.hashsalt"] = "espalier"  # the same run gives the same file


def timeline(run: RunHistory) -> Figure:
    """Loss and mean rank by steps, events as vertical lines."""
    rows = 2 if run.ranks else 1
    figure = Figure(figsize=(_WIDTH_INCHES, 2.2 + 1.8 * rows), layout="constrained")
    panels = figure.subplots(rows, 1, sharex=True, squeeze=False, height_ratios=(2, 1)[:rows])[:, 0]
    _curves(panels[0], run, RUN_COLOURS[0], lambda point: point.step, "")
    if run.ranks:
        steps = [step for step, _ in run.ranks] + [max(run.last_step, run.ranks[-1][0])]
        means = [float(np.mean(list(ranks.values()))) for _, ranks in run.ranks]
        panels[1].step(steps, [*means, means[-1]], where="post", color=RUN_COLOURS[0])
        panels[1].set_ylabel("mean rank")
        panels[1].set_ylim(bottom=0)
    shown = set()
    for event in run.marks():
        kind = event["event"]
        colour = EVENT_COLOURS.get(kind, _OTHER)
        label = (kind if kind in EVENT_COLOURS else "other event") if colour not in shown else None
        shown.add(colour)
        for place, panel in enumerate(panels):
            panel.axvline(event["step"], color=colour, linewidth=1.0, alpha=0.7, label=label if place == 0 else None)
    _finish(panels[0], "loss (nats a token)")
    panels[-1].set_xlabel("step")
    panels[-1].grid(visible=True, alpha=0.3)
    return figure


def loss_by(axis: str, runs: Sequence[RunHistory]) -> Figure:
    """The loss of one or two runs against FLOPs or seconds."""
    title, value = AXES[axis]
    figure = Figure(figsize=(_WIDTH_INCHES / 2, 3.6), layout="constrained")
    panel = figure.add_subplot()
    for run, colour in zip(runs, RUN_COLOURS, strict=False):
        _curves(panel, run, colour, value, f"{run.name[:32]}: " if len(runs) > 1 else "")
    panel.set_xlabel(title)
    _finish(panel, "loss (nats a token)")
    return figure


def rank_map(run: RunHistory) -> Figure:
    """Ranks by layer and step."""
    return figures.rank_map(run.ranks, run.last_step, factored_projections(run.config.model))


def singular_values(run: RunHistory) -> Figure | None:
    """The newest singular values; None where there are none."""
    if run.spectra is None:
        return None
    spectra = {name: np.array(values) for name, values in run.spectra[1].items()}
    return figures.spectrum_curves(spectra, factored_projections(run.config.model))


def _curves(panel: Axes, run: RunHistory, colour: str, value: Callable[[Point], float], prefix: str) -> None:
    training, validation = run.training, run.validation
    panel.plot(
        [value(point) for point in training],
        [point.lm_loss for point in training],
        color=colour,
        alpha=0.45,
        linewidth=1.0,
        label=f"{prefix}training",
    )
    panel.plot(
        [value(point) for point in validation],
        [point.lm_loss for point in validation],
        color=colour,
        marker="o",
        markersize=4,
        label=f"{prefix}validation",
    )


def _finish(panel: Axes, what: str) -> None:
    panel.set_ylabel(what)
    panel.grid(visible=True, alpha=0.3)
    panel.legend(fontsize=8, loc="upper right")
