"""What densify_checkpoint.py and export_adapter.py have in common: arguments, and a folder that is written and verified
before it gets its name, with a marker of where it comes from."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

from pretrain.convert.consolidated import FACTS_NAME, ConsolidatedModel
from pretrain.convert.export_marker import TITLES, check_disk, check_output, check_source, files_below
from pretrain.convert.huggingface_export import dense_bytes
from pretrain.convert.logit_comparison import TOLERANCES, Comparison
from pretrain.disk import new_folder, write_blocks
from tools.arguments import parse_bytes

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parse_arguments(description: str, kind: str, stored: str) -> argparse.Namespace:
    """`kind`: of the export, `stored`: what `--dtype` is the type of."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--input", type=Path, required=True, help="folder written by tools/consolidate_checkpoint.py", metavar="DIR"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write", metavar="DIR")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help=f"type of {stored} (float32)")
    parser.add_argument(
        "--max-shard-size",
        type=parse_bytes,
        default="4GB",
        help="largest weight file, e.g. 500MB or 2GiB (4GB)",
        metavar="SIZE",
    )
    title = TITLES[kind].removeprefix("a ").removeprefix("an ")
    parser.add_argument("--overwrite", action="store_true", help=f"replace an earlier {title} in --output")
    return parser.parse_args()


def open_source(folder: Path) -> ConsolidatedModel:
    """The model to export; CheckpointError if it is none, or predicts hidden tokens."""
    check_source(folder)
    consolidated = ConsolidatedModel(folder)
    consolidated.check_causal()
    return consolidated


def write_export(
    consolidated: ConsolidatedModel,
    arguments: argparse.Namespace,
    kind: str,
    write: Callable[[ConsolidatedModel, Path, argparse.Namespace], Comparison],
) -> Comparison:
    """Makes `arguments.output`; `write` fills the empty folder it is given and compares what came of it.

    Raises CheckpointError if the folder is not ours to write, or the disk is too small.
    """
    transformers.utils.logging.disable_progress_bar()
    dtype, output = DTYPES[arguments.dtype], arguments.output.resolve()
    check_output(output, arguments.input.resolve(), kind, overwrite=arguments.overwrite)
    check_disk(output, dense_bytes(consolidated, dtype))
    with new_folder(output) as folder:
        comparison = write(consolidated, folder, arguments)
        marker = {
            "format_version": 1,
            "kind": kind,
            "source": str(consolidated.folder),
            "dtype": arguments.dtype,
            **{key: consolidated.facts[key] for key in ("model", "ranks", "growth", "train", "tokenizer")},
            "verified": comparison.facts(TOLERANCES[dtype]),
            "files": sorted([FACTS_NAME, *files_below(folder)]),
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        }
        write_blocks(folder / FACTS_NAME, [json.dumps(marker, indent=2).encode()])
    return comparison
