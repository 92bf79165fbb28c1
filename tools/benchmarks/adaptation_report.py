"""Table, picture and page of `tools/benchmarks/adaptation.py`."""

from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from pretrain.disk import replace_text
from pretrain.errors import ConfigError
from pretrain.provenance import git_revision, hardware, installed_versions

BEGIN, END = "<!-- figures: written by tools/benchmarks/adaptation.py -->", "<!-- end of figures -->"
_STYLES = {
    "full": ("full fine-tuning", "k", "D"),
    "lora": ("fixed rank", "tab:blue", "o"),
    "peft": ("fixed rank, peft library", "tab:orange", "s"),
    "growing": ("growing rank", "tab:green", "^"),
}


def facts_of_benchmark(records: Sequence[Mapping[str, Any]], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that was measured, and on what."""
    settings = ("base_steps", "steps", "batch", "model")
    best = best_of_each_way(records)
    return {
        "benchmark": "adaptation",
        "settings": {key: arguments[key] for key in settings},
        "commit": git_revision(),
        "versions": installed_versions() | {name: metadata.version(name) for name in ("transformers", "peft")},
        "hardware": hardware(),
        "not_adapted": next((r["validation_loss_before"] for r in records if "validation_loss_before" in r), None),
        "runs": list(records),
        "best": best,
        "table": list(table(best)),
    }


def best_of_each_way(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The run with the lowest validation loss of each way; `at_edge` if its learning rate ends the grid."""
    best = []
    for way in dict.fromkeys(record["way"] for record in records):
        runs = [record for record in records if record["way"] == way]
        finished = [record for record in runs if record["validation_loss"] is not None]
        winner = min(finished, key=lambda record: record["validation_loss"])
        rates = sorted(record["learning_rate"] for record in runs)
        best.append({**winner, "at_edge": winner["learning_rate"] in (rates[0], rates[-1])})
    return sorted(best, key=lambda record: record["trained_parameters"])


def table(best: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Markdown, fewest trained parameters first."""
    yield "| way | rank | trained parameters | learning rate | validation loss |"
    yield "|---|---|---|---|---|"
    for record in best:
        rank = "–" if record["rank"] is None else f"{record['rank']}"
        if record["method"] == "growing":
            rank = f"{record['rank']} to {record['mean_rank']:.1f}"
        label = _STYLES[record["method"]][0]
        if record["policy"] != "fixed":
            label += f", {record['policy']}"
        edge = " (end of the grid)" if record["at_edge"] else ""
        yield (
            f"| {label} | {rank} | {record['trained_parameters']:,} | {record['learning_rate']:g}{edge} "
            f"| {record['validation_loss']:.4f} |"
        )


def write_picture(facts: Mapping[str, Any], path: Path) -> None:
    """Validation loss against trained parameters, the best learning rate of each way."""
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for method, (label, colour, marker) in _STYLES.items():
        points = [record for record in facts["best"] if record["method"] == method]
        axes.plot(
            [record["trained_parameters"] for record in points],
            [record["validation_loss"] for record in points],
            linestyle="-" if method in ("lora", "peft") else "",
            color=colour,
            marker=marker,
            label=label,
        )
        named = [record for record in points if record["policy"] != "fixed"]
        for height, record in enumerate(sorted(named, key=lambda record: record["validation_loss"])):
            place = (record["trained_parameters"], record["validation_loss"])
            axes.annotate(record["policy"], place, xytext=(7, 14 * height - 10), textcoords="offset points", fontsize=8)
    axes.set_xscale("log")
    axes.set_xlabel("trained parameters")
    axes.set_ylabel("validation loss (nats a token)")
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def write_page(facts: Mapping[str, Any], path: Path) -> None:
    """Puts the figures between the marks of a page that is there."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ConfigError(f"{path} has no place for the figures: put a line {BEGIN!r} and a line {END!r} into it")
    settings, machine = facts["settings"], facts["hardware"]
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    body = [
        "",
        f"{settings['base_steps']} steps of pretraining, {settings['steps']} of each adaptation, "
        f"{settings['batch'] * settings['model']['sequence_length']:,} tokens a step; one seed. Not adapted: "
        f"{facts['not_adapted']:.4f}.",
        "",
        *facts["table"],
        "",
        f"{machine['processor']}, {machine['threads']} thread; {versions}; commit {facts['commit']}.",
        "",
    ]
    replace_text(path, before + BEGIN + "\n".join(body) + "\n" + END + after)
