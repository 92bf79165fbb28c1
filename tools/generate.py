"""Continues a prompt with a consolidated folder or a dense export, through transformers' own `generate`.

    python tools/generate.py --model runs/quickstart/consolidated --prompt "def main():" --max-new-tokens 100
    python tools/generate.py --model runs/quickstart/export --prompt "def main():" --greedy
    python tools/generate.py --model runs/quickstart/consolidated      (asks for prompts, until Ctrl-D)

Works offline and runs no code from the model's folder. An empty prompt starts a new document. Ctrl-C stops an answer.
"""

import argparse
import sys
from pathlib import Path

import torch
from transformers.utils import logging

from pretrain.errors import ConfigError, run_command
from tools.text_model import Sampling, TextModel, open_text_model


def main() -> None:
    arguments = _parse_arguments()
    if arguments.prompt is None and not sys.stdin.isatty():
        raise ConfigError("there is no --prompt, and no terminal to ask for one: pass --prompt")
    logging.disable_progress_bar()
    model = open_text_model(arguments.model)
    torch.manual_seed(arguments.seed)
    sampling = Sampling(arguments.max_new_tokens, arguments.greedy, arguments.temperature, arguments.top_k)
    if arguments.prompt is None:
        _converse(model, sampling)
        return
    pieces = [arguments.prompt]
    model.continue_text(arguments.prompt, sampling, pieces.append)
    print("".join(pieces))


def _converse(model: TextModel, sampling: Sampling) -> None:
    """One prompt after the other, each a text of its own."""
    print("Ctrl-C stops an answer, Ctrl-D ends.")
    while True:
        try:
            prompt = input("> ")
            model.continue_text(prompt, sampling, lambda text: print(text, end="", flush=True))
            print()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
        except ConfigError as error:
            print(f"error: {error}")


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Continues a prompt.")
    parser.add_argument("--model", type=Path, required=True, help="consolidated folder or dense export", metavar="DIR")
    parser.add_argument("--prompt", help="text to continue; may be empty (left out: asked for, again and again)")
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


if __name__ == "__main__":
    run_command(main)
