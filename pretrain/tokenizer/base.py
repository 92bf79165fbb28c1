"""The tokenizer of a run: what every kind of it can do.

Two kinds: a sentencepiece model of `tools/train_tokenizer.py` (`pretrain/tokenizer/sentencepiece.py`), whose text comes
back exactly, and a Hugging Face `tokenizer.json` (`pretrain/tokenizer/huggingface.py`), such as published models have.
A checkpoint, a consolidated folder and an export keep the tokenizer's files under the names of `Tokenizer.files`.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

MODEL_NAME = "tokenizer.model"
"""Name of a sentencepiece model's file."""
JSON_NAME = "tokenizer.json"
"""Name of a Hugging Face tokenizer's file."""
SETTINGS_NAME = "tokenizer_config.json"
"""Name of the file that names the special tokens of a Hugging Face tokenizer."""
FILE_NAMES = (MODEL_NAME, JSON_NAME, SETTINGS_NAME)


class Tokenizer(ABC):
    """Text to ids and back; also what megatron-core's datasets ask of a tokenizer (`eod`, `vocab_size`, ...)."""

    path: Path
    """File that holds the vocabulary."""
    fingerprint: str
    """Checksum of everything that decides about ids."""
    vocabulary: int
    end_of_document: int
    mask: int | None
    """Id of the mask token; None in a tokenizer without one."""

    @property
    @abstractmethod
    def kind(self) -> str:
        """Name of this kind of tokenizer, for reports."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of `text`; no special tokens, not even where the text spells one."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; control tokens decode to nothing."""

    @abstractmethod
    def ordinary_tokens(self) -> np.ndarray:
        """Which ids stand for text, bool (vocabulary,): all but control tokens and the unknown token."""

    @abstractmethod
    def byte_lengths(self) -> np.ndarray:
        """UTF-8 bytes each token stands for, int64 (vocabulary,); 0 for control tokens."""

    @abstractmethod
    def files(self) -> dict[str, Path]:
        """The files that are needed to open it again, by their names in `FILE_NAMES`."""

    @abstractmethod
    def export(self, folder: Path, sequence_length: int) -> None:
        """Writes the files that `AutoTokenizer.from_pretrained(folder)` and `open_tokenizer` read; `sequence_length`
        becomes `model_max_length`."""

    @abstractmethod
    def comes_back(self, text: str, ids: Sequence[int]) -> bool:
        """Whether the `ids` of `text` decode to it."""

    @property
    def vocab_size(self) -> int:
        """megatron-core's name for `vocabulary`."""
        return self.vocabulary

    @property
    def eod(self) -> int:
        """megatron-core's name for `end_of_document`."""
        return self.end_of_document

    @cached_property
    def unique_identifiers(self) -> dict[str, str]:
        """Identifies this tokenizer in megatron-core's description of a dataset."""
        return {"class": type(self).__name__, "fingerprint": self.fingerprint}


def main_file(names: Collection[str]) -> str | None:
    """The file to open among the `names` in a folder; None if there is no tokenizer.

    Our own exports hold a sentencepiece model and, for other libraries, its JSON form: the model decides. Folders of
    published models may hold both, too: there, the user names the file.
    """
    return next((name for name in (MODEL_NAME, JSON_NAME) if name in names), None)
