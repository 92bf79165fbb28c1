"""Turns a consolidated factored model into a dense Hugging Face folder (`LlamaForCausalLM`, `GPT2LMHeadModel`).

    python tools/densify_checkpoint.py --input merged/ --output dense/
    python tools/densify_checkpoint.py --input merged/ --output dense/ --dtype bfloat16 --max-shard-size 2GB

Needs no GPU and no launcher. Every weight W = B A is computed in fp32 and streamed to disk; then the written folder is
loaded with transformers and its logits are compared with the factored model's. Only then does it get its name. Memory:
the fp32 weights of one of the two models at a time. Models of the masked objective, for which transformers has no such
class, are refused.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import transformers

from model.arithmetic import total_parameters
from model.config import ModelConfig
from pretrain.checkpoint_format import write_blocks
from pretrain.consolidated import FACTS_NAME, ConsolidatedModel
from pretrain.dense_export import compare_with_export, dense_bytes, write_dense_export
from pretrain.errors import run_command
from pretrain.export_marker import DENSE_EXPORT, check_disk, check_output, check_source, files_below
from pretrain.logit_comparison import TOLERANCES, Comparison
from pretrain.new_folder import new_folder
from tools.consolidate_checkpoint import parse_bytes

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main() -> None:
    arguments = _parse_arguments()
    max_shard_bytes = parse_bytes(arguments.max_shard_size)
    check_source(arguments.input)
    transformers.utils.logging.disable_progress_bar()
    consolidated = ConsolidatedModel(arguments.input)
    consolidated.check_causal()
    dtype = DTYPES[arguments.dtype]
    output = arguments.output.resolve()
    check_output(output, arguments.input.resolve(), DENSE_EXPORT, overwrite=arguments.overwrite)
    check_disk(output, dense_bytes(consolidated, dtype))
    with new_folder(output) as folder:
        _say(f"writing {arguments.dtype} weights of {output}")
        write_dense_export(consolidated, folder, dtype=dtype, max_shard_bytes=max_shard_bytes)
        _say("comparing logits with the factored model")
        comparison = compare_with_export(consolidated, folder, dtype=dtype)
        marker = _marker(consolidated, folder, arguments.dtype, comparison)
        write_blocks(folder / FACTS_NAME, [json.dumps(marker, indent=2).encode()])
    _say(_summary(consolidated, output, arguments.dtype, comparison))


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Writes a consolidated factored model as a dense Hugging Face folder, and verifies it.",
    )
    parser.add_argument(
        "--input", type=Path, required=True, help="folder written by tools/consolidate_checkpoint.py", metavar="DIR"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write", metavar="DIR")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="type of the stored weights (float32)")
    parser.add_argument(
        "--max-shard-size", default="4GB", help="largest weight file, e.g. 500MB or 2GiB (4GB)", metavar="SIZE"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier dense export in --output")
    return parser.parse_args()


def _marker(consolidated: ConsolidatedModel, folder: Path, dtype: str, comparison: Comparison) -> dict[str, Any]:
    """Where the export comes from, what was verified, and the files that are ours to replace."""
    return {
        "format_version": 1,
        "kind": DENSE_EXPORT,
        "source": str(consolidated.folder),
        "dtype": dtype,
        **{key: consolidated.facts[key] for key in ("model", "ranks", "growth", "train", "tokenizer")},
        "verified": comparison.facts(TOLERANCES[DTYPES[dtype]]),
        "files": sorted([FACTS_NAME, *files_below(folder)]),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def _summary(consolidated: ConsolidatedModel, output: Path, dtype: str, comparison: Comparison) -> str:
    config: ModelConfig = consolidated.config
    # The export has neither padded rows nor factors.
    exported = config.model_copy(update={"parametrization": "dense", "vocabulary_multiple": 1})
    before, after = total_parameters(config, consolidated.ranks), total_parameters(exported, {})
    return "\n".join(
        [
            f"exported step {consolidated.facts['train']['step']} to {output}",
            f"  parameters     {after:,} dense ({before:,} trained), stored as {dtype}",
            f"  logits         differ by {comparison.difference:.2e} at most, {comparison.relative_difference:.2e} of "
            f"their scale ({TOLERANCES[DTYPES[dtype]]:g} allowed)",
            f"  greedy tokens  the same at {comparison.same_greedy_tokens:,} of {comparison.tokens:,} positions",
            "",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            f"model = AutoModelForCausalLM.from_pretrained({str(output)!r})",
            f"tokenizer = AutoTokenizer.from_pretrained({str(output)!r})",
        ]
    )


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    run_command(main)
