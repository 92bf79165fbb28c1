"""The page of a run's report: one file of HTML with its pictures inside.

`page.html.jinja` is its form. Everything that comes out of a run's files is escaped there, pictures are images that
cannot run scripts, and the page's own policy forbids scripts and every connection, should either fail.
"""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure

from model.config import factored_projections
from pretrain.monitor.summary import dense_flops_ratio
from tools.run_report import figures
from tools.run_report.history import RunHistory, number

MOST_EVENTS = 200
"""Rows of the table of events: the last ones."""
_LONGEST_TEXT = 300
_FORMS = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


def page(run: RunHistory, beside: RunHistory | None) -> str:
    """The whole file."""
    runs = [run] if beside is None else [run, beside]
    kinds, ranks = _ranks(run)
    return _FORMS.get_template("page.html.jinja").render(
        run=run,
        model=run.config.model,
        names=["", *(one.name for one in runs)],
        final=_final_figures(runs),
        timeline=_image(figures.timeline(run) if run.training else None),
        losses={axis: _image(figures.loss_by(axis, runs)) for axis in figures.AXES} if run.training else {},
        rank_map=_image(figures.rank_map(run) if run.ranks else None),
        spectrum=_image(figures.singular_values(run)),
        kinds=kinds,
        ranks=ranks,
        events=_events(run),
        settings=yaml.safe_dump(run.config.model_dump(mode="json"), sort_keys=False, allow_unicode=True),
    )


def _image(figure: Figure | None) -> str | None:
    """The address of an <img> with the figure as SVG in it, where a browser runs nothing and loads nothing."""
    if figure is None:
        return None
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(file.getvalue()).decode()}"


def _final_figures(runs: Sequence[RunHistory]) -> list[list[str]]:
    """Rows of a name and one figure for each run."""
    rows = {
        "validation loss": [_figure(run.validation[-1].lm_loss if run.validation else None, ".4f") for run in runs],
        "training loss": [_figure(run.training[-1].lm_loss if run.training else None, ".4f") for run in runs],
        "parameters": [_figure(number(run.summary.get("parameters")), ",.0f") for run in runs],
        "of the dense model's": [_share(run.summary, "parameters", "dense_parameters") for run in runs],
        "training FLOPs": [_figure(run.training[-1].flops if run.training else None, ".3e") for run in runs],
        "of the dense model's (FLOPs)": [_share(run.summary, "training_flops", "dense_training_flops") for run in runs],
        "seconds of training": [_figure(run.training[-1].seconds if run.training else None, ",.0f") for run in runs],
        "tokens": [_figure(number(run.summary.get("consumed_tokens")), ",.0f") for run in runs],
        "mean rank": [_figure(_mean_rank(run), ".1f") for run in runs],
        "FLOPs of a dense token / of one now": [
            _figure(dense_flops_ratio(run.config, run.ranks[-1][1]) if run.ranks else None, ".2f") for run in runs
        ],
    }
    return [[name, *values] for name, values in rows.items()]


def _mean_rank(run: RunHistory) -> float | None:
    if not run.ranks:
        return None
    ranks = run.ranks[-1][1].values()
    return sum(ranks) / len(ranks)


def _figure(value: float | None, style: str) -> str:
    return "–" if value is None else format(value, style)


def _share(summary: Mapping[str, Any], ours: str, dense: str) -> str:
    part, whole = number(summary.get(ours)), number(summary.get(dense))
    return f"{100.0 * part / whole:.1f} %" if part is not None and whole else "–"


def _ranks(run: RunHistory) -> tuple[list[str], list[list[str]]]:
    """Kinds of projections, and a row for each layer: its name and ranks. Both are empty for a dense model."""
    if not run.ranks:
        return [], []
    layers = factored_projections(run.config.model)
    kinds = list(dict.fromkeys(layer.kind for layer in layers))
    last = run.ranks[-1][1]
    rows = []
    for index in sorted({layer.layer for layer in layers}):
        by_kind = {layer.kind: last[layer.name] for layer in layers if layer.layer == index}
        rows.append([f"layer {index}", *(str(by_kind.get(kind, "–")) for kind in kinds)])
    return [*kinds], rows


def _events(run: RunHistory) -> list[list[str]]:
    """Time, step, kind and facts of the last events."""
    rows = []
    for event in run.events[-MOST_EVENTS:]:
        facts = {name: value for name, value in event.items() if name not in ("time", "step", "event")}
        parts = [f"{name} {_value(value)}" for name, value in facts.items() if not isinstance(value, dict)]
        cells = [str(event.get("time", ""))[:19], str(event["step"]), event["event"], ", ".join(parts)]
        rows.append([_cut(cell) for cell in cells])
    return rows


def _value(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value)


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST_TEXT else text[:_LONGEST_TEXT] + " …"
