"""Turns a consolidated factored model into a dense Hugging Face folder (`LlamaForCausalLM`, `GPT2LMHeadModel`).

    python tools/densify_checkpoint.py --input merged/ --output dense/
    python tools/densify_checkpoint.py --input merged/ --output dense/ --dtype bfloat16 --max-shard-size 2GB

Needs no GPU and no launcher. Every weight W = B A is computed in fp32 and streamed to disk; then the written folder is
loaded with transformers and its logits are compared with the factored model's. Only then does it get its name. Memory:
the fp32 weights of one of the two models at a time.
"""

import argparse
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError

from model.arithmetic import total_parameters
from model.config import ModelConfig
from pretrain.checkpoint_format import decode_json, sync_folder, write_blocks
from pretrain.checkpoint_reader import read_limited
from pretrain.consolidated import FACTS_LIMIT_BYTES, FACTS_NAME, ConsolidatedModel
from pretrain.dense_export import Comparison, compare_with_export, dense_bytes, write_dense_export
from pretrain.errors import CheckpointError, run_command
from tools.consolidate_checkpoint import parse_bytes

KIND = "dense_export"
"""What the marker says in our exports, so that `--overwrite` never removes anything else."""

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SPARE_BYTES = 64 * 2**20
"""Room for settings, tokenizer and headers."""


def main() -> None:
    arguments = _parse_arguments()
    max_shard_bytes = parse_bytes(arguments.max_shard_size)
    if _read_marker(arguments.input) is not None:
        raise CheckpointError(f"{arguments.input} is a dense export already: give a consolidated model as --input")
    transformers.utils.logging.disable_progress_bar()
    consolidated = ConsolidatedModel(arguments.input)
    dtype = _DTYPES[arguments.dtype]
    output = arguments.output.resolve()
    _check_output(output, arguments.input.resolve(), overwrite=arguments.overwrite)
    _check_disk(output, dense_bytes(consolidated, dtype))
    with _new_folder(output) as folder:
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
    parser.add_argument("--dtype", choices=_DTYPES, default="float32", help="type of the stored weights (float32)")
    parser.add_argument(
        "--max-shard-size", default="4GB", help="largest weight file, e.g. 500MB or 2GiB (4GB)", metavar="SIZE"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier dense export in --output")
    return parser.parse_args()


def _check_output(output: Path, source: Path, *, overwrite: bool) -> None:
    """Refuses a target that is not ours to write."""
    if output == source or source.is_relative_to(output) or output.is_relative_to(source):
        raise CheckpointError(f"--output {output} and --input {source} lie inside each other: choose another --output")
    if not output.exists():
        return
    if not output.is_dir():
        raise CheckpointError(f"{output} is a file: choose another --output")
    if not any(output.iterdir()):
        return
    marker = _read_marker(output)
    foreign = {path.name for path in output.iterdir()} - set(marker["files"] if marker else ())
    if foreign:
        raise CheckpointError(
            f"{output} holds {min(foreign)}, which is not part of a dense export of Espalier and which replacing the "
            "folder would remove: choose another --output"
        )
    if not overwrite:
        raise CheckpointError(f"{output} is a dense export already: pass --overwrite to replace it")


def _read_marker(folder: Path) -> dict[str, Any] | None:
    """The facts of an earlier export in `folder`, or None when it is none."""
    path = folder / FACTS_NAME
    if not path.is_file():
        return None
    facts = decode_json(read_limited(path, FACTS_LIMIT_BYTES))
    return facts if facts.get("kind") == KIND and isinstance(facts.get("files"), list) else None


def _check_disk(output: Path, needed_bytes: int) -> None:
    existing = next(folder for folder in output.parents if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < needed_bytes + _SPARE_BYTES:
        raise CheckpointError(
            f"the export needs {needed_bytes / 1e9:.2f} GB and the disk of {existing} has {free / 1e9:.2f} GB free: "
            "free some space, choose another --output, or pass --dtype bfloat16"
        )


@contextmanager
def _new_folder(output: Path) -> Iterator[Path]:
    """A folder beside `output` that takes its name at the end, or is removed when anything goes wrong."""
    staging = output.with_name(f".{output.name}.partial")
    aside = output.with_name(f".{output.name}.replaced")
    try:
        if staging.exists():
            shutil.rmtree(staging)  # of a run that was killed
        staging.mkdir(parents=True)
        yield staging
        sync_folder(staging)
        if output.exists():
            if aside.exists():
                shutil.rmtree(aside)
            output.rename(aside)
        try:
            staging.rename(output)
        except OSError:
            if aside.exists():
                aside.rename(output)
            raise
        sync_folder(output.parent)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{output} could not be written: {error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if output.exists():
            shutil.rmtree(aside, ignore_errors=True)


def _marker(consolidated: ConsolidatedModel, folder: Path, dtype: str, comparison: Comparison) -> dict[str, Any]:
    """Where the export comes from, what was verified, and the files that are ours to replace."""
    return {
        "format_version": 1,
        "kind": KIND,
        "source": str(consolidated.folder),
        "dtype": dtype,
        **{key: consolidated.facts[key] for key in ("model", "ranks", "growth", "train", "tokenizer")},
        "verified": {
            "largest_logit_difference": comparison.difference,
            "logit_scale": comparison.scale,
            "relative_difference": comparison.relative_difference,
            "tolerance": comparison.tolerance,
            "sequences": comparison.sequences,
            "tokens": comparison.tokens,
            "same_greedy_tokens": comparison.same_greedy_tokens,
        },
        "files": sorted([FACTS_NAME, *(path.name for path in folder.iterdir())]),
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
            f"their scale ({comparison.tolerance:g} allowed)",
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
