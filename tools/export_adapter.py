"""Turns a consolidated additive model into a LoRA adapter that PEFT loads, and the base model it belongs to.

    python tools/export_adapter.py --input merged/ --output adapted/
    python tools/export_adapter.py --input merged/ --output adapted/ --dtype bfloat16 --overwrite

Needs no GPU, no launcher and no PEFT. `adapted/base` is a Hugging Face folder of the frozen weights with the trained
embeddings, norms and biases, `adapted/adapter` holds the factors. Both are read back, put together and compared with
the additive model before the folder gets its name. Memory: the fp32 weights of one model at a time.
"""

import argparse
from pathlib import Path

from model.costs.arithmetic import trained_parameters
from model.huggingface.adapter import adapter_config
from pretrain.convert.adapter_export import (
    ADAPTER_FOLDER,
    BASE_FOLDER,
    check_additive,
    compare_with_adapter,
    write_adapter_export,
)
from pretrain.convert.consolidated import ConsolidatedModel
from pretrain.convert.export_marker import ADAPTER_EXPORT
from pretrain.convert.logit_comparison import TOLERANCES, Comparison
from pretrain.errors import run_command
from tools.model_export import DTYPES, open_source, parse_arguments, write_export


def main() -> None:
    arguments = parse_arguments(
        "Writes a consolidated additive model as a LoRA adapter for PEFT.", ADAPTER_EXPORT, "the base's weights"
    )
    consolidated = open_source(arguments.input)
    check_additive(consolidated)
    comparison = write_export(consolidated, arguments, ADAPTER_EXPORT, _write)
    print(_summary(consolidated, arguments.output.resolve(), arguments.dtype, comparison))


def _write(consolidated: ConsolidatedModel, folder: Path, arguments: argparse.Namespace) -> Comparison:
    dtype, size = DTYPES[arguments.dtype], arguments.max_shard_size
    write_adapter_export(consolidated, folder, arguments.output.resolve(), dtype=dtype, max_shard_bytes=size)
    return compare_with_adapter(consolidated, folder, dtype=dtype)


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
