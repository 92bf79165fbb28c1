"""Turns a sharded checkpoint into one factored model: fp32 safetensors, architecture and ranks, tokenizer.

    python tools/consolidate_checkpoint.py --checkpoint runs/quickstart --output merged/
    python tools/consolidate_checkpoint.py --checkpoint runs/x/checkpoints/step_000001000 --output merged/ \\
        --max-shard-size 2GB --overwrite

Needs no GPU and no process group, and holds one parameter in memory at a time, whatever layout wrote the checkpoint.
"""

import argparse
import re
from pathlib import Path

from tqdm import tqdm

from pretrain.checkpoint_reader import CheckpointReader, locate_checkpoint
from pretrain.consolidated import ConsolidatedModel, check_output, write_consolidated
from pretrain.errors import ConfigError, run_command

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_bytes(text: str) -> int:
    """`4GB`, `500 MB`, `2GiB` or a plain number of bytes."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)", text.strip())
    size = int(float(match[1]) * UNITS.get(match[2].upper(), 0)) if match else 0
    if size < 1:
        raise ConfigError(f"{text!r} is not a size: give --max-shard-size as 4GB, 500MB or 2GiB")
    return size


def main() -> None:
    parser = argparse.ArgumentParser(description="Turn a sharded checkpoint into one factored model.")
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="a run folder, its checkpoints folder, or one step's folder"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to make")
    parser.add_argument("--max-shard-size", default="4GB", help="most bytes of tensors in one file (default: 4GB)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier consolidated model in --output")
    arguments = parser.parse_args()

    max_shard_bytes = parse_bytes(arguments.max_shard_size)
    check_output(arguments.output, arguments.overwrite)
    folder = locate_checkpoint(arguments.checkpoint, verify=True)
    reader = CheckpointReader(folder)
    with tqdm(total=len(reader.layouts), desc="consolidating", unit=" parameters") as bar:
        write_consolidated(
            reader,
            arguments.output,
            max_shard_bytes,
            overwrite=arguments.overwrite,
            on_parameter=lambda name: bar.update(),
        )
    model = ConsolidatedModel(arguments.output)
    size = sum(path.stat().st_size for path in arguments.output.iterdir())
    print(
        f"step {reader.step} of {folder}: {model.parameters:,} parameters in {size / 1e9:.3f} GB at {arguments.output}"
    )
    if not model.config.bidirectional:  # a masked model has no dense export
        print(f"next: python tools/densify_checkpoint.py --input {arguments.output} --output dense/")


if __name__ == "__main__":
    run_command(main)
