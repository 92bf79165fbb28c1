"""Small Hugging Face tokenizers of the kinds that published models have, trained on some modules of Python."""

import ast
import bisect
import heapq
import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

END = "<|endoftext|>"


def texts() -> list[str]:
    return [Path(str(module.__file__)).read_text(encoding="utf-8") for module in (ast, bisect, heapq)]


def byte_level(folder: Path, settings: dict[str, Any] | None = None, others: tuple[str, ...] = ()) -> Path:
    """Tokenizer like GPT-2's and Llama 3's: byte-level BPE with an end of text, and special tokens `others`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=[END, *others], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(texts(), trainer)
    return save(tokenizer, folder, settings)


def sentencepiece_like(folder: Path) -> Path:
    """A tokenizer as Llama 2's: a space in front of every text, U+2581 for spaces, bytes for what has no token."""
    pieces = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", "<s>", "</s>"])
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.train_from_iterator(texts(), trainer)
    learned = json.loads(tokenizer.to_str())["model"]
    for piece in sorted(learned["vocab"], key=learned["vocab"].get):
        pieces.setdefault(piece, len(pieces))
    merges = [tuple(merge) for merge in learned["merges"]]
    tokenizer.model = models.BPE(vocab=pieces, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in ("<unk>", "<s>", "</s>")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return save(tokenizer, folder, {"eos_token": {"content": "</s>"}, "bos_token": "<s>"})


def save(tokenizer: Tokenizer, folder: Path, settings: dict[str, Any] | None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    if settings is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder / "tokenizer.json"
