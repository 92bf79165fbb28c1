"""Turns a sharded checkpoint into one factored model: fp32 safetensors, architecture and ranks, tokenizer.

    python tools/consolidate_checkpoint.py --checkpoint runs/quickstart --output merged/
    python tools/consolidate_checkpoint.py --checkpoint runs/x/checkpoints/step_000001000 --output merged/ \\
        --max-shard-size 2GB --overwrite

Needs no GPU and no process group, and holds one parameter in memory at a time, whatever parallel layout wrote the
checkpoint.
"""

import argparse
from pathlib import Path

from pretrain.checkpoint.reader import CheckpointReader, locate_checkpoint
from pretrain.convert.consolidated import ConsolidatedModel, check_output, write_consolidated
from pretrain.errors import run_command
from tools.arguments import parse_bytes
from tools.console import progress


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
    with progress("consolidating", len(reader.layouts)) as bar:
        write_consolidated(
            reader,
            arguments.output,
            max_shard_bytes,
            overwrite=arguments.overwrite,
            on_parameter=lambda name: bar.advance(),
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
