"""Measures the data pipeline: what share of a training step the loader takes, and how fast text becomes tokens.

    python tools/benchmarks/data.py --json data.json
    python tools/benchmarks/data.py --input books.jsonl.zst --tokenizer-model my.model --hidden 1024 --heads 16
    python tools/benchmarks/data.py --input notes/ --vocabulary 600 --layers 1 --hidden 32 --heads 2 --repeats 2

Tokenization, on one core and the same text, in turn: sentencepiece alone (whole documents), `Tokenizer.encode`, and
all of `tools/preprocess_corpus.py` (reading, tokenizing, writing, checking). The loader: `batch_at` on the corpus that
came of it, against whole training steps of a factored model on as many tokens (batch 4, rank hidden/4). Its cost a
token does not depend on the model, so a small model is the hard case.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import sentencepiece
import torch

from model.process_groups import initialize_process_groups
from pretrain.config.data import DataConfig
from pretrain.config.run import RunConfig
from pretrain.data.corpus import batch_at, open_corpus
from pretrain.disk import json_text, replace_text
from pretrain.distributed import joined_processes
from pretrain.errors import run_command
from pretrain.tokenizer.base import Tokenizer
from pretrain.tokenizer.load import open_tokenizer
from tools.arguments import output_file, positive
from tools.benchmarks.step_contestants import FACTORED, build_contestant, contestant_config
from tools.benchmarks.step_report import machine, machine_lines, spread, synchronize
from tools.corpus.documents import find_files, read_documents
from tools.preprocess_corpus import preprocess
from tools.train_tokenizer import train_tokenizer, write_tokenizer

LOADER_TARGET = 0.01
TOKENS_PER_SECOND_TARGET, SENTENCEPIECE_TARGET = 1e6, 0.9
TOKENIZER_CHUNKS = 20_000
"""Enough for a tokenizer that is only timed."""
SENTENCEPIECE, ENCODE, PREPROCESS = "sentencepiece alone", "Tokenizer.encode", "preprocess_corpus"
LOADER, STEP = "loader", "training step"


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    files = find_files(arguments.input)
    with tempfile.TemporaryDirectory() as work, joined_processes():
        initialize_process_groups(1)
        tokenizer = _tokenizer(arguments, files, Path(work))
        rows = tokenization_rows(files, tokenizer, Path(work), arguments.repeats)
        rows += loader_rows(_config(arguments, Path(work), tokenizer), Path(work), arguments.repeats)
    facts = {
        "benchmark": "data",
        "settings": {key: value for key, value in vars(arguments).items() if key != "json"},
        "tokenizer": tokenizer.kind,
        **machine(),
        "rows": rows,
    }
    print("\n".join([*table(rows), "", *verdicts(rows), "", *machine_lines(facts)]))
    if arguments.json is not None:
        replace_text(arguments.json, json_text(facts | {"settings": _plain(facts["settings"])}, indent=2) + "\n")


def tokenization_rows(files: Sequence[Path], tokenizer: Tokenizer, work: Path, repeats: int) -> list[dict[str, Any]]:
    """Tokens per second of one core, three ways."""
    texts = [document.text for document in read_documents(files, ["text"]) if document.text]
    alone = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.path))

    def sentencepiece_alone() -> int:
        return sum(map(len, alone.encode(texts, num_threads=1)))

    def encode() -> int:
        return sum(len(tokenizer.encode(text)) for text in texts)

    def whole_tool() -> int:
        return preprocess(files, work / "corpus", tokenizer.path, append_eod=False, overwrite=True).tokens

    return _timed({SENTENCEPIECE: sentencepiece_alone, ENCODE: encode, PREPROCESS: whole_tool}, repeats)


def loader_rows(config: RunConfig, work: Path, repeats: int) -> list[dict[str, Any]]:
    """Seconds of a batch and of a training step on as many tokens."""
    micro_batch = config.train.micro_batch
    samples = micro_batch * (repeats + 1)
    corpus = open_corpus(
        config.data, config.model, training_samples=samples, validation_samples=0, seed=1, cache=work / "cache"
    )
    contestant = build_contestant(FACTORED, config)
    batches = iter(range(0, samples, micro_batch))

    def load() -> int:
        return batch_at(corpus.train, next(batches), micro_batch)["tokens"].numel()

    def step() -> int:
        contestant.step()
        synchronize()
        return contestant.tokens

    return _timed({LOADER: load, STEP: step}, repeats)


def _timed(actions: Mapping[str, Callable[[], int]], repeats: int) -> list[dict[str, Any]]:
    """A row for each action, which gives its number of tokens; taken in turn, the first time for warming up."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    tokens: dict[str, int] = {}
    for repeat in range(repeats + 1):
        for name, action in actions.items():
            start = time.perf_counter()
            tokens[name] = action()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    rows = []
    for name, samples in seconds.items():
        found = spread(samples)
        rate = tokens[name] / found["median_seconds"]
        rows.append({"name": name, "tokens": tokens[name], **found, "tokens_per_second": rate})
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Markdown."""
    yield "| | tokens | seconds, median (quartiles) | tokens/s |"
    yield "|---|---|---|---|"
    for row in rows:
        quartiles = f"{row['first_quartile_seconds']:.6f}–{row['third_quartile_seconds']:.6f}"
        yield (
            f"| {row['name']} | {row['tokens']:,} | {row['median_seconds']:.6f} ({quartiles}) "
            f"| {row['tokens_per_second']:,.0f} |"
        )


def verdicts(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What the targets say."""
    by_name = {row["name"]: row for row in rows}
    share = by_name[LOADER]["median_seconds"] / by_name[STEP]["median_seconds"]
    yield f"loader: {share:.3%} of a training step, target ≤ {LOADER_TARGET:.0%}, {_word(share <= LOADER_TARGET)}"
    rate = by_name[PREPROCESS]["tokens_per_second"]
    against = rate / by_name[SENTENCEPIECE]["tokens_per_second"]
    met = rate >= TOKENS_PER_SECOND_TARGET or against >= SENTENCEPIECE_TARGET
    yield (
        f"tokenization: {rate:,.0f} tokens/s on one core, {against:.0%} of sentencepiece alone, target ≥ "
        f"{TOKENS_PER_SECOND_TARGET:,.0f} or ≥ {SENTENCEPIECE_TARGET:.0%}, {_word(met)}"
    )


def _word(met: bool) -> str:
    return "met" if met else "missed"


def _tokenizer(arguments: argparse.Namespace, files: Sequence[Path], work: Path) -> Tokenizer:
    if arguments.tokenizer_model is not None:
        return open_tokenizer(arguments.tokenizer_model)
    model = train_tokenizer(files, vocabulary=arguments.vocabulary, sample_chunks=TOKENIZER_CHUNKS)
    return write_tokenizer(model, work / "tokenizer.model")


def _config(arguments: argparse.Namespace, work: Path, tokenizer: Tokenizer) -> RunConfig:
    model = {
        "family": "gpt2",
        "layers": arguments.layers,
        "hidden": arguments.hidden,
        "heads": arguments.heads,
        "sequence_length": arguments.sequence,
        "vocabulary": tokenizer.vocabulary,
    }
    config = contestant_config(FACTORED, model, max(1, arguments.hidden // 4), arguments.micro_batch)
    data = DataConfig(prefix=str(work / "corpus"), tokenizer=str(tokenizer.path))
    return config.model_copy(update={"data": data})


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: str(value) if isinstance(value, Path) else value for key, value in settings.items()}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time the loader and the tokenizer.")
    parser.add_argument("--input", nargs="+", default=["stdlib"], help="text (as tools/preprocess_corpus.py; stdlib)")
    parser.add_argument("--tokenizer-model", type=Path, metavar="FILE", help="tokenizer; none: trained on the text")
    parser.add_argument("--vocabulary", type=positive, default=8192, help="tokens of a tokenizer trained here (8192)")
    parser.add_argument("--layers", type=positive, default=4, help="of the model whose step is timed (4)")
    parser.add_argument("--hidden", type=positive, default=256, help="its width (256)")
    parser.add_argument("--heads", type=positive, default=4, help="of attention (4)")
    parser.add_argument("--sequence", type=positive, default=512, help="tokens of a sample (512)")
    parser.add_argument("--micro-batch", type=positive, default=4, help="samples of a batch (4)")
    parser.add_argument("--repeats", type=positive, default=5, help="timed repeats of everything (5)")
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads(), help="of the training step")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write all rows as JSON")
    return parser.parse_args()


if __name__ == "__main__":
    run_command(main)
