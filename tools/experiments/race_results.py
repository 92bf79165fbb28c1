"""The raw figures of a race: what a finished run leaves, and the file that keeps all of them.

FLOPs of a step are counted by `model.costs.arithmetic` from the ranks it really had, once over the linear layers of the
blocks alone and once over the whole model; what an event says of its own arithmetic (`flops`) is added to both.
"""

import fcntl
import json
import lzma
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from model.config import factored_projections
from model.costs.arithmetic import linear_parameters, total_parameters, training_flops_per_token
from pretrain.config.run import RunConfig, load_config
from pretrain.disk import JsonLines, json_text, replace_bytes
from pretrain.errors import DataError
from pretrain.monitor.run_folder import CONFIG_FILE
from pretrain.provenance import hardware, installed_versions

FORMAT = 1
COMPRESSED = ".xz"
LARGEST_BYTES = 256 * 1024**2
"""Bytes of a file of results, decompressed: more is taken for a file that only pretends to be one."""
_STEP_KEYS = {"validation": "step", "ranks": "first_step", "layer_ranks": "step", "events": "step"}
_OWN_ENTRIES = ("validation", "checkpoint", "resume")
"""Events that a record keeps as something else, or not at all."""


@dataclass(frozen=True)
class Stretch:
    """Steps between two changes of rank."""

    first_step: int
    steps: int
    mean_rank: float | None
    """None for a dense model."""
    linear_parameters: int
    parameters: int
    linear_flops_per_step: float
    flops_per_step: float


class Results:
    """The file of results: one JSON object, written as a whole, by one process at a time; compressed if its name ends
    in `.xz`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, Any]:
        """The content of the file: `runs` by key, and `speed`, the timings."""
        if not self.path.exists():
            return {"format_version": FORMAT, "runs": {}, "speed": {}}
        try:
            content = json.loads(self._bytes())
            known = content["format_version"] == FORMAT and isinstance(content["runs"], dict)
        except (ValueError, KeyError, TypeError, RecursionError, EOFError, lzma.LZMAError) as error:
            raise DataError(
                f"{self.path} is no file of race results: mend it or name another with --results"
            ) from error
        if not known:
            raise DataError(f"{self.path} has another format than {FORMAT}: name another file with --results")
        return dict(content)

    def add(self, section: str, key: str, record: Mapping[str, Any]) -> None:
        """Adds one record, with whatever another race wrote meanwhile left in place."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with locked(self.path.parent):
            content = self.read()
            content[section][key] = record
            self.write(content)

    def write(self, content: Mapping[str, Any]) -> None:
        """Replaces the file."""
        stored = (json_text(content, indent=1) + "\n").encode()
        replace_bytes(self.path, lzma.compress(stored) if self.path.suffix == COMPRESSED else stored)

    def _bytes(self) -> bytes:
        """The JSON text; ValueError if there is more of it than any race writes."""
        if self.path.suffix != COMPRESSED:
            return self.path.read_bytes()
        with lzma.open(self.path) as file:
            content = file.read(LARGEST_BYTES + 1)
        if len(content) > LARGEST_BYTES:
            raise ValueError(f"more than {LARGEST_BYTES} bytes")
        return content


def thinned(content: Mapping[str, Any]) -> str:
    """The same results for people, as JSON with a run a line: what a run was, its losses and ranks by step, what it
    cost. Settings, events, ranks by layer and versions are left out."""
    runs = ",\n".join(f"  {json.dumps(key)}: {json_text(_thin_run(run))}" for key, run in content["runs"].items())
    speed = ",\n".join(
        f"  {json.dumps(key)}: {json_text({name: facts[name] for name in ('kind', 'rank', 'step_seconds')})}"
        for key, facts in content["speed"].items()
    )
    return f'{{"format_version": {FORMAT},\n "runs": {{\n{runs}\n }},\n "speed": {{\n{speed}\n }}\n}}\n'


def _thin_run(run: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **{name: run[name] for name in ("method", "learning_rate", "seed", "steps", "diverged", "validation_loss")},
        "loss_by_step": [[point["step"], round(point["loss"], 4)] for point in run["validation"]],
        "mean_rank_from_step": [
            [stretch["first_step"], stretch["mean_rank"] and round(stretch["mean_rank"], 2)] for stretch in run["ranks"]
        ],
        "block_parameters": run["ranks"][-1]["linear_parameters"],
        "block_flops": run["end"]["linear_flops"],
        "flops": run["end"]["flops"],
        "tokens": run["end"]["tokens"],
        "step_seconds": run["step_seconds"],
        "commit": run["commit"][:12],
    }


@contextmanager
def locked(folder: Path, *, wait: bool = True) -> Iterator[int]:
    """Inside it `folder` is locked for this process, and for those that inherit the descriptor, which a lock of
    `filelock` does not give away; nothing is written for it. BlockingIOError if another has it and we do not `wait`."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield descriptor
    finally:
        os.close(descriptor)


def join_parts(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The figures of one run that was trained in several parts, one behind the other."""
    joined = parts[0]
    for part in parts[1:]:
        steps, start = joined["steps"], joined["end"]
        shifted = {
            name: [{**entry, key: entry[key] + steps} for entry in part[name]] for name, key in _STEP_KEYS.items()
        }
        for entry in shifted["validation"]:
            for figure in ("tokens", "linear_flops", "flops"):
                entry[figure] += start[figure]
        joined = {
            **part,
            **{name: [*joined[name], *entries] for name, entries in shifted.items()},
            "steps": steps + part["steps"],
            "end": {figure: start[figure] + part["end"][figure] for figure in start},
            "skipped_steps": joined["skipped_steps"] + part["skipped_steps"],
        }
    return joined


def read_part(folder: Path) -> dict[str, Any]:
    """The figures of one training run, finished or diverged. `end`: what it had spent by then."""
    config_file = folder / CONFIG_FILE
    config = load_config(str(config_file))
    events = _last_of_each_step(JsonLines(folder / "events.jsonl").read())
    metrics = JsonLines(folder / "metrics.jsonl").read()
    last_step = metrics[-1]["step"] if metrics else 0
    growth = [event for event in events if event["event"] == "growth"]
    stretches = rank_stretches(config, growth, last_step)

    def spent(step: int) -> dict[str, float]:
        linear, total = flops_until(step, stretches, events)
        tokens = step * config.train.global_batch * config.model.sequence_length
        return {"tokens": tokens, "linear_flops": linear, "flops": total}

    validation = [
        {**spent(event["step"]), **{name: event[name] for name in ("step", "bits_per_byte")}, "loss": event["lm_loss"]}
        for event in events
        if event["event"] == "validation"
    ]
    return {
        "commit": _commit(config_file),
        "versions": installed_versions(),
        "hardware": hardware(),
        "steps": last_step,
        "validation": validation,
        "ranks": [asdict(stretch) for stretch in stretches],
        "layer_ranks": _layer_ranks(config, growth),
        "events": [event for event in events if event["event"] not in _OWN_ENTRIES],
        "step_seconds": statistics.median(line["step_seconds"] for line in metrics) if metrics else None,
        "end": spent(last_step),
        "skipped_steps": metrics[-1]["skipped_steps"] if metrics else 0,
        "training_loss": metrics[-1]["lm_loss"] if metrics else None,
    }


def _last_of_each_step(events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Events without those that a resumed run has had again; the last one counts."""
    last = {(event["step"], event["event"]): event for event in events}
    return sorted(last.values(), key=lambda event: event["step"])


def rank_stretches(config: RunConfig, growth: Sequence[Mapping[str, Any]], last_step: int) -> list[Stretch]:
    """The run cut at its changes of rank, first to last."""
    model = config.model
    step_tokens = config.train.global_batch * model.sequence_length
    ranks = config.initial_ranks()
    changes = [{"step": 0, "after": {}}, *growth, {"step": last_step, "after": {}}]
    stretches = []
    for change, following in pairwise(changes):
        ranks |= change["after"]
        stretches.append(
            Stretch(
                first_step=change["step"],
                steps=following["step"] - change["step"],
                mean_rank=sum(ranks.values()) / len(ranks) if ranks else None,
                linear_parameters=linear_parameters(model, ranks),
                parameters=total_parameters(model, ranks),
                linear_flops_per_step=float(6 * linear_parameters(model, ranks) * step_tokens),
                flops_per_step=float(training_flops_per_token(model, ranks) * step_tokens),
            )
        )
    return stretches


def flops_until(step: int, stretches: Sequence[Stretch], events: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """FLOPs of the first `step` steps and their events: in the linear layers of the blocks, and in all."""
    extra = sum(float(event.get("flops", 0.0)) for event in events if event["step"] < step)
    linear = total = extra
    for stretch in stretches:
        steps = min(max(step - stretch.first_step, 0), stretch.steps)
        linear += steps * stretch.linear_flops_per_step
        total += steps * stretch.flops_per_step
    return linear, total


def _layer_ranks(config: RunConfig, growth: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rank of every layer by its short name, from each change on."""
    labels = {layer.name: layer.label for layer in factored_projections(config.model)}
    ranks = config.initial_ranks()
    history = []
    for change in [{"step": 0, "after": {}}, *growth]:
        ranks |= change["after"]
        history.append({"step": change["step"], "ranks": {labels[name]: rank for name, rank in ranks.items()}})
    return history if labels else []


def _commit(config_file: Path) -> str:
    """The revision that the run itself wrote down."""
    for line in config_file.read_text(encoding="utf-8").splitlines():
        if line.startswith("# git "):
            return line.removeprefix("# git ")
    return "unknown"
