"""Continues a prompt with a dense export, through transformers' own `generate`.

    python tools/generate.py --model dense/ --prompt "def main():" --max-new-tokens 100
    python tools/generate.py --model dense/ --prompt "def main():" --greedy

Works offline and runs no code from the model's folder. An empty prompt starts a new document.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging

from pretrain.consolidated import FACTS_NAME, ConsolidatedModel
from pretrain.errors import CheckpointError, ConfigError, run_command
from pretrain.huggingface_import import huggingface_settings


def main() -> None:
    arguments = _parse_arguments()
    _check_export(arguments.model)
    logging.disable_progress_bar()
    torch.manual_seed(arguments.seed)
    # Files that transformers cannot use, for whatever reason, are the user's to mend; it says what is wrong with them.
    try:
        tokenizer = AutoTokenizer.from_pretrained(arguments.model, local_files_only=True, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            arguments.model, local_files_only=True, trust_remote_code=False, use_safetensors=True
        )
    except Exception as error:
        raise CheckpointError(f"{arguments.model} cannot be loaded, export it again: {_first_line(error)}") from error
    # The command line decides, and not a file beside the weights, which could ask for a billion beams.
    end = model.config.eos_token_id
    model.generation_config = GenerationConfig(bos_token_id=end, eos_token_id=end, pad_token_id=end)
    print(continue_text(model.eval(), tokenizer, arguments))


@torch.no_grad()
def continue_text(model: Any, tokenizer: Any, arguments: argparse.Namespace) -> str:
    """The prompt and what the model makes of it, up to the end of the document."""
    if torch.cuda.is_available():
        model = model.to("cuda")
    prompt = tokenizer(arguments.prompt, add_special_tokens=False)["input_ids"] or [model.config.eos_token_id]
    longest = model.config.max_position_embeddings
    if len(prompt) + arguments.max_new_tokens > longest:
        raise ConfigError(
            f"the prompt has {len(prompt)} tokens, with --max-new-tokens {arguments.max_new_tokens} that exceeds the "
            f"{longest} positions of the model: shorten the prompt or lower --max-new-tokens"
        )
    tokens = torch.tensor([prompt], device=model.device)
    sampling: dict[str, Any] = {"do_sample": False}
    if not arguments.greedy:
        sampling = {"do_sample": True, "temperature": arguments.temperature, "top_k": arguments.top_k}
    output = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=arguments.max_new_tokens, **sampling
    )
    ending = model.config.eos_token_id
    return tokenizer.decode([token for token in output[0].tolist() if token != ending])


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Continues a prompt with a dense export.")
    parser.add_argument(
        "--model", type=Path, required=True, help="folder written by tools/densify_checkpoint.py", metavar="DIR"
    )
    parser.add_argument("--prompt", required=True, help="text to continue; may be empty")
    parser.add_argument("--max-new-tokens", type=int, default=100, help="longest continuation (100)", metavar="N")
    parser.add_argument("--temperature", type=float, default=1.0, help="below 1: more predictable (1.0)", metavar="T")
    parser.add_argument("--top-k", type=int, default=0, help="sample among the K likeliest tokens; 0: all", metavar="K")
    parser.add_argument("--seed", type=int, default=1234, help="the same seed gives the same text (1234)", metavar="S")
    parser.add_argument("--greedy", action="store_true", help="always take the likeliest token")
    arguments = parser.parse_args()
    for flag, allowed in (("max_new_tokens", 1), ("top_k", 0)):
        if getattr(arguments, flag) < allowed:
            raise ConfigError(f"--{flag.replace('_', '-')} {getattr(arguments, flag)} is below {allowed}")
    if not 0.0 < arguments.temperature < float("inf"):
        raise ConfigError(f"--temperature {arguments.temperature} is not above 0: pass --greedy for the likeliest one")
    return arguments


def _check_export(folder: Path) -> None:
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder: pass the --output of tools/densify_checkpoint.py as --model")
    if not (folder / "config.json").is_file():
        if (folder / FACTS_NAME).is_file():
            ConsolidatedModel(folder).check_causal()
        raise CheckpointError(
            f"{folder} is no dense export, it has no config.json: make one with tools/densify_checkpoint.py"
        )
    huggingface_settings(folder)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


if __name__ == "__main__":
    run_command(main)
