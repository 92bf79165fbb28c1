"""The text of a race: whole books held out, a tokenizer trained on the rest, and one corpus of both.

Held-out documents come last in the corpus, so that a split by numbers of documents separates them.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pretrain.disk import replace_text
from pretrain.errors import DataError
from tools.corpus.documents import find_files, read_documents
from tools.experiments.race_plan import TextConfig
from tools.preprocess_corpus import preprocess
from tools.train_tokenizer import train_tokenizer, write_tokenizer

KEYS = ("source", "text")


@dataclass(frozen=True)
class Text:
    """Files that the runs read."""

    prefix: Path
    tokenizer: Path
    split: str
    """`data.split`: numbers of training and held-out documents."""

    @property
    def settings(self) -> dict[str, str]:
        """The data section of a run."""
        return {"prefix": str(self.prefix), "tokenizer": str(self.tokenizer), "split": self.split}


def prepare_text(config: TextConfig, inputs: Sequence[str], work: Path) -> Text:
    """The text of the race in `work`; what is there already is used again."""
    prefix, tokenizer = work / "corpus", work / "tokenizer.model"
    training, held_out = work / "text" / "train.jsonl", work / "text" / "held_out.jsonl"
    if not training.is_file() or not held_out.is_file():
        if not inputs:
            raise DataError(f"{work} holds no text yet: name the files with --text, or in the config with text.files")
        if absent := [name for name in inputs if not Path(name).exists()]:
            raise DataError(
                f"the text of the race is not in {absent[0]}: say where it is with --text, or with text.files"
            )
        split_text(config, inputs, training, held_out)
    if not tokenizer.is_file():
        write_tokenizer(train_tokenizer([training], vocabulary=config.vocabulary), tokenizer)
    if not prefix.with_suffix(".json").is_file():
        preprocess([training, held_out], prefix, tokenizer, overwrite=True)
    counts = [sum(1 for _ in path.open("rb")) for path in (training, held_out)]
    return Text(prefix, tokenizer, f"{counts[0]},{counts[1]},0")


def split_text(config: TextConfig, inputs: Sequence[str], training: Path, held_out: Path) -> None:
    """Writes the documents of the input files as two files of one JSON object a line, in their order."""
    lines: dict[Path, list[str]] = {training: [], held_out: []}
    texts = (document.text for document in read_documents(find_files(inputs), KEYS))
    for source in texts:
        document = {"source": source, "text": next(texts)}
        target = held_out if source.startswith(config.held_out) else training
        lines[target].append(json.dumps(document) + "\n")
    for start in config.held_out:
        if not any(json.loads(line)["source"].startswith(start) for line in lines[held_out]):
            raise DataError(f"--text has no document whose source begins with {start}: change text.held_out")
    if not lines[training]:
        raise DataError("--text holds nothing to train on: all documents are held out by text.held_out")
    training.parent.mkdir(parents=True, exist_ok=True)
    for path, content in lines.items():
        replace_text(path, "".join(content))
