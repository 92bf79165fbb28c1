"""Measures what policy `gradient` costs a run: its probed training steps and its decisions, against plain steps.

    python tools/benchmarks/probes.py --config FILE --output FOLDER [--json FILE] [section.key=value ...]

Trains the model of a config for a short while with decisions every few steps and no room to grow, on one process.
What a decision costs is what the run itself writes into its events: what probed steps take more than the plain ones
between, and measuring and deciding. With medians over the decisions and plain steps of the same run,

    share of training time = decisions of the config's run · seconds of a decision
                             / (train.steps · seconds of a plain step)
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

from model.config import factored_projections
from pretrain.config.files import merge
from pretrain.config.run import RunConfig, load_config, parse_config
from pretrain.disk import JsonLines, json_text, replace_text
from pretrain.errors import ConfigError, run_command
from pretrain.policies.gradient import PROBED_STEPS
from pretrain.policies.policy import RankConfig, check_due
from pretrain.policies.select import with_defaults
from pretrain.provenance import git_revision, hardware, installed_versions
from pretrain.tokenizer.load import open_tokenizer
from tools.benchmarks.used_rank import train

CHECK_EVERY = 8
"""Steps between two decisions of the benchmark."""
WARM_UP_DECISIONS = 2


def main() -> None:
    arguments = _arguments()
    base = load_config(arguments.config, arguments.overrides)
    if not factored_projections(base.model):
        raise ConfigError("there is nothing to probe in a dense model: set model.parametrization=factored")
    vocabulary = open_tokenizer(base.data.tokenizer).vocabulary
    pace = with_defaults(base.rank.model_copy(update={"policy": "gradient"}), base.train.steps)
    decisions = sum(check_due(step, pace) for step in range(base.train.steps))
    steps = CHECK_EVERY * (WARM_UP_DECISIONS + arguments.decisions) + 1  # the last decision comes before a step
    config = parse_config(_settings(base, arguments.output / "run", steps)).with_vocabulary(vocabulary)
    train(config, threads=arguments.threads)
    found = costs(arguments.output / "run", decisions / base.train.steps)
    facts = {
        **found,
        "rank": config.rank.initial,
        "probe": config.rank.probe,
        "hidden": config.model.hidden,
        "layers": config.model.layers,
        "tokens_per_step": config.train.global_batch * config.model.sequence_length,
        "commit": git_revision(),
        "versions": installed_versions(),
        "hardware": hardware(),
    }
    if arguments.json is not None:
        replace_text(arguments.json, json_text(facts, indent=2) + "\n")
    print(
        f"plain step {found['plain_step_seconds']:.4f} s (± {found['plain_step_spread_seconds']:.4f}), decision "
        f"{found['decision_seconds']:.4f} s (± {found['decision_spread_seconds']:.4f}; medians, {found['decisions']} "
        f"decisions)\nwith {decisions} decisions in {base.train.steps} steps: "
        f"{100.0 * found['share_of_training_time']:.2f} % of training time"
    )


def _settings(base: RunConfig, folder: Path, steps: int) -> dict[str, Any]:
    """The config's own model, batch and probe, without anything that would disturb the measurement."""
    layers, ranks = factored_projections(base.model), base.initial_ranks()
    spent = sum(ranks[layer.name] * (layer.in_features + layer.out_features) for layer in layers)
    dense = sum(layer.in_features * layer.out_features for layer in layers)
    content = base.model_dump(mode="json")
    content["rank"] = RankConfig(
        policy="gradient",
        initial=base.rank.initial,
        quantum=base.rank.quantum,
        probe=base.rank.probe,
        check_every=CHECK_EVERY,
        stop_step=steps,
        budget=min((spent + 1) / dense, 1.0),  # of which less than one direction is left
    ).model_dump(mode="json")
    changes = {
        "run": {"folder": str(folder)},
        "train": {"steps": steps, "log_every": 1, "validate_every": 0, "validation_sequences": 0, "batch_ramp": None},
        "schedule": {"shape": "constant", "warmup_steps": 0, "decay_steps": 0},
        "checkpoint": {"every": 0},
    }
    return merge(content, changes)


def costs(folder: Path, decisions_a_step: float) -> dict[str, Any]:
    """Medians of a run in `folder`, and the share of training time with so many decisions a step."""
    first = CHECK_EVERY * WARM_UP_DECISIONS
    seconds = {line["step"]: line["step_seconds"] for line in JsonLines(folder / "metrics.jsonl").read()}
    # A decision after step n was measured in the steps that lead to n.
    plain = [seconds[step] for step in seconds if step > first and -step % CHECK_EVERY >= PROBED_STEPS]
    decisions = [
        event["seconds"]
        for event in JsonLines(folder / "events.jsonl").read()
        if event["event"] == "decision" and event["step"] > first
    ]
    plain_step, decision = statistics.median(plain), statistics.median(decisions)
    return {
        "plain_step_seconds": plain_step,
        "plain_step_spread_seconds": statistics.stdev(plain),
        "decision_seconds": decision,
        "decision_spread_seconds": statistics.stdev(decisions),
        "decisions": len(decisions),
        "decisions_a_step": decisions_a_step,
        "share_of_training_time": decisions_a_step * decision / plain_step,
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure what policy gradient costs a run.")
    parser.add_argument("--config", required=True, metavar="FILE", help="config of the run, with its data")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the short run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures as JSON")
    parser.add_argument("--decisions", type=int, default=10, help="that are measured (10)")
    parser.add_argument("--threads", type=int, default=1, help="of the run (1)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings laid over the file")
    arguments = parser.parse_intermixed_args()
    for flag, least in (("decisions", 2), ("threads", 1)):
        if getattr(arguments, flag) < least:
            raise ConfigError(f"--{flag} is {getattr(arguments, flag)}: set it to {least} or more")
    return arguments


if __name__ == "__main__":
    run_command(main)
