"""Are directions learned one after another? Pictures and numbers for a linear network and for a small transformer.

    python tools/experiments/incremental_learning.py --output pictures/ --json numbers.json  (both; minutes on one core)
    python tools/experiments/incremental_learning.py --output pictures/ --part linear        (seconds)
    python tools/experiments/incremental_learning.py --output pictures/ --part transformer --steps 500

`tools/experiments/linear_network.py` and `tools/experiments/transformer_updates.py` say what is trained; docs/theory.md
reads the result. The same machine gives the same numbers every time.
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pretrain.disk import json_text, replace_text
from pretrain.errors import ConfigError, run_command
from tools.console import progress
from tools.experiments.linear_network import Alignment, LinearTask, Trajectory, learn, learning_order, predicted_steps
from tools.experiments.transformer_updates import PLACES, OptimizerName, Run, TransformerTask, train, update_numbers

SCALES = (0.01, 0.1, 0.3, 1.0)
ALIGNMENTS: tuple[Alignment, ...] = ("aligned", "independent")
LINEAR, TRANSFORMER = LinearTask(), TransformerTask()
SHOWN = 10
"""Reported measurements of a transformer's effective rank."""


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(1)  # sums in one order
    numbers: dict[str, Any] = {}
    try:
        arguments.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output {arguments.output} cannot be made ({error.strerror}): name a folder") from error
    if arguments.part in ("linear", "both"):
        numbers["linear"] = linear_network(replace(LINEAR, seed=arguments.seed), SCALES, arguments.output)
    if arguments.part in ("transformer", "both"):
        task = replace(TRANSFORMER, steps=arguments.steps, seed=arguments.seed)
        numbers["transformer"] = transformer(task, arguments.output)
    if arguments.json is not None:
        replace_text(arguments.json, json_text(numbers, indent=2) + "\n")


def linear_network(task: LinearTask, scales: Sequence[float], output: Path) -> dict[str, Any]:
    """Trains at all `scales`, shows a table, draws `linear_network.png`; returns the numbers."""
    found: dict[str, dict[str, Any]] = {}
    trajectories: dict[tuple[float, Alignment], Trajectory] = {}
    with progress("linear network") as bar:
        for scale in scales:
            for alignment in ALIGNMENTS:
                trajectories[scale, alignment] = learn(task, scale, alignment, bar.advance)
    print(
        "| σ | start | matrix | steps to half of each mode | in order | next at half | directions, early | at the end |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for (scale, alignment), trajectory in trajectories.items():
        for matrix in ("product", "W2"):
            order = learning_order(task, trajectory, matrix)
            found[f"{scale} {alignment} {matrix}"] = asdict(order)
            print(
                f"| {scale} | {alignment} | {matrix} | {_listed(order.half_steps)} | "
                f"{order.draws_in_order}/{task.draws} | {order.next_at_half:.3f} | "
                f"{order.directions_at_first_half:.0f} | {order.directions_at_end:.0f} |"
            )
        if alignment == "aligned":
            predicted = predicted_steps(task, scale)
            found[f"{scale} predicted product"] = {"half_steps": predicted}
            print(f"| {scale} | aligned | product, predicted | {_listed(predicted)} | | | | |")
    _linear_picture(task, trajectories, scales).savefig(output / "linear_network.png", dpi=70)
    return {"task": asdict(task), "found": found}


def transformer(task: TransformerTask, output: Path) -> dict[str, Any]:
    """Trains with each optimizer, shows tables, draws `transformer_updates.png`; returns the numbers."""
    runs: dict[OptimizerName, Run] = {}
    with progress("transformer", task.steps * len(task.learning_rates)) as bar:
        for optimizer, _ in task.learning_rates:
            runs[optimizer] = train(task, optimizer, bar.advance)
    numbers = {optimizer: update_numbers(run) for optimizer, run in runs.items()}
    places = [place for place in PLACES if place <= task.hidden]
    print(f"| optimizer | loss | {' | '.join(f'k = {place}' for place in places)} |\n|---|---|{'---|' * len(places)}")
    for optimizer, said in numbers.items():
        steps = " | ".join(f"{said.half_steps[place]:,.0f}" for place in places)
        print(f"| {optimizer} | {said.final_loss:.3f} | {steps} |")
    for optimizer, said in numbers.items():
        every = list(said.effective_ranks)[1:]
        shown = [every[index] for index in np.linspace(0, len(every) - 1, min(SHOWN, len(every))).round().astype(int)]
        print(f"\n| {optimizer}, step | {' | '.join(f'{step:,}' for step in shown)} |\n|---|{'---|' * len(shown)}")
        print(f"| effective rank | {' | '.join(f'{said.effective_ranks[step]:.1f}' for step in shown)} |")
        print(f"| 90 % of the energy | {' | '.join(f'{said.energy_ranks[step]:.1f}' for step in shown)} |")
    _transformer_picture(task, runs).savefig(output / "transformer_updates.png", dpi=70)
    return {"task": asdict(task), "found": {optimizer: asdict(said) for optimizer, said in numbers.items()}}


def _listed(steps: Sequence[float]) -> str:
    return ", ".join(f"{step:,.0f}" for step in steps)


def _linear_picture(
    task: LinearTask, trajectories: dict[tuple[float, Alignment], Trajectory], scales: Sequence[float]
) -> Figure:
    """The first draw's singular values over steps; dashed where the aligned network is predicted to be half-way."""
    rows: list[tuple[Alignment, str]] = [("aligned", "product"), ("independent", "product"), ("independent", "W2")]
    figure = Figure(figsize=(3.4 * len(scales), 2.6 * len(rows)), layout="constrained")
    panels = figure.subplots(len(rows), len(scales), squeeze=False, sharey="row")
    for (alignment, matrix), line in zip(rows, panels, strict=True):
        for scale, panel in zip(scales, line, strict=True):
            trajectory = trajectories[scale, alignment]
            _curves(panel, trajectory.steps, trajectory.spectra[matrix][:, 0], len(task.modes))
            first = learning_order(task, trajectory, matrix).half_steps[0]
            panel.set_xlim(max(first / 20, 1.0), trajectory.steps[-1])
            panel.set_title(f"σ = {scale:g}, {alignment}: {matrix}", fontsize=9)
            if alignment == "aligned":
                for step in predicted_steps(task, scale):
                    panel.axvline(step, color="0.6", linestyle="--", linewidth=0.7)
        line[0].set_ylabel("singular values of the update")
    for panel in panels[-1]:
        panel.set_xlabel("step")
    return figure


def _curves(panel: Axes, steps: np.ndarray, values: np.ndarray, strong: int) -> None:
    """`values (times, n)`: the first `strong` in colour, the others pale."""
    for place in reversed(range(values.shape[1])):
        color = (0.1, 0.15 + 0.8 * place / strong, 0.95 - 0.8 * place / strong) if place < strong else "0.75"
        panel.plot(np.maximum(steps, 1), values[:, place], color=color, linewidth=1.1)
    panel.set_xscale("log")


def _transformer_picture(task: TransformerTask, runs: dict[OptimizerName, Run]) -> Figure:
    """Singular values over their final ones in the last layer, and effective ranks of all projections; dashed where a
    random walk is half-way."""
    kinds = ("qkv", "proj", "fc1", "fc2")
    places = [place for place in PLACES if place <= task.hidden]
    figure = Figure(figsize=(3.0 * (len(kinds) + 1), 2.8 * len(runs)), layout="constrained")
    panels = figure.subplots(len(runs), len(kinds) + 1, squeeze=False)
    for (optimizer, run), line in zip(runs.items(), panels, strict=True):
        for kind, panel in zip(kinds, line, strict=False):
            values = run.spectra[f"layer_{task.layers - 1:02d}/{kind}"]
            for index, place in enumerate(places):
                shade = index / len(places)
                color = (0.1, 0.15 + 0.8 * shade, 0.95 - 0.8 * shade)
                panel.plot(run.steps, values[:, place - 1] / values[-1, place - 1], color=color, label=f"k = {place}")
            panel.axvline(task.steps / 4, color="0.6", linestyle="--", linewidth=0.7)
            panel.axhline(0.5, color="0.85", linewidth=0.7)
            panel.set_title(f"{optimizer}: {kind}", fontsize=9)
        for kind in kinds:
            ranks = [np.exp(_entropy(run.spectra[f"layer_{layer:02d}/{kind}"][1:])) for layer in range(task.layers)]
            line[-1].plot(run.steps[1:], np.mean(ranks, axis=0), label=kind)
        line[-1].set_xscale("log")
        line[-1].set_title(f"{optimizer}: effective rank", fontsize=9)
        line[-1].legend(fontsize=7)
        line[0].set_ylabel("singular value / final")
    panels[0][0].legend(fontsize=7)
    for panel in panels[-1]:
        panel.set_xlabel("step")
    return figure


def _entropy(values: np.ndarray) -> np.ndarray:
    """Entropy `(times,)` of the shares that singular values `(times, n)` have in their sum."""
    shares = values / values.sum(axis=1, keepdims=True)
    return -(shares * np.log(np.maximum(shares, 1e-300))).sum(axis=1)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Are directions learned one after another?")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="where pictures are written")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all numbers")
    parser.add_argument("--part", choices=("both", "linear", "transformer"), default="both", help="what to train")
    parser.add_argument(
        "--steps", type=int, default=TRANSFORMER.steps, metavar="N", help=f"of the transformer ({TRANSFORMER.steps})"
    )
    parser.add_argument(
        "--seed", type=int, default=LINEAR.seed, metavar="S", help=f"of matrices, weights and text ({LINEAR.seed})"
    )
    arguments = parser.parse_args()
    if arguments.steps < 10:
        raise ConfigError(f"--steps is {arguments.steps}: set it to 10 or more")
    return arguments


if __name__ == "__main__":
    run_command(main)
