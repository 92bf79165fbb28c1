"""Opens a tokenizer of whatever kind."""

from pathlib import Path

from pretrain.errors import DataError
from pretrain.tokenizer.base import JSON_NAME, MODEL_NAME, Tokenizer, main_file
from pretrain.tokenizer.huggingface import HuggingFaceTokenizer
from pretrain.tokenizer.sentencepiece import SentencePieceTokenizer


def open_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in a sentencepiece model file, a tokenizer.json, or a folder that holds one of them; DataError if
    there is none, or if it cannot be used."""
    path = Path(path)
    if path.is_dir():
        name = main_file({file.name for file in path.iterdir()})
        if name is None:
            raise DataError(f"{path} holds neither {MODEL_NAME} nor {JSON_NAME}: set data.tokenizer to a tokenizer")
        path = path / name
    return HuggingFaceTokenizer(path) if path.suffix == ".json" else SentencePieceTokenizer(path)
