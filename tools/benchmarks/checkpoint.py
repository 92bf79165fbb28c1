"""Measures what saving, resuming and changing the parallel layout cost: seconds that training stands still, and memory.

    python tools/benchmarks/checkpoint.py --config quickstart --out /tmp/checkpoints data.prefix=CORPUS \\
        data.tokenizer=MODEL train.steps=40 checkpoint.every=4 --json checkpoint.json

save      the run is trained twice in `--out`, with saves in the foreground and beside the training; what `events.jsonl`
          says of each save: how long training stood still, and how long this process wrote
resume    from the launch of `run_training` to the model with its states, for a run that has no step left but one
reshape   every shard of other tensor-parallel sizes, read from the newest checkpoint as an elastic resume reads it;
          memory above what stood before, beside the largest parameter
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron.core import parallel_state

from model.sharding import TensorLayout
from pretrain.checkpoint.format import FP32_BYTES, KEYS
from pretrain.checkpoint.reader import CheckpointReader, find_checkpoint
from pretrain.config.run import RunConfig, load_config
from pretrain.disk import json_text, replace_text
from pretrain.distributed import joined_processes
from pretrain.engine.build import tear_down
from pretrain.errors import ConfigError, run_command
from pretrain.provenance import git_revision, hardware, installed_versions
from pretrain.train import run_training
from tools.arguments import output_file
from tools.benchmarks.resident_bytes import PeakBytes, freed_memory_returned, process_bytes

TENSOR_SIZES = (1, 2, 4)
MODES = {"foreground": False, "background": True}


def main() -> None:
    arguments = _arguments()
    if arguments.out.exists():
        raise ConfigError(f"{arguments.out} is there already: give a new folder for --out")
    with joined_processes() as processes, freed_memory_returned():
        if processes != 1:
            raise ConfigError(f"the benchmark runs on one process, and there are {processes}: start it with python")
        rows = [*saves(arguments), *resumes(arguments), *reshapes(arguments.out / "foreground")]
    for row in rows:
        print("  ".join(f"{key} {_shown(value)}" for key, value in row.items()))
    if arguments.json is not None:
        facts = {"commit": git_revision(), "versions": installed_versions(), "hardware": hardware(), "rows": rows}
        replace_text(arguments.json, json_text(facts, indent=2) + "\n")


def _config(arguments: argparse.Namespace, mode: str, *more: str) -> RunConfig:
    folder = [f"run.folder={arguments.out / mode}", f"checkpoint.background={str(MODES[mode]).lower()}"]
    return load_config(arguments.config, [*arguments.overrides, *folder, *more])


def _run(config: RunConfig) -> None:
    trainer = run_training(config, 1)
    assert trainer is not None
    tear_down(trainer.engine)
    parallel_state.destroy_model_parallel()


def saves(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each way to save."""
    for mode in MODES:
        _run(_config(arguments, mode))
        lines = (arguments.out / mode / "events.jsonl").read_text(encoding="utf-8").splitlines()
        found = [event for event in map(json.loads, lines) if event["event"] == "checkpoint"]
        found = found[:-1]  # the last one is waited for in any case
        if not found:
            raise ConfigError("no save but the last one happens: lower checkpoint.every")
        newest = _newest(arguments.out / mode)
        yield {
            "what": f"save, {mode}",
            "saves": len(found),
            "bytes": sum(record.bytes for record in newest.manifest.files),
            "stall_seconds": _spread([event["stall_seconds"] for event in found]),
            "write_seconds": _spread([event["write_seconds"] for event in found]),
        }


def resumes(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row; the run goes on by one step, whose time is a part of it."""
    steps = _newest(arguments.out / "foreground").step
    start = time.perf_counter()
    _run(_config(arguments, "foreground", f"train.steps={steps + 1}", "train.validate_every=0"))
    yield {"what": "resume, one step and its save", "seconds": time.perf_counter() - start}


def reshapes(run: Path) -> Iterator[dict[str, Any]]:
    """A row for each tensor-parallel size that takes all shards up."""
    reader = _newest(run)
    largest = max(_bytes(layout) for layout in reader.layouts.values())
    for size in TENSOR_SIZES:
        before, start = process_bytes(), time.perf_counter()
        with PeakBytes() as peak:
            for name in reader.layouts:
                for key in KEYS[:1] if name in reader.frozen else KEYS:
                    for index in range(size):
                        reader.read_shard(name, key, index, size)
        yield {
            "what": f"read for tensor-parallel size {size}",
            "seconds": time.perf_counter() - start,
            "peak_bytes": peak.bytes - before,
            "largest_parameter_bytes": largest,
        }


def _bytes(layout: TensorLayout) -> int:
    return FP32_BYTES * math.prod(layout.full_shape)


def _newest(run: Path) -> CheckpointReader:
    folder = find_checkpoint(run / "checkpoints")
    assert folder is not None
    return CheckpointReader(folder)


def _spread(seconds: list[float]) -> list[float]:
    """Least, median and most of some seconds."""
    return [min(seconds), statistics.median(seconds), max(seconds)]


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return "..".join(map(_shown, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure what checkpoints cost: stalls, seconds and memory.")
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file, or the name of an installed config")
    parser.add_argument("--out", type=Path, required=True, help="a new folder for both runs")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write all rows as JSON")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings laid over the file")
    return parser.parse_intermixed_args()


if __name__ == "__main__":
    run_command(main)
