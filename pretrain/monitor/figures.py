"""Pictures of ranks and spectra for TensorBoard."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from matplotlib.figure import Figure

from model.config import Projection


class Place(Protocol):
    """Place of a spectrum in the stack; `Projection` is one."""

    @property
    def name(self) -> str: ...
    @property
    def layer(self) -> int: ...
    @property
    def kind(self) -> str: ...


class StreamPlace(NamedTuple):
    """Place of the residual stream after a layer."""

    name: str
    layer: int
    kind: str = "residual stream"


def rank_map(history: Sequence[tuple[int, Mapping[str, int]]], last_step: int, layers: Sequence[Projection]) -> Figure:
    """A map with one row per factored layer, the step to the right and the rank as colour.

    `history`: the steps at which ranks changed, ascending, with the ranks from there on.
    """
    edges = [step for step, _ in history] + [max(last_step, history[-1][0] + 1)]
    ranks = np.array([[ranks_then[layer.name] for _, ranks_then in history] for layer in layers])
    return _layer_map(edges, ranks, [layer.label for layer in layers], "rank")


def effective_rank_map(history: Sequence[tuple[int, Mapping[str, float]]]) -> Figure:
    """A map with one row per layer, the step to the right and the effective rank as colour.

    `history`: the steps of the measurements, ascending, with effective ranks by layer label. Each measurement fills the
    map back to the one before it.
    """
    labels = list(history[-1][1])
    values = np.array([[values_then.get(label, np.nan) for _, values_then in history] for label in labels])
    return _layer_map([0, *(step for step, _ in history)], values, labels, "effective rank")


def _layer_map(edges: Sequence[int], values: np.ndarray, labels: Sequence[str], meaning: str) -> Figure:
    """`values (layers, len(edges) - 1)` as colours between the edges."""
    figure = Figure(figsize=(8.0, 1.5 + 0.18 * len(labels)), layout="constrained")
    axes = figure.add_subplot()
    mesh = axes.pcolormesh(edges, np.arange(len(labels) + 1), values, cmap="viridis", vmin=0)
    axes.set_yticks(np.arange(len(labels)) + 0.5, labels, fontsize=6)
    axes.invert_yaxis()
    axes.set_xlabel("step")
    figure.colorbar(mesh, label=meaning)
    return figure


def spectrum_curves(spectra: Mapping[str, np.ndarray], layers: Sequence[Place]) -> Figure:
    """Curves of singular values divided by the largest one; one panel per kind of place, one line per layer."""
    shown = [layer for layer in layers if layer.name in spectra]
    kinds = list(dict.fromkeys(layer.kind for layer in shown))
    depth = max(layer.layer for layer in shown) or 1
    figure = Figure(figsize=(3.2 * len(kinds), 3.0), layout="constrained")
    panels = figure.subplots(1, len(kinds), squeeze=False, sharey=True)[0]
    for panel, kind in zip(panels, kinds, strict=True):
        for layer in (layer for layer in shown if layer.kind == kind):
            values = spectra[layer.name]
            shade = 0.15 + 0.8 * layer.layer / depth
            panel.plot(
                np.arange(1, len(values) + 1),
                values / max(values[0], 1e-30),
                color=(0.1, shade, 1.0 - shade),
                linewidth=0.9,
            )
        panel.set_title(kind, fontsize=9)
        panel.set_xlabel("direction")
    panels[0].set_ylabel("singular value / largest")
    return figure
