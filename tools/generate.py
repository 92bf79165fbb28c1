"""Continues a prompt with a consolidated folder or a dense export, through transformers' own `generate`.

    python tools/generate.py --model runs/quickstart/consolidated --prompt "def main():" --max-new-tokens 100
    python tools/generate.py --model runs/quickstart/export --prompt "def main():" --greedy
    python tools/generate.py --model runs/quickstart/consolidated      (asks for prompts, until Ctrl-D)

Works offline and runs no code from the model's folder. An empty prompt starts a new document. Ctrl-C stops an answer.
The factors of a consolidated folder are multiplied out in memory: both become transformers' own model, with its cache
of keys and values.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

from model.huggingface.config import huggingface_config
from model.huggingface.tensors import huggingface_tensors
from pretrain.convert.consolidated import FACTS_NAME, ConsolidatedModel
from pretrain.convert.huggingface_import import huggingface_settings
from pretrain.convert.source import dense_source
from pretrain.errors import CheckpointError, ConfigError, run_command


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    max_new_tokens: int
    greedy: bool
    temperature: float
    top_k: int
    """0: all tokens."""

    def settings(self) -> dict[str, Any]:
        """For transformers' `generate`."""
        if self.greedy:
            return {"do_sample": False}
        return {"do_sample": True, "temperature": self.temperature, "top_k": self.top_k}


class TextModel:
    """Continues texts, on the GPU where there is one."""

    def __init__(self, model: Any, encode: Callable[[str], list[int]], decode: Callable[[Sequence[int]], str]) -> None:
        self._end = model.config.eos_token_id
        # The command line decides, and not a file beside the weights, which could ask for a billion beams.
        model.generation_config = GenerationConfig(
            bos_token_id=self._end, eos_token_id=self._end, pad_token_id=self._end
        )
        self._model = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
        self._encode, self._decode = encode, decode

    @torch.no_grad()
    def continue_text(self, prompt: str, sampling: Sampling, say: Callable[[str], object]) -> None:
        """Says what the model makes of the prompt, piece by piece, up to the end of the document.

        An empty prompt starts a new document.
        """
        ids = self._encode(prompt) or [self._end]
        longest = self._model.config.max_position_embeddings
        if len(ids) + sampling.max_new_tokens > longest:
            raise ConfigError(
                f"the prompt has {len(ids)} tokens, with --max-new-tokens {sampling.max_new_tokens} that exceeds the "
                f"{longest} positions of the model: shorten the prompt or lower --max-new-tokens"
            )
        tokens = torch.tensor([ids], device=self._model.device)
        self._model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=sampling.max_new_tokens,
            streamer=_Stream(self._end, self._decode, say),
            **sampling.settings(),
        )


class _Stream(BaseStreamer):
    """Says text as soon as it is whole: a character may take several tokens."""

    def __init__(self, end: int, decode: Callable[[Sequence[int]], str], say: Callable[[str], object]) -> None:
        self._end, self._decode, self._say = end, decode, say
        self._is_prompt, self._said = True, 0
        self._tokens: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        if self._is_prompt:
            self._is_prompt = False
            return
        self._tokens += [token for token in value.flatten().tolist() if token != self._end]
        text = self._decode(self._tokens)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self._tell(text)

    def end(self) -> None:
        self._tell(self._decode(self._tokens))

    def _tell(self, text: str) -> None:
        self._say(text[self._said :])
        self._said = len(text)


def open_text_model(folder: Path) -> TextModel:
    """The model in a dense export or a consolidated folder; CheckpointError where there is none."""
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is no folder: pass the --output of tools/consolidate_checkpoint.py or "
            "tools/densify_checkpoint.py as --model"
        )
    if (folder / "config.json").is_file():
        return _open_export(folder)
    if (folder / FACTS_NAME).is_file():
        return _open_consolidated(folder)
    raise CheckpointError(
        f"{folder} is neither a consolidated folder ({FACTS_NAME}) nor a dense export (config.json): make one with "
        "tools/consolidate_checkpoint.py or tools/densify_checkpoint.py"
    )


def _open_export(folder: Path) -> TextModel:
    huggingface_settings(folder)
    # Files that transformers cannot use, for whatever reason, are the user's to mend; it says what is wrong with them.
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, use_safetensors=True
        )
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise CheckpointError(f"{folder} cannot be loaded, export it again: {reason}") from error
    return TextModel(model, lambda text: tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.decode)


def _open_consolidated(folder: Path) -> TextModel:
    consolidated = ConsolidatedModel(folder)
    consolidated.check_causal()
    source = dense_source(consolidated)
    tokenizer = source.tokenizer
    model = AutoModelForCausalLM.from_config(
        huggingface_config(source.config, end_of_document=tokenizer.end_of_document)
    )
    found = model.load_state_dict(dict(huggingface_tensors(source.config, {}, source.read)), strict=False)
    model.tie_weights()
    tied = {"lm_head.weight"} if source.config.tied_embeddings else set()
    if set(found.missing_keys) - tied or found.unexpected_keys:
        raise CheckpointError(f"transformers has other weights than {folder}: {found}")
    return TextModel(model, tokenizer.encode, tokenizer.decode)


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
