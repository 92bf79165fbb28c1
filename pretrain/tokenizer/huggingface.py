"""A Hugging Face `tokenizer.json` as tokenizer, such as GPT-2, Llama 3 or Qwen publish it.

Two families are supported, since only for them is it known which bytes a token stands for: byte-level (GPT-2, Llama 3)
and sentencepiece-like (Llama 2, Mistral, Gemma; U+2581 for a space). Unlike the sentencepiece models of
`tools/train_tokenizer.py`, such a tokenizer may change text (by normalizing it, or by adding a space in front).
`tools/preprocess_corpus.py` counts the documents that do not come back as they were.

The end of a document is the `eos_token` of the `tokenizer_config.json` beside it, or else the only special token that
there is. Special tokens are only ever added by id: where text spells one, it is split like other text.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer as TokenizerFile

from pretrain.errors import DataError
from pretrain.tokenizer.base import JSON_NAME, SETTINGS_NAME, Tokenizer
from pretrain.tokenizer.sentencepiece import SPACE

_BYTE_TOKENS = {f"<0x{byte:02X}>" for byte in range(256)}
_LARGEST_BYTES = 1 << 28


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer.json, with the tokenizer_config.json beside it if there is one."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._settings_path = self.path.with_name(SETTINGS_NAME)
        content = _read(self.path)
        self._settings: dict[str, Any] = _settings(self._settings_path) if self._settings_path.is_file() else {}
        # The Rust library raises errors for most wrong files, and panics over some.
        try:
            self._tokenizer = TokenizerFile.from_str(content.decode("utf-8"))
        except BaseException as error:
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise DataError(
                f"{self.path} is not a Hugging Face tokenizer ({_first_line(error)}): set data.tokenizer "
                f"(--tokenizer-model) to a {JSON_NAME} or to a model of tools/train_tokenizer.py"
            ) from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self._added = self._tokenizer.get_added_tokens_decoder()
        self._tokens = {token: text for text, token in self._tokenizer.get_vocab(with_added_tokens=True).items()}
        if not self._tokens:
            raise DataError(f"{self.path} has no tokens: set data.tokenizer to another one")
        self._byte_level = self._is_byte_level(json.loads(content))
        # Ids may have gaps.
        self.vocabulary = max(self._tokens) + 1
        self.end_of_document = self._end_of_document()
        self.mask = self._special("mask_token")
        end = self._tokens[self.end_of_document]
        self.fingerprint = hashlib.sha256(content + b"\0" + end.encode()).hexdigest()

    @property
    def kind(self) -> str:
        return "byte-level" if self._byte_level else "sentencepiece-like"

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode([int(token) for token in ids], skip_special_tokens=True)
        return text

    def comes_back(self, text: str, ids: Sequence[int]) -> bool:
        return self.decode(ids) == text

    def ordinary_tokens(self) -> np.ndarray:
        ordinary = np.zeros(self.vocabulary, dtype=bool)
        unknown = getattr(self._tokenizer.model, "unk_token", None)
        for token, text in self._tokens.items():
            ordinary[token] = not self._is_special(token) and text != unknown
        return ordinary

    def byte_lengths(self) -> np.ndarray:
        lengths = np.zeros(self.vocabulary, dtype=np.int64)
        for token in np.flatnonzero(self.ordinary_tokens()):
            text = self._tokens[int(token)]
            if token in self._added:
                lengths[token] = len(text.encode())
            elif self._byte_level:
                lengths[token] = len(text)  # one character for each byte
            elif text in _BYTE_TOKENS:
                lengths[token] = 1
            else:
                lengths[token] = len(text.replace(SPACE, " ").encode())
        return lengths

    def files(self) -> dict[str, Path]:
        files = {JSON_NAME: self.path}
        if self._settings_path.is_file():
            files[SETTINGS_NAME] = self._settings_path
        return files

    def export(self, folder: Path, sequence_length: int) -> None:
        shutil.copyfile(self.path, folder / JSON_NAME)
        settings = {
            # Foreign code is never asked for, and the class below takes tokenizer.json as it is.
            **{name: value for name, value in self._settings.items() if name != "auto_map"},
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": self._tokens[self.end_of_document],
            "clean_up_tokenization_spaces": False,
            "model_max_length": sequence_length,
        }
        (folder / SETTINGS_NAME).write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def _is_special(self, token: int) -> bool:
        return token in self._added and bool(self._added[token].special)

    def _is_byte_level(self, content: dict[str, Any]) -> bool:
        kinds = set(_kinds(content.get("pre_tokenizer"))) | set(_kinds(content.get("decoder")))
        if "ByteLevel" in kinds:
            return True
        if kinds & {"Metaspace", "ByteFallback"}:
            return False
        raise DataError(
            f"{self.path} is neither a byte-level tokenizer (as GPT-2's) nor a sentencepiece-like one (as Llama 2's), "
            f"so it is not known which bytes a token stands for (it is made of {', '.join(sorted(kinds)) or 'nothing'}"
            "): set data.tokenizer to one of those"
        )

    def _end_of_document(self) -> int:
        named = self._special("eos_token")
        if named is not None:
            return named
        special = [token for token in sorted(self._added) if self._is_special(token)]
        if len(special) != 1:
            raise DataError(
                f"{self.path} has {len(special)} special tokens, and no eos_token in {SETTINGS_NAME} beside it says "
                f'which one ends a document: name it there, as in {{"eos_token": "</s>"}}'
            )
        return special[0]

    def _special(self, name: str) -> int | None:
        """Id of a token that the settings name; DataError if that is no special token of the vocabulary."""
        named = self._settings.get(name)
        text = named.get("content") if isinstance(named, dict) else named
        if text is None:
            return None
        token = self._tokenizer.token_to_id(text) if isinstance(text, str) else None
        if token is None or not self._is_special(token):
            raise DataError(
                f"{self._settings_path} names {text!r} as {name}, and that is no special token of {self.path.name}: "
                "give the two files of one tokenizer"
            )
        return token


def _read(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size > _LARGEST_BYTES:
            raise DataError(f"{path} has {size:,} bytes, which no tokenizer has: set data.tokenizer to another file")
        return path.read_bytes()
    except OSError as error:
        raise DataError(
            f"cannot read the tokenizer {path} ({error.strerror}): set data.tokenizer (--tokenizer-model) to a "
            f"{JSON_NAME} or to a model of tools/train_tokenizer.py"
        ) from error


def _settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON ({error}): mend it, or take it away") from error
    if not isinstance(settings, dict):
        raise DataError(f"{path} is no JSON object but {type(settings).__name__}: mend it, or take it away")
    return settings


def _kinds(part: Any) -> Iterator[str]:
    """Types of the parts of a pre-tokenizer or decoder."""
    if isinstance(part, dict):
        yield str(part.get("type"))
        for inner in (part.get("pretokenizers") or []) + (part.get("decoders") or []):
            yield from _kinds(inner)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
