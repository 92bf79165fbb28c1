"""Makes an existing model one that Espalier trains: with a low-rank update, as factors, or as it is.

    python tools/import_huggingface.py --input llama/ --output start/ --parametrization additive --rank 8
    python tools/import_huggingface.py --input gpt2/ --output start/ --parametrization factored --rank 128 \\
        --sequence-length 512 --tokenizer tokenizer.model
    python tools/import_huggingface.py --input merged/ --output start/ --parametrization factored --rank 64

--input is a Hugging Face folder (`LlamaForCausalLM`, `GPT2LMHeadModel`, safetensors), or a consolidated folder of
Espalier, whatever its parametrization: a dense run goes on as a factored one that way.

    additive    W0 + B A: W0 is the model's weight and stays, B starts at zero: low-rank adaptation, whose rank may grow
    factored    B A: the truncated singular value decomposition of every weight
    dense       W: all of the weights are trained

Needs no GPU and no launcher, and holds one weight in memory at a time; then the logits of both models are compared. The
output is a consolidated folder; the launch line that trains it is printed.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch
import transformers

from model.config import ModelConfig, factored_projections, projections
from model.costs.arithmetic import total_parameters, trained_parameters
from pretrain.convert.consolidated import TRAINING_NAME, ConsolidatedModel, check_output
from pretrain.convert.huggingface_import import open_source, source_logits
from pretrain.convert.logit_comparison import (
    TOLERANCES,
    Comparison,
    compare_logits,
    comparison_tokens,
    dense_logits,
    training_logits,
)
from pretrain.convert.source import DenseSource
from pretrain.convert.start_folder import check_rank, write_import, write_training_settings
from pretrain.disk import new_folder
from pretrain.errors import CheckpointError, run_command
from tools.arguments import parse_bytes


def main() -> None:
    arguments = _parse_arguments()
    max_shard_bytes = parse_bytes(arguments.max_shard_size)
    output = arguments.output.resolve()
    check_output(output, arguments.overwrite)
    transformers.utils.logging.disable_progress_bar()
    source = open_source(arguments.input, sequence_length=arguments.sequence_length, tokenizer=arguments.tokenizer)
    changes = {"parametrization": arguments.parametrization, "factored_layers": arguments.factored_layers}
    config = source.config.model_copy(update=changes)
    check_rank(config, arguments.rank)
    with new_folder(output) as folder:
        model, kept = write_import(
            source, config, arguments.rank, folder, seed=arguments.seed, max_shard_bytes=max_shard_bytes
        )
        comparison = _verified(arguments.input, source, model)
        write_training_settings(config, arguments.rank, model.tokenizer_path.name, folder, output)
    print(_summary(arguments.input, source, model, output, kept, comparison))


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Makes an existing model one that Espalier trains.")
    parser.add_argument(
        "--input",
        type=Path,
        required=True,
        help="Hugging Face folder with safetensors weights, or a consolidated folder of Espalier",
        metavar="DIR",
    )
    parser.add_argument("--output", type=Path, required=True, help="consolidated folder to make", metavar="DIR")
    parser.add_argument(
        "--parametrization",
        choices=("additive", "factored", "dense"),
        required=True,
        help="a low-rank update of frozen weights, factors by truncated SVD, or the weights as they are",
    )
    parser.add_argument("--rank", type=int, help="of every layer's factors, at the start", metavar="R")
    parser.add_argument(
        "--factored-layers", choices=("all", "mlp"), default="all", help="which linear layers get factors (all)"
    )
    parser.add_argument("--sequence-length", type=int, help="longest sequence (the model's own)", metavar="N")
    parser.add_argument(
        "--tokenizer", type=Path, help="its tokenizer: a file or a folder (the one in --input)", metavar="PATH"
    )
    parser.add_argument("--seed", type=int, default=1234, help="of the first A of additive layers (1234)", metavar="S")
    parser.add_argument(
        "--max-shard-size", default="4GB", help="largest weight file, e.g. 500MB or 2GiB (4GB)", metavar="SIZE"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier consolidated model in --output")
    return parser.parse_args()


def _verified(folder: Path, source: DenseSource, model: ConsolidatedModel) -> Comparison:
    """What was written against what its own library says; below full rank factors compute something else, which is
    reported, and what they were made of is verified instead."""
    tokens = comparison_tokens(model)
    theirs, ours = source_logits(folder, tokens), training_logits(model, tokens)
    read = dense_logits(source, tokens) if model.config.parametrization == "factored" else ours
    verified, tolerance = compare_logits(theirs, read), TOLERANCES[torch.float32]
    if not verified.within(tolerance):
        raise CheckpointError(
            f"the imported model does not compute what {folder} computes: logits differ by up to "
            f"{verified.difference:.3g} at a scale of {verified.scale:.3g}, and {tolerance:g} of the scale is allowed: "
            "nothing was imported"
        )
    return compare_logits(theirs, ours)


def _summary(
    source_folder: Path,
    source: DenseSource,
    model: ConsolidatedModel,
    output: Path,
    kept: Mapping[str, float],
    comparison: Comparison,
) -> str:
    config, ranks = model.config, model.ranks
    dense = total_parameters(source.config, {})
    lines = [
        f"imported {source_folder}, {config.family} with {config.layers} layers, to {output}",
        f"  parametrization  {_described(config, ranks)}",
        f"  parameters       {trained_parameters(config, ranks):,} trained of {model.parameters:,}; dense {dense:,}",
    ]
    if kept:
        labels = {projection.name: projection.label for projection in projections(config)}
        least = min(kept, key=lambda name: kept[name])
        mean = sum(kept.values()) / len(kept)
        lines.append(f"  energy kept      {mean:.1%} of the weights on average, {kept[least]:.1%} of {labels[least]}")
    lines.append(
        f"  logits           differ by {comparison.difference:.2e} at most, {comparison.relative_difference:.2e} of "
        f"their scale; greedy tokens the same at {comparison.same_greedy_tokens:,} of {comparison.tokens:,} positions"
    )
    lines += [f"  note             {note}" for note in source.notes]
    lines += [
        "",
        f"python tools/preprocess_corpus.py --input TEXTS --output-prefix CORPUS --append-eod "
        f"--tokenizer-model {output / model.tokenizer_path.name}",
        f"deepspeed pretrain/train.py --config {output / TRAINING_NAME} run.folder=runs/NAME data.prefix=CORPUS",
    ]
    return "\n".join(lines)


def _described(config: ModelConfig, ranks: Mapping[str, int]) -> str:
    if not factored_projections(config):
        return config.parametrization
    layers = "" if config.factored_layers == "all" else ", MLPs alone"
    return f"{config.parametrization}, rank {min(ranks.values())}{layers}"


if __name__ == "__main__":
    run_command(main)
