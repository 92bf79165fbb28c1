"""The page of a run's report: one file of HTML with its pictures inside.

Everything that comes out of a run's files is escaped, pictures are images that cannot run scripts, and the page's own
policy forbids scripts and every connection, should either fail.
"""

import base64
import html
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import yaml
from matplotlib.figure import Figure

from model.config import factored_projections
from pretrain.monitor.summary import dense_flops_ratio
from tools.run_report import figures
from tools.run_report.history import RunHistory, number

MOST_EVENTS = 200
"""Rows of the table of events: the last ones."""
_LONGEST_TEXT = 300
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72em; margin: 2em auto; padding: 0 1em; color: #222; }
h1 { font-size: 1.6em; margin-bottom: 0; } h2 { font-size: 1.2em; margin: 2em 0 0.5em; }
img { max-width: 100%; } .pair { display: flex; gap: 1em; } .pair img { width: 50%; min-width: 0; }
table { border-collapse: collapse; } td, th { border-bottom: 1px solid #ddd; padding: 0.2em 0.9em 0.2em 0; }
th { text-align: left; font-weight: 600; } td.number { text-align: right; font-variant-numeric: tabular-nums; }
td.text { overflow-wrap: anywhere; max-width: 40em; }
pre { background: #f6f6f6; padding: 1em; overflow-x: auto; font-size: 13px; } .note { color: #666; }
"""


def page(run: RunHistory, beside: RunHistory | None) -> str:
    """The whole file."""
    head = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">\n"
        f"<title>{html.escape(run.name)} – Espalier</title>\n<style>{_STYLE}</style></head>\n<body>\n"
    )
    return head + "\n".join(_body(run, beside)) + "\n</body></html>\n"


def _body(run: RunHistory, beside: RunHistory | None) -> Iterator[str]:
    runs = [run] if beside is None else [run, beside]
    model = run.config.model
    yield f"<h1>{html.escape(run.name)}</h1>"
    yield (
        f'<p class="note">{model.family}, {model.layers} layers, hidden {model.hidden}, {model.parametrization}, '
        f"rank policy {run.config.rank.policy}; step {run.last_step:,} of {run.config.train.steps:,}</p>"
    )
    yield from _section("Final figures", _final_figures(runs))
    if run.training:
        yield from _section("Loss, ranks and events", [_image(figures.timeline(run), "loss, ranks, events")])
        pair = [_image(figures.loss_by(axis, runs), f"loss by {axis}") for axis in figures.AXES]
        yield from _section("Loss against what it cost", ['<div class="pair">', *pair, "</div>", _SECONDS_NOTE])
    if run.ranks:
        yield from _section("Rank map", [_image(figures.rank_map(run), "rank by layer and step")])
    spectrum = figures.singular_values(run)
    if spectrum is not None and run.spectra is not None:
        text = f'<p class="note">Step {run.spectra[0]:,}; shallow layers blue, deep ones green.</p>'
        yield from _section("Singular values", [_image(spectrum, "singular values"), text])
    if run.ranks:
        yield from _section("Ranks at the end", _ranks(run))
    yield from _section("Events", _events(run))
    yield from _section("Settings", [f"<pre>{html.escape(_settings(run))}</pre>"])


_SECONDS_NOTE = (
    '<p class="note">Seconds are those of steps, policy decisions and augmentations; validations and checkpoints are '
    "left out.</p>"
)


def _section(title: str, content: Iterable[str]) -> Iterator[str]:
    yield f"<h2>{title}</h2>"
    yield from content


def _image(figure: Figure, description: str) -> str:
    """As SVG in an <img>, where a browser runs nothing and loads nothing."""
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return f'<img alt="{description}" src="data:image/svg+xml;base64,{base64.b64encode(file.getvalue()).decode()}">'


def _final_figures(runs: Sequence[RunHistory]) -> Iterator[str]:
    """One column for each run."""
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
    yield _table(["", *(run.name for run in runs)], [[name, *values] for name, values in rows.items()], numbers=True)


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


def _ranks(run: RunHistory) -> Iterator[str]:
    """One row for each layer, one column for each kind of projection."""
    layers = factored_projections(run.config.model)
    kinds = list(dict.fromkeys(layer.kind for layer in layers))
    last = run.ranks[-1][1]
    rows = []
    for index in sorted({layer.layer for layer in layers}):
        by_kind = {layer.kind: last[layer.name] for layer in layers if layer.layer == index}
        rows.append([f"layer {index}", *(str(by_kind.get(kind, "–")) for kind in kinds)])
    yield _table(["", *kinds], rows, numbers=True)


def _events(run: RunHistory) -> Iterator[str]:
    rows = []
    for event in run.events[-MOST_EVENTS:]:
        facts = {name: value for name, value in event.items() if name not in ("time", "step", "event")}
        parts = [f"{name} {_value(value)}" for name, value in facts.items() if not isinstance(value, dict)]
        rows.append([str(event.get("time", ""))[:19], str(event["step"]), event["event"], ", ".join(parts)])
    yield _table(["time (UTC)", "step", "event", ""], [[_cut(cell) for cell in row] for row in rows])
    if len(run.events) > MOST_EVENTS:
        yield f'<p class="note">The last {MOST_EVENTS} of {len(run.events):,}.</p>'


def _value(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value)


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST_TEXT else text[:_LONGEST_TEXT] + " …"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: bool = False) -> str:
    """Escapes every cell."""
    kind = "number" if numbers else "text"
    lines = ["<table><tr>", *(f"<th>{html.escape(cell)}</th>" for cell in head), "</tr>"]
    for first, *others in rows:
        cells = (f'<td class="{kind}">{html.escape(cell)}</td>' for cell in others)
        lines.append(f"<tr><td>{html.escape(first)}</td>{''.join(cells)}</tr>")
    return "\n".join([*lines, "</table>"])


def _settings(run: RunHistory) -> str:
    return str(yaml.safe_dump(run.config.model_dump(mode="json"), sort_keys=False, allow_unicode=True))
