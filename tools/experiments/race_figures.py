"""Pictures of a race: one panel per group, the dense runs grey in each."""

from collections.abc import Callable, Mapping
from itertools import cycle
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tools.experiments.race_entries import Curve, Entry

_COLUMNS = 2
_LOSS_HEADROOM = 1.25
"""The axis ends above this multiple of the lowest loss: what follows the first steps is what matters."""


def pictures(groups: Mapping[str, Mapping[str, Entry]]) -> dict[str, Figure]:
    """Figures by name."""
    drawn = {group: entries for group, entries in groups.items() if entries}
    if not drawn:
        return {}
    losses = [loss for entries in drawn.values() for entry in entries.values() for loss in entry.first.loss]
    highest = _LOSS_HEADROOM * min(losses, default=1.0)

    def loss_curve(spent: Callable[[Curve], list[float] | None], label: str) -> Figure:
        def draw(axes: Axes, entry: Entry, style: dict[str, Any]) -> None:
            for number, curve in enumerate(entry.curves.values()):
                values = spent(curve)
                if values is not None:
                    axes.plot(values, curve.loss, lw=1.3, label=None if number else entry.method.title, **style)

        return _panels(drawn, draw, label, "validation loss", highest)

    return {
        "flops": loss_curve(lambda curve: curve.flops, "TFLOP"),
        "seconds": loss_curve(lambda curve: curve.seconds, "seconds"),
        "ranks": _panels(drawn, _draw_ranks, "step", "mean rank", None),
    }


def _draw_ranks(axes: Axes, entry: Entry, style: dict[str, Any]) -> None:
    stretches = [stretch for stretch in entry.first.record["ranks"] if stretch["mean_rank"] is not None]
    if stretches:
        steps = [stretch["first_step"] for stretch in stretches]
        ranks = [stretch["mean_rank"] for stretch in stretches]
        end = stretches[-1]["first_step"] + stretches[-1]["steps"]
        axes.step([*steps, end], [*ranks, ranks[-1]], where="post", label=entry.method.title, **style)


def _panels(
    groups: Mapping[str, Mapping[str, Entry]],
    draw: Callable[[Axes, Entry, dict[str, Any]], None],
    x_label: str,
    y_label: str,
    highest: float | None,
) -> Figure:
    rows = -(-len(groups) // _COLUMNS)
    figure = Figure(figsize=(11.0, 3.8 * rows), layout="constrained")
    panels = iter(figure.subplots(rows, min(_COLUMNS, len(groups)), squeeze=False).flat)
    colors = matplotlib.colormaps["tab10"].colors  # type: ignore[attr-defined]
    for (group, entries), axes in zip(groups.items(), panels, strict=False):
        dense, factored = cycle(("-", "--", ":")), cycle(colors)
        for entry in entries.values():
            if all(stretch["mean_rank"] is None for stretch in entry.first.record["ranks"]):
                draw(axes, entry, {"color": "grey", "ls": next(dense)})
            else:
                draw(axes, entry, {"color": next(factored)})
        axes.set(title=group, xlabel=x_label, ylabel=y_label)
        if highest is not None:
            axes.set_ylim(top=highest)
        if axes.has_data():
            axes.legend(fontsize=7)
        axes.grid(alpha=0.3)
    for axes in panels:
        axes.set_axis_off()
    return figure
