"""WikiText from its published archive, or its text files, to corpora that a run can name: one command.

    python tools/wikitext.py --input wikitext-103-raw-v1.zip --output corpora/wikitext103 --workers 8
    python tools/wikitext.py --input wikitext-103-raw-v1.zip --output corpora/wikitext103 --tokenizer-model gpt2/

The archive holds `wiki.train.raw`, `wiki.valid.raw` and `wiki.test.raw` (or `.tokens`), each one long text of articles.
An article becomes a document:

    corpora/wikitext103_text/{train,validation,test}.jsonl.zst     the articles
    corpora/wikitext103.model                                      a tokenizer trained on the first, unless one is given
    corpora/wikitext103_{train,validation,test}.{bin,idx,json}     the corpora

An interrupted run goes on where it was (tools/preprocess_corpus.py). Text is taken as it is, with the spaces around
punctuation that the archive has.
"""

import argparse
import io
import json
import os
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TypeVar

import zstandard

from pretrain.data.index_check import CorpusFacts, files_of
from pretrain.disk import new_file
from pretrain.errors import DataError, run_command
from tools.arguments import positive
from tools.preprocess_corpus import preprocess
from tools.train_tokenizer import train_tokenizer, write_tokenizer

SHARES = {"train": "train", "validation": "valid", "test": "test"}
"""Our names, and the archive's."""
_TITLE = re.compile(r" = [^=\s].* = \n")
_LARGEST_BYTES = 1 << 33

Found = TypeVar("Found")


def main() -> None:
    arguments = _arguments()
    texts = write_articles(arguments.input, arguments.output.with_name(f"{arguments.output.name}_text"))
    tokenizer: Path | None = arguments.tokenizer_model
    if tokenizer is None:
        tokenizer = arguments.output.with_name(f"{arguments.output.name}.model")
        if not tokenizer.exists():
            print(f"training a tokenizer of {arguments.vocabulary} tokens on {texts['train']}", flush=True)
            write_tokenizer(train_tokenizer([texts["train"]], vocabulary=arguments.vocabulary), tokenizer)
    prefixes = {share: arguments.output.with_name(f"{arguments.output.name}_{share}") for share in SHARES}
    for share, text in texts.items():
        if files_of(prefixes[share])[2].exists() and not arguments.overwrite:
            print(f"{prefixes[share]} is there already: add --overwrite to write it anew")
            continue
        facts = preprocess([text], prefixes[share], tokenizer, workers=arguments.workers, overwrite=arguments.overwrite)
        print(_described(prefixes[share], facts))
    print(
        f"deepspeed pretrain/train.py --config gpt2_small data.prefix={prefixes['train']} data.tokenizer={tokenizer} "
        f"'data.validation={{wikitext: {prefixes['validation']}}}'"
    )


def write_articles(source: Path, folder: Path) -> dict[str, Path]:
    """The articles of each share as JSON lines, with the date of the source, by which a later run knows them again."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        targets = {}
        for share, name in SHARES.items():
            targets[share] = folder / f"{share}.jsonl.zst"
            with _opened(source, name) as lines, new_file(targets[share]) as staging:
                with staging.open("xb") as stored, zstandard.ZstdCompressor().stream_writer(stored) as packed:
                    for article in articles(lines):
                        packed.write(json.dumps({"text": article}, ensure_ascii=False).encode() + b"\n")
                os.utime(staging, ns=(source.stat().st_mtime_ns,) * 2)
    except OSError as error:
        raise DataError(f"{folder} cannot be written ({error.strerror}): free space or change --output") from error
    return targets


def articles(lines: IO[str]) -> Iterator[str]:
    """The texts from one title to the next. A title stands between empty lines: formulas look like titles, too."""
    article: list[str] = []
    before, title = "\n", ""
    for line in lines:
        if title and not line.strip():
            if "".join(article).strip():
                yield "".join(article)
            article = []
        article += [title, line] if title else [line]
        title = ""
        if _TITLE.fullmatch(line) and not before.strip():
            title = article.pop()
        before = line
    article.append(title)
    if "".join(article).strip():
        yield "".join(article)


@contextmanager
def _opened(source: Path, share: str) -> Iterator[IO[str]]:
    """The text of a share, in an archive or a folder."""
    pattern = re.compile(rf"(.*/)?wiki\.{share}\.(raw|tokens|txt)")
    try:
        if source.is_dir():
            found = [path for path in sorted(source.iterdir()) if pattern.fullmatch(path.name)]
            with _only(found, source, share).open(encoding="utf-8", newline="\n") as text:
                yield text
            return
        with zipfile.ZipFile(source) as archive:
            member = _only([info for info in archive.infolist() if pattern.fullmatch(info.filename)], source, share)
            if member.file_size > _LARGEST_BYTES:
                raise DataError(f"{source} says that {member.filename} has {member.file_size:,} bytes: get it anew")
            with archive.open(member) as packed, io.TextIOWrapper(packed, encoding="utf-8", newline="\n") as text:
                yield text
    except FileNotFoundError as error:
        raise DataError(f"{source} does not exist: change --input") from error
    except (zipfile.BadZipFile, UnicodeDecodeError) as error:
        raise DataError(
            f"{source} cannot be read ({error}): give the archive as it was published as --input"
        ) from error


def _only(found: list[Found], source: Path, share: str) -> Found:
    if len(found) != 1:
        raise DataError(
            f"{source} holds {len(found)} files wiki.{share}.raw (or .tokens, .txt), and should hold one: give the "
            "published archive, or a folder with its files, as --input"
        )
    return found[0]


def _described(prefix: Path, facts: CorpusFacts) -> str:
    return (
        f"{prefix}: {facts.documents:,} articles, {facts.tokens:,} tokens, {facts.text_bytes:,} bytes, "
        f"{facts.round_trip_exceptions} that do not decode to themselves"
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="WikiText as corpora.")
    parser.add_argument("--input", type=Path, required=True, help="the archive, or a folder with its files")
    parser.add_argument("--output", type=Path, required=True, help="beginning of all names", metavar="PREFIX")
    parser.add_argument("--tokenizer-model", type=Path, help="a tokenizer (one is trained)", metavar="PATH")
    parser.add_argument("--vocabulary", type=positive, default=32_000, help="of the trained tokenizer (32000)")
    parser.add_argument("--workers", type=positive, default=1, help="processes that tokenize (1)")
    parser.add_argument("--overwrite", action="store_true", help="write corpora anew that are there")
    return parser.parse_args()


if __name__ == "__main__":
    run_command(main)
