"""Turns a consolidated factored model into a dense Hugging Face folder (`LlamaForCausalLM`, `GPT2LMHeadModel`).

    python tools/densify_checkpoint.py --input merged/ --output dense/
    python tools/densify_checkpoint.py --input merged/ --output dense/ --dtype bfloat16 --max-shard-size 2GB

Needs no GPU and no launcher. Every weight W = B A is computed in fp32 and streamed to disk; then the written folder is
loaded with transformers and its logits are compared with the factored model's. Only then does it get its name. Memory:
the fp32 weights of the factored model; dense ones come one at a time. Models of the masked objective, for which
transformers has no such class, are refused.
"""

import argparse
from pathlib import Path

from model.config import ModelConfig
from model.costs.arithmetic import total_parameters
from pretrain.convert.consolidated import ConsolidatedModel
from pretrain.convert.export_marker import DENSE_EXPORT
from pretrain.convert.huggingface_export import compare_with_export, write_dense_export
from pretrain.convert.logit_comparison import TOLERANCES, Comparison
from pretrain.errors import run_command
from tools.model_export import DTYPES, open_source, parse_arguments, write_export


def main() -> None:
    arguments = parse_arguments(
        "Writes a consolidated factored model as a dense Hugging Face folder, and verifies it.",
        DENSE_EXPORT,
        "the stored weights",
    )
    consolidated = open_source(arguments.input)
    comparison = write_export(consolidated, arguments, DENSE_EXPORT, _write)
    _say(_summary(consolidated, arguments.output.resolve(), arguments.dtype, comparison))


def _write(consolidated: ConsolidatedModel, folder: Path, arguments: argparse.Namespace) -> Comparison:
    dtype = DTYPES[arguments.dtype]
    _say(f"writing {arguments.dtype} weights of {arguments.output.resolve()}")
    write_dense_export(consolidated, folder, dtype=dtype, max_shard_bytes=arguments.max_shard_size)
    _say("comparing logits with the factored model")
    return compare_with_export(consolidated, folder, dtype=dtype)


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
