"""A small tokenizer and corpus out of the standard library, for tests of whatever reads them."""

from dataclasses import dataclass
from pathlib import Path

from pretrain.config.data import DataConfig
from pretrain.data.index_check import CorpusFacts
from pretrain.tokenizer.base import Tokenizer
from tools.corpus.documents import find_files, read_documents
from tools.preprocess_corpus import preprocess
from tools.train_tokenizer import train_tokenizer, write_tokenizer


@dataclass(frozen=True)
class SmallCorpus:
    """Files of a corpus and what went into them."""

    prefix: Path
    tokenizer: Tokenizer
    facts: CorpusFacts
    texts: list[str]

    @property
    def data(self) -> DataConfig:
        return DataConfig(prefix=str(self.prefix), tokenizer=str(self.tokenizer.path), split="80,20,0")


def small_tokenizer(path: Path, vocabulary: int = 600) -> Tokenizer:
    """A BPE tokenizer of about thirty files."""
    return write_tokenizer(train_tokenizer(find_files(["stdlib"])[::25], vocabulary=vocabulary), path)


def small_corpus(folder: Path) -> SmallCorpus:
    """About sixty files, each a document."""
    tokenizer = small_tokenizer(folder / "tokenizer.model")
    files = find_files(["stdlib"])[::12]
    facts = preprocess(files, folder / "corpus", tokenizer.path)
    texts = [document.text for document in read_documents(files, ["text"]) if document.text]
    return SmallCorpus(folder / "corpus", tokenizer, facts, texts)
