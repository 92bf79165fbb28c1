"""What a race came to: tables and curves, written below a marker of `results.md` beside the file of results.

The plan above the marker is written by people; nothing there is touched. The file has three parts: the runs that are
compared, the tables, the pictures.
"""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pretrain.disk import replace_text
from pretrain.errors import DataError
from tools.experiments.race_plan import Method, RaceConfig, full_losses, loss_of, tuned_rate, tuning_losses
from tools.experiments.race_results import COMPRESSED, Results, thinned
from tools.experiments.race_speed import StepSeconds, seconds_until


@dataclass(frozen=True)
class Curve:
    """One run of full length, at its validations."""

    record: Mapping[str, Any]
    loss: list[float]
    flops: list[float]
    """FLOPs since the start, in units of 1e12."""
    seconds: list[float] | None
    """Seconds since the start; None if this kind of model was not timed."""


@dataclass(frozen=True)
class Entry:
    """One method with its runs of full length, by seed."""

    name: str
    method: Method
    rate: float
    curves: dict[int, Curve]

    @property
    def first(self) -> Curve:
        return next(iter(self.curves.values()))

    def losses(self) -> dict[int, float]:
        """Loss at the end by seed."""
        return {seed: loss_of(curve.record) for seed, curve in self.curves.items()}


def collect(race: RaceConfig, content: Mapping[str, Any]) -> dict[str, Entry]:
    """Methods that have at least one run of full length at their own learning rate, in the order of the race."""
    step_seconds = StepSeconds(content["speed"])
    entries = {}
    for name, method in race.methods.items():
        rate = tuned_rate(race, name, content["runs"])
        curves = {
            record["seed"]: _curve(record, step_seconds)
            for record in content["runs"].values()
            if (record["method"], record["learning_rate"], record["steps"]) == (name, rate, race.full_steps(name))
        }
        if rate is not None and curves:
            entries[name] = Entry(name, method, rate, dict(sorted(curves.items())))
    return entries


def _curve(record: Mapping[str, Any], step_seconds: StepSeconds) -> Curve:
    points = record["validation"]
    seconds = [seconds_until(point["step"], record, step_seconds) for point in points]
    known = [value for value in seconds if value is not None]
    return Curve(
        record,
        [point["loss"] for point in points],
        [point["flops"] / 1e12 for point in points],
        known if len(known) == len(points) else None,
    )


MARKER = "<!-- Below: written by tools/experiments/race.py --report -->"
_NONE = "–"


def write_report(race: RaceConfig, results: Results) -> None:
    """Writes the tables and the pictures, and beside a compressed file of results a thinned one for people."""
    document = results.path.with_name("results.md")
    plan, marker, _ = document.read_text(encoding="utf-8").partition(MARKER) if document.is_file() else ("", "", "")
    if not marker:
        raise DataError(f"{document} has no line {MARKER}: write the plan of the race there, and that line behind it")
    content = results.read()
    if results.path.suffix == COMPRESSED:
        replace_text(results.path.with_suffix(""), thinned(content))
    entries = collect(race, content)
    images = document.parent / "images"
    images.mkdir(exist_ok=True)
    groups = {group: _of_group(race, entries, group) for group in _groups(race)}
    for name, figure in pictures(groups).items():
        figure.savefig(images / f"race_{name}.png", dpi=110)
    replace_text(document, plan + MARKER + "\n\n" + "\n".join(_lines(race, content, entries, groups)) + "\n")
    print(f"{document} and {images}/race_*.png are written: {len(content['runs'])} runs, {len(entries)} methods")


def _groups(race: RaceConfig) -> list[str]:
    return list(dict.fromkeys(method.group for method in race.methods.values() if method.group))


def _of_group(race: RaceConfig, entries: Mapping[str, Entry], group: str) -> dict[str, Entry]:
    """The methods of a group, behind the dense ones that they are measured against and their controls."""
    members = [entry for entry in entries.values() if entry.method.group == group]
    others = [entry.method.against or race.baseline for entry in members]
    others += [entry.method.control for entry in members if entry.method.control is not None]
    chosen = [entries[name] for name in dict.fromkeys(others) if name in entries]
    return {entry.name: entry for entry in [*chosen, *members]}


def _lines(
    race: RaceConfig,
    content: Mapping[str, Any],
    entries: Mapping[str, Entry],
    groups: Mapping[str, Mapping[str, Entry]],
) -> Iterator[str]:
    yield "## Results"
    yield ""
    yield from _origin(content)
    yield "### Loss and size"
    yield ""
    yield (
        "Validation loss in nats a token at the end (mean ± standard deviation over the seeds, if there are several). "
        "*vs dense* and *vs control*: difference of the loss over the seeds that both have; the control, named behind "
        "it, is the fixed rank of the same budget, or what differs in one thing alone. Tokens, parameters "
        "and FLOPs are shares of the dense run's, FLOPs of the linear layers of the blocks, and of the whole model."
    )
    yield ""
    yield from _table(
        [
            *("method", "learning rate", "seeds", "loss", "vs dense", "vs control"),
            *("tokens", "block parameters", "block FLOPs", "all FLOPs", "mean rank"),
        ],
        [_size_row(race, entries, entry) for entry in entries.values()],
    )
    yield "### At equal FLOPs and at equal seconds"
    yield ""
    yield (
        "*dense there*: the loss of the dense run of the same seed at the point where it had spent as much, read off "
        "its curve. A dense run is not annealed at that point, which is to its disadvantage; dense runs of another "
        "length, where the race has any, are methods of their own. *fixed ranks there*: the loss at the end of a fixed "
        "rank that costs as many FLOPs, interpolated between those of the race (over the logarithm of FLOPs, first "
        "seed)."
    )
    yield ""
    yield from _table(
        ["method", "loss", "TFLOP", "dense there", "fixed ranks there", "seconds", "share of dense", "dense there"],
        [_cost_row(race, entries, entry) for entry in entries.values()],
    )
    for name, caption in (
        ("flops", "Validation loss against FLOPs"),
        ("seconds", "Validation loss against seconds"),
        ("ranks", "Mean rank over time"),
    ):
        if groups:
            yield from (f"![{caption}](images/race_{name}.png)", "")
    yield from _rank_lines(entries)
    yield from _tuning_lines(race, content)


def _origin(content: Mapping[str, Any]) -> Iterator[str]:
    """Hardware, versions and revisions of everything recorded."""
    records = [*content["runs"].values(), *content["speed"].values()]
    for what, values in (
        ("Hardware", [f"{r['hardware']['processor']}, {r['hardware']['cores']} cores" for r in records]),
        ("Threads of a run", [str(record["hardware"]["threads"]) for record in records]),
        ("Versions", [", ".join(f"{k} {v}" for k, v in record["versions"].items()) for record in records]),
        ("Revisions", [record["commit"][:12] for record in records]),
    ):
        yield f"- {what}: {'; '.join(dict.fromkeys(values))}"
    hours = sum((run["step_seconds"] or 0.0) * run["steps"] for run in content["runs"].values()) / 3600.0
    yield f"- Runs: {len(content['runs'])}, {hours:.1f} hours of one thread, several at a time on a shared machine"
    yield ""


def _size_row(race: RaceConfig, entries: Mapping[str, Entry], entry: Entry) -> list[str]:
    dense, control = _compared_entry(race, entries, entry), entries.get(entry.method.control or "")
    last, run = entry.first.record["ranks"][-1], entry.first.record
    shares = [_NONE] * 4
    if dense is not None and run["validation"]:
        parameters = last["linear_parameters"] / dense.first.record["ranks"][-1]["linear_parameters"]
        spent, dense_spent = run["validation"][-1], dense.first.record["validation"][-1]
        tokens, block_flops, flops = (spent[what] / dense_spent[what] for what in ("tokens", "linear_flops", "flops"))
        shares = [_percent(share) for share in (tokens, parameters, block_flops, flops)]
    return [
        entry.method.title,
        f"{entry.rate:g}",
        ", ".join(map(str, entry.curves)),
        _loss_text(list(entry.losses().values())),
        _difference(entry, dense),
        _difference(entry, control) + (f" ({control.method.title})" if control is not None else ""),
        *shares,
        _NONE if last["mean_rank"] is None else f"{last['mean_rank']:.1f}",
    ]


def _cost_row(race: RaceConfig, entries: Mapping[str, Entry], entry: Entry) -> list[str]:
    dense, curve = _compared_entry(race, entries, entry), entry.first
    other = None if dense is None else dense.curves.get(curve.record["seed"])
    row = [entry.method.title, _loss_text([loss_of(curve.record)])]
    if not curve.loss:
        return [*row, _NONE, _NONE, _NONE, _NONE, _NONE, _NONE]
    spent = curve.flops[-1]
    row += [f"{spent:.1f}", _read_off(other, other.flops if other else None, spent)]
    comparable = entry.name not in race.frontier and entry.method.against in (None, race.baseline)
    row.append(on_frontier(race, entries, spent) if comparable else _NONE)
    if curve.seconds is None:
        return [*row, _NONE, _NONE, _NONE]
    seconds, theirs = curve.seconds[-1], other.seconds if other else None
    share = _percent(seconds / theirs[-1]) if theirs else _NONE
    return [*row, f"{seconds:.0f}", share, _read_off(other, theirs, seconds)]


def _read_off(curve: Curve | None, spent: list[float] | None, at: float) -> str:
    """The loss of a curve where it had spent `at`; nothing beyond its ends."""
    if curve is None or not spent or not spent[0] <= at <= spent[-1]:
        return _NONE
    return f"{float(np.interp(at, spent, curve.loss)):.3f}"


def on_frontier(race: RaceConfig, entries: Mapping[str, Entry], spent: float) -> str:
    """Loss at the end of a fixed rank that costs as much; nothing beyond the cheapest and the dearest."""
    curves = [entries[name].first for name in race.frontier if name in entries]
    points = sorted((curve.flops[-1], curve.loss[-1]) for curve in curves if curve.loss)
    if not points or not points[0][0] <= spent <= points[-1][0]:
        return _NONE
    flops, losses = zip(*points, strict=True)
    return f"{float(np.interp(np.log(spent), np.log(flops), losses)):.3f}"


def _compared_entry(race: RaceConfig, entries: Mapping[str, Entry], entry: Entry) -> Entry | None:
    return entries.get(entry.method.against or race.baseline)


def _difference(entry: Entry, other: Entry | None) -> str:
    """Relative difference of the losses, over common seeds."""
    if other is None or other is entry:
        return _NONE
    ours, theirs = entry.losses(), other.losses()
    common = sorted(ours.keys() & theirs.keys())
    if not common:
        return _NONE
    ratio = sum(ours[seed] for seed in common) / sum(theirs[seed] for seed in common)
    return f"{100.0 * (ratio - 1.0):+.1f} %"


def _loss_text(losses: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(losses):.3f}" if len(losses) > 1 else ""
    return f"{statistics.fmean(losses):.3f}{spread}"


def _percent(share: float) -> str:
    return f"{100.0 * share:.1f} %"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield f"| {' | '.join(row)} |"
    yield ""


def _rank_lines(entries: Mapping[str, Entry]) -> Iterator[str]:
    """Ranks that changed, and the nulls that runs wrote down."""
    rows = []
    for entry in entries.values():
        record = entry.first.record
        nulls = [event["mean_rank_if_never_trained"] for event in record["events"] if event["event"] == "null"]
        if len(record["ranks"]) == 1 and not nulls:
            continue
        path = " → ".join(f"{_rank_text(stretch)} ({stretch['first_step']})" for stretch in record["ranks"])
        seconds = sum(float(event.get("seconds", 0.0)) for event in record["events"])
        rows.append([entry.method.title, path, f"{nulls[-1]:.1f}" if nulls else _NONE, f"{seconds:.1f}"])
    if rows:
        yield "### Ranks over time"
        yield ""
        yield "Mean rank and the step from which it held; first seed. *null*: the mean rank without any training."
        yield ""
        yield from _table(["method", "mean rank (from step)", "null", "seconds of all events"], rows)


def _rank_text(stretch: Mapping[str, Any]) -> str:
    return "dense" if stretch["mean_rank"] is None else f"{stretch['mean_rank']:.1f}"


def _tuning_lines(race: RaceConfig, content: Mapping[str, Any]) -> Iterator[str]:
    yield "### Learning rates"
    yield ""
    yield "Validation loss of the short runs that chose; the best is bold."
    yield ""
    runs = content["runs"]
    yield from _rate_table(race, runs, {name: tuning_losses(race, name, runs) for name in race.methods})
    checked = {name: full_losses(race, name, runs) for name, method in race.methods.items() if method.check_rates}
    if any(len(by_rate) > 1 for by_rate in checked.values()):
        yield "What other rates come to at full length, first seed; bold is the rate that the short runs chose."
        yield ""
        yield from _rate_table(race, runs, checked)


def _rate_table(
    race: RaceConfig, runs: Mapping[str, Any], losses: Mapping[str, Mapping[float, float]]
) -> Iterator[str]:
    rates = sorted({rate for by_rate in losses.values() for rate in by_rate})
    rows = []
    for name, by_rate in losses.items():
        if by_rate:
            chosen = tuned_rate(race, name, runs)
            texts = [_NONE if rate not in by_rate else _tried(by_rate[rate], rate == chosen) for rate in rates]
            rows.append([race.methods[name].title, *texts])
    yield from _table(["method", *(f"{rate:g}" for rate in rates)], rows)


def _tried(loss: float, chosen: bool) -> str:
    text = "diverged" if loss == float("inf") else f"{loss:.3f}"
    return f"**{text}**" if chosen else text


_COLUMNS = 2
_LOSS_HEADROOM = 1.25
"""The axis ends above this multiple of the lowest loss: what follows the first steps is what matters."""


def pictures(groups: Mapping[str, Mapping[str, Entry]]) -> dict[str, Figure]:
    """The pictures of a race by name: one panel per group, the dense runs grey in each."""
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
