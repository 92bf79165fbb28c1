"""Shows that saving, resuming, changing the parallel layout, consolidating and densifying hold within a limit of
memory that the model's dense form would break.

    python tools/benchmarks/memory_limit.py --config quickstart --out /tmp/limited --limit 3GB data.prefix=CORPUS \\
        data.tokenizer=MODEL model.hidden=2048 model.layers=24 model.heads=16 model.query_groups=16 \\
        model.sequence_length=64 train.micro_batch=1 train.global_batch=2 rank.policy=fixed rank.schedule=[] \\
        rank.initial=16 --json limited.json

Every row is a command of its own in a control group of Linux that holds `--limit` bytes, swap none; a command that
needs more is killed, and the benchmark says so. Files that the kernel keeps in memory count, and are given up where
room is wanted; `peak_bytes` is what is no file: the most at one time, of all processes of the command together,
launcher and libraries included. `above_bytes` of saves is their peak above what stood when they began. Needs root.
"""

import argparse
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from model.costs.arithmetic import total_parameters
from pretrain.checkpoint.format import FP32_BYTES
from pretrain.checkpoint.reader import CheckpointReader, find_checkpoint
from pretrain.config.run import load_config
from pretrain.disk import json_text, replace_text
from pretrain.errors import ConfigError, EspalierError, run_command
from pretrain.provenance import git_revision, hardware, installed_versions
from pretrain.tokenizer.load import open_tokenizer
from tools.arguments import output_file, parse_bytes

_SAMPLE_SECONDS = 0.005
_STEPS, _EVERY = 4, 2


class ControlGroup:
    """Holds processes to `limit_bytes`; of either version of Linux's control groups."""

    def __init__(self, limit_bytes: int) -> None:
        first, second = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
        self.old = (first / "memory.limit_in_bytes").exists()
        if not self.old and not (second / "cgroup.controllers").exists():
            raise ConfigError("this system has no control groups of memory under /sys/fs/cgroup: run it on Linux")
        self.folder = (first if self.old else second) / f"espalier_{os.getpid()}"
        try:
            self.folder.mkdir()
            limit = "memory.limit_in_bytes" if self.old else "memory.max"
            (self.folder / limit).write_text(str(limit_bytes))
            if not self.old and (self.folder / "memory.swap.max").exists():
                (self.folder / "memory.swap.max").write_text("0")
        except OSError as error:
            raise ConfigError(f"{self.folder} cannot be made ({error.strerror}): run the benchmark as root") from error

    def enter(self) -> None:
        """Puts the calling process, and those it starts, into the group."""
        (self.folder / "cgroup.procs").write_text(str(os.getpid()))

    def bytes_in_use(self) -> int:
        """Bytes that the group uses now, cached files left out."""
        facts = dict(line.split() for line in (self.folder / "memory.stat").read_text().splitlines())
        return int(facts["total_rss" if self.old else "anon"])

    def remove(self) -> None:
        self.folder.rmdir()


@contextmanager
def control_group(limit_bytes: int) -> Iterator[ControlGroup]:
    group = ControlGroup(limit_bytes)
    try:
        yield group
    finally:
        group.remove()


def limited(group: ControlGroup, command: Sequence[str]) -> tuple[float, list[tuple[float, int]]]:
    """Runs the command inside; seconds, and (time, bytes in use) all along. An error where it fails."""
    start, samples, ended = time.perf_counter(), [], threading.Event()

    def sample() -> None:
        while not ended.wait(_SAMPLE_SECONDS):
            samples.append((time.time(), group.bytes_in_use()))

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    found = subprocess.run(command, capture_output=True, text=True, preexec_fn=group.enter, check=False)
    ended.set()
    sampler.join()
    if found.returncode:
        killed = " (killed: the limit is too small)" if found.returncode in (-signal.SIGKILL, 137, 247) else ""
        said = "\n".join((found.stdout + found.stderr).splitlines()[-12:])
        raise EspalierError(f"{' '.join(command)} ended with {found.returncode}{killed}:\n{said}")
    return time.perf_counter() - start, samples


def rows(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The rows of the table, each as soon as it is measured."""
    run, merged, dense = (arguments.out / name for name in ("run", "merged", "dense"))
    settings = ["--config", arguments.config, *arguments.overrides, f"run.folder={run}", "train.validate_every=0"]
    settings += [f"checkpoint.every={_EVERY}", "schedule.warmup_steps=1", "train.log_every=1"]

    def train(processes: int, *more: str) -> list[str]:
        launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", str(processes), "--master_port"]
        return [*launcher, "29731", "pretrain/train.py", *settings, *more]

    steps = itertools.count(_STEPS, _EVERY)
    commands = {
        "train and save": train(1, f"train.steps={next(steps)}"),
        "resume": train(1, f"train.steps={next(steps)}"),
        "resume at tensor parallel 2": train(2, f"train.steps={next(steps)}", "parallel.tensor=2"),
        "resume at data parallel 2, ZeRO 3": train(2, f"train.steps={next(steps)}", "deepspeed.stage=3"),
        "consolidate": [sys.executable, "tools/consolidate_checkpoint.py"],
        "densify": [sys.executable, "tools/densify_checkpoint.py", "--input", str(merged), "--output", str(dense)],
    }
    commands["consolidate"] += ["--checkpoint", str(run), "--output", str(merged)]
    for what, command in commands.items():
        events = run / "events.jsonl"
        known = len(events.read_text(encoding="utf-8").splitlines()) if events.exists() else 0
        with control_group(arguments.limit) as group:
            seconds, samples = limited(group, command)
        row = {"what": what, "seconds": seconds, "peak_bytes": max(bytes_ for _, bytes_ in samples)}
        new = [json.loads(line) for line in events.read_text(encoding="utf-8").splitlines()[known:]]
        saves = [_above(event, samples) for event in new if event["event"] == "checkpoint"]
        yield row | ({"above_bytes": max(saves)} if saves else {})


def _above(save: dict[str, Any], samples: list[tuple[float, int]]) -> int:
    """Bytes that a save held at one time beside what stood when it began."""
    end = datetime.fromisoformat(save["time"]).timestamp()
    begin = end - max(save["stall_seconds"], save["write_seconds"])
    before = [bytes_ for when, bytes_ in samples if when <= begin]
    inside = [bytes_ for when, bytes_ in samples if begin < when <= end]
    return max([before[-1], *inside]) - before[-1]


def main() -> None:
    arguments = _arguments()
    if arguments.out.exists():
        raise ConfigError(f"{arguments.out} is there already: give a new folder for --out")
    config = load_config(arguments.config, arguments.overrides)
    model = config.with_vocabulary(open_tokenizer(config.data.tokenizer).vocabulary).model
    dense_bytes = FP32_BYTES * total_parameters(model.model_copy(update={"parametrization": "dense"}), {})
    if dense_bytes <= arguments.limit:
        raise ConfigError(
            f"the dense form has {dense_bytes / 1e9:.2f} GB and fits into --limit {arguments.limit / 1e9:.2f} GB, "
            "which shows nothing: give a larger model or a lower limit"
        )
    found = []
    for row in rows(arguments):
        print("  ".join(f"{key} {value:,.4g}" if key == "seconds" else f"{key} {value}" for key, value in row.items()))
        sys.stdout.flush()
        found.append(row)
    newest = find_checkpoint(arguments.out / "run" / "checkpoints")
    assert newest is not None
    reader = CheckpointReader(newest)
    sizes = {
        "limit_bytes": arguments.limit,
        "dense_bytes": dense_bytes,
        "checkpoint_bytes": sum(record.bytes for record in reader.manifest.files),
        "largest_parameter_bytes": max(_bytes(reader, name) for name in reader.layouts),
    }
    print("  ".join(f"{key} {value}" for key, value in sizes.items()))
    if arguments.json is not None:
        facts = {"commit": git_revision(), "versions": installed_versions(), "hardware": hardware()}
        replace_text(arguments.json, json_text(facts | sizes | {"rows": found}, indent=2) + "\n")


def _bytes(reader: CheckpointReader, name: str) -> int:
    size = FP32_BYTES
    for length in reader.layouts[name].full_shape:
        size *= length
    return size


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Run everything that touches a checkpoint within a limit of memory.")
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file, or the name of an installed config")
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--limit", type=parse_bytes, required=True, metavar="SIZE", help="such as 3GB")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write all rows as JSON")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings laid over the file")
    return parser.parse_intermixed_args()


if __name__ == "__main__":
    run_command(main)
