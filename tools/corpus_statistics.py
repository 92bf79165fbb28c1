"""What is in a corpus: documents, their lengths, tokens, and how well the tokenizer fits.

    python tools/corpus_statistics.py --corpus corpora/web --tokenizer llama3/ --sequence-length 2048
    python tools/corpus_statistics.py --corpus corpora/web --tokenizer tokenizer.model --json web.json

The corpus is checked as a run checks it. Everything is read once, in blocks.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.data.index_check import BLOCK, TOKEN_TYPES, check_index, files_of
from pretrain.disk import replace_text
from pretrain.errors import run_command
from pretrain.tokenizer.base import Tokenizer
from pretrain.tokenizer.load import open_tokenizer
from tools.arguments import output_file, positive

QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)
MOST_FREQUENT = 10


def main() -> None:
    arguments = _arguments()
    found = statistics(arguments.corpus, open_tokenizer(arguments.tokenizer), arguments.sequence_length)
    if arguments.json is not None:
        replace_text(arguments.json, json.dumps(found, indent=2, ensure_ascii=False) + "\n")
    print(_table(found))


def statistics(prefix: Path, tokenizer: Tokenizer, sequence_length: int) -> dict[str, Any]:
    """All figures of the table, by name."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    facts = check_index(prefix, tokenizer.vocabulary, tokenizer.fingerprint)
    index = IndexedDataset(str(prefix))
    lengths = np.array(index.sequence_lengths, dtype=np.int64)  # the memory they lie in is unmapped with `index`
    counts = _token_counts(prefix, facts.token_type, tokenizer.vocabulary)
    ordinary = tokenizer.ordinary_tokens()
    used = int((counts[ordinary] > 0).sum())
    shares = counts / counts.sum()
    present = shares[shares > 0]
    longest_first = np.argsort(-counts, kind="stable")[:MOST_FREQUENT]
    return {
        "corpus": str(prefix),
        "documents": facts.documents,
        "tokens": facts.tokens,
        "text_bytes": facts.text_bytes,
        "bytes_per_token": facts.text_bytes / facts.tokens,
        "round_trip_exceptions": facts.round_trip_exceptions,
        "end_of_document": facts.end_of_document,
        "vocabulary": tokenizer.vocabulary,
        "ordinary_tokens": int(ordinary.sum()),
        "ordinary_tokens_used": used,
        "bits_per_token_by_frequency": float(-(present * np.log2(present)).sum()),
        "document_tokens": {str(q): int(np.quantile(lengths, q, method="nearest")) for q in QUANTILES},
        "mean_document_tokens": float(lengths.mean()),
        "sequence_length": sequence_length,
        "samples_in_one_epoch": (facts.tokens - 1) // sequence_length,
        "documents_longer_than_a_sample": int((lengths > sequence_length).sum()),
        "documents_per_sample": sequence_length / float(lengths.mean()),
        "most_frequent": [
            {"token": int(token), "text": tokenizer.decode([token]), "share": float(shares[token])}
            for token in longest_first
        ],
    }


def _token_counts(prefix: Path, token_type: str, vocabulary: int) -> np.ndarray:
    kind = next(np.dtype(known) for known in TOKEN_TYPES.values() if known.__name__ == token_type).newbyteorder("<")
    counts = np.zeros(vocabulary, dtype=np.int64)
    with files_of(prefix)[0].open("rb") as file:
        while content := file.read(BLOCK * kind.itemsize):
            counts += np.bincount(np.frombuffer(content, dtype=kind), minlength=vocabulary)
    return counts


def _table(found: dict[str, Any]) -> str:
    lengths = "  ".join(f"{float(q):.0%} {tokens:,}" for q, tokens in found["document_tokens"].items())
    frequent = "  ".join(f"{one['text']!r} {one['share']:.1%}" for one in found["most_frequent"])
    unused = found["ordinary_tokens"] - found["ordinary_tokens_used"]
    rows = [
        ("documents", f"{found['documents']:,}, {found['round_trip_exceptions']:,} that do not decode to themselves"),
        ("tokens", f"{found['tokens']:,}, {found['mean_document_tokens']:,.1f} a document"),
        ("document tokens", f"{lengths}   (shares of the documents that have no more)"),
        ("text", f"{found['text_bytes']:,} bytes, {found['bytes_per_token']:.3f} a token"),
        ("vocabulary", f"{found['vocabulary']:,} tokens, {unused:,} of those for text never occur"),
        ("entropy", f"{found['bits_per_token_by_frequency']:.3f} bits a token, by how often each occurs"),
        ("most frequent", frequent),
        (
            f"samples of {found['sequence_length']:,}",
            f"{found['samples_in_one_epoch']:,} in one epoch, {found['documents_per_sample']:.2f} documents each; "
            f"{found['documents_longer_than_a_sample']:,} documents are longer",
        ),
    ]
    return "\n".join([found["corpus"], *(f"  {name:<18} {text}" for name, text in rows)])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Statistics of a corpus.")
    parser.add_argument("--corpus", type=Path, required=True, help="without .bin or .idx", metavar="PREFIX")
    parser.add_argument("--tokenizer", type=Path, required=True, help="that it was written with", metavar="PATH")
    parser.add_argument("--sequence-length", type=positive, default=1024, help="of a run's samples (1024)", metavar="N")
    parser.add_argument("--json", type=output_file, help="write the figures there as well", metavar="FILE")
    return parser.parse_args()


if __name__ == "__main__":
    run_command(main)
