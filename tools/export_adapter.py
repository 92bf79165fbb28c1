"""Turns a consolidated additive model into a LoRA adapter that PEFT loads, and the base model it belongs to.

    python tools/export_adapter.py --input merged/ --output adapted/
    python tools/export_adapter.py --input merged/ --output adapted/ --dtype bfloat16 --overwrite

Needs no GPU, no launcher and no PEFT. `adapted/base` is a Hugging Face folder of the frozen weights with the trained
embeddings, norms and biases, `adapted/adapter` holds the factors. Both are read back, put together and compared with
the additive model before the folder gets its name. Memory: the fp32 weights of one model at a time.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import transformers

from model.adapter import adapter_config
from model.arithmetic import trained_parameters
from pretrain.adapter_export import (
    ADAPTER_FOLDER,
    BASE_FOLDER,
    check_additive,
    compare_with_adapter,
    write_adapter_export,
)
from pretrain.checkpoint_format import write_blocks
from pretrain.consolidated import FACTS_NAME, ConsolidatedModel
from pretrain.dense_export import dense_bytes
from pretrain.errors import run_command
from pretrain.export_marker import ADAPTER_EXPORT, check_disk, check_output, check_source, files_below
from pretrain.logit_comparison import TOLERANCES, Comparison
from pretrain.new_folder import new_folder
from tools.consolidate_checkpoint import parse_bytes
from tools.densify_checkpoint import DTYPES


def main() -> None:
    arguments = _parse_arguments()
    max_shard_bytes = parse_bytes(arguments.max_shard_size)
    check_source(arguments.input)
    transformers.utils.logging.disable_progress_bar()
    consolidated = ConsolidatedModel(arguments.input)
    check_additive(consolidated)
    consolidated.check_causal()
    dtype = DTYPES[arguments.dtype]
    output = arguments.output.resolve()
    check_output(output, arguments.input.resolve(), ADAPTER_EXPORT, overwrite=arguments.overwrite)
    check_disk(output, dense_bytes(consolidated, dtype))
    with new_folder(output) as folder:
        write_adapter_export(consolidated, folder, output, dtype=dtype, max_shard_bytes=max_shard_bytes)
        comparison = compare_with_adapter(consolidated, folder, dtype=dtype)
        marker = _marker(consolidated, folder, arguments.dtype, comparison)
        write_blocks(folder / FACTS_NAME, [json.dumps(marker, indent=2).encode()])
    print(_summary(consolidated, output, arguments.dtype, comparison))


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Writes a consolidated additive model as a LoRA adapter for PEFT.")
    parser.add_argument(
        "--input", type=Path, required=True, help="folder written by tools/consolidate_checkpoint.py", metavar="DIR"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write", metavar="DIR")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="type of the base's weights (float32)")
    parser.add_argument(
        "--max-shard-size", default="4GB", help="largest weight file, e.g. 500MB or 2GiB (4GB)", metavar="SIZE"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier adapter export in --output")
    return parser.parse_args()


def _marker(consolidated: ConsolidatedModel, folder: Path, dtype: str, comparison: Comparison) -> dict[str, Any]:
    """Where the export comes from, what was verified, and the files that are ours to replace."""
    return {
        "format_version": 1,
        "kind": ADAPTER_EXPORT,
        "source": str(consolidated.folder),
        "dtype": dtype,
        **{key: consolidated.facts[key] for key in ("model", "ranks", "growth", "train", "tokenizer")},
        "verified": comparison.facts(TOLERANCES[DTYPES[dtype]]),
        "files": sorted([FACTS_NAME, *files_below(folder)]),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def _summary(consolidated: ConsolidatedModel, output: Path, dtype: str, comparison: Comparison) -> str:
    config, ranks = consolidated.config, consolidated.ranks
    factors = trained_parameters(config.model_copy(update={"trained": "factors"}), ranks)
    settings = adapter_config(config, ranks)
    return "\n".join(
        [
            f"exported step {consolidated.facts['train']['step']} to {output}",
            f"  adapter        {factors:,} numbers in factors of rank {min(ranks.values())} to {max(ranks.values())}, "
            f"for {len(settings['target_modules'])} modules",
            f"  base           {dtype}, with the trained embeddings, norms and biases",
            f"  logits         differ by {comparison.difference:.2e} at most, {comparison.relative_difference:.2e} of "
            f"their scale ({TOLERANCES[DTYPES[dtype]]:g} allowed)",
            "",
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            f"base = AutoModelForCausalLM.from_pretrained({str(output / BASE_FOLDER)!r})",
            f"model = PeftModel.from_pretrained(base, {str(output / ADAPTER_FOLDER)!r})",
            f"tokenizer = AutoTokenizer.from_pretrained({str(output / BASE_FOLDER)!r})",
        ]
    )


if __name__ == "__main__":
    run_command(main)
