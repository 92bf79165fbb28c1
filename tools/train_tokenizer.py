"""Trains the tokenizer: sentencepiece BPE or unigram with byte fallback, under the conditions of
pretrain/tokenizer/base.py.

    python tools/train_tokenizer.py --input stdlib --output tokenizer.model --vocabulary 8192
    python tools/train_tokenizer.py --input books.jsonl.xz notes/ --output tokenizer.model --vocabulary 32000 \\
        --type unigram
    python tools/train_tokenizer.py --input stdlib --output tokenizer.model --mask-token     (for train.objective=mlm)

The same input and settings give the same file, byte for byte.
"""

import argparse
import io
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from pretrain.disk import new_file, write_blocks
from pretrain.errors import DataError, run_command
from pretrain.tokenizer.sentencepiece import END_OF_DOCUMENT, MASK, SCORE_QUANTUM, Piece, SentencePieceTokenizer
from tools.corpus.documents import find_files, read_documents

CHUNK_CHARACTERS = 1000
"""sentencepiece learns from "sentences": pieces of a document of about this length."""
FEWEST_TOKENS = 256 + 2 + 94
"""Bytes, <unk> and end of document, printable ASCII; a mask token comes on top."""


def main() -> None:
    arguments = _arguments()
    output: Path = arguments.output
    fewest = FEWEST_TOKENS + arguments.mask_token
    if arguments.vocabulary < fewest:
        raise DataError(
            f"--vocabulary is {arguments.vocabulary}, and bytes, special tokens and ASCII alone take {fewest}: "
            "raise --vocabulary"
        )
    if arguments.sample_chunks < 1:
        raise DataError(f"--sample-chunks is {arguments.sample_chunks}: set it to 1 or more")
    if output.exists() and not arguments.overwrite:
        raise DataError(f"{output} exists, and corpora may depend on it: add --overwrite or change --output")
    start = time.perf_counter()
    model = train_tokenizer(
        find_files(arguments.input),
        arguments.json_keys,
        kind=arguments.type,
        vocabulary=arguments.vocabulary,
        seed=arguments.seed,
        sample_chunks=arguments.sample_chunks,
        threads=arguments.threads,
        mask_token=arguments.mask_token,
    )
    tokenizer = write_tokenizer(model, output)
    print(
        f"{output}: {tokenizer.kind}, {tokenizer.vocabulary} tokens, sha256 {tokenizer.fingerprint[:12]}, "
        f"trained in {time.perf_counter() - start:.1f} s"
    )


def train_tokenizer(
    files: Sequence[Path],
    json_keys: Sequence[str] = ("text",),
    *,
    kind: str = "bpe",
    vocabulary: int = 8192,
    seed: int = 1234,
    sample_chunks: int = 400_000,
    threads: int = 4,
    mask_token: bool = False,
) -> bytes:
    """A serialized sentencepiece model of the documents in `files`, with or without the mask token."""
    documents = (document.text for document in read_documents(files, json_keys))
    # Drawn here: sentencepiece's own draw gives another sample every time, whatever its seed.
    chunks = draw_sample((chunk for text in documents for chunk in split_text(text)), sample_chunks, seed)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(chunks),
            model_writer=model,
            model_type=kind,
            vocab_size=vocabulary,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            # Indentation is worth a piece; nothing else reaches across a space, see pretrain/tokenizer/base.py.
            allow_whitespace_only_pieces=True,
            split_by_whitespace=True,
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            eos_piece=END_OF_DOCUMENT,
            control_symbols=[MASK] if mask_token else [],
            required_chars="".join(map(chr, range(0x21, 0x7F))),
            character_coverage=0.9995,
            shuffle_input_sentence=False,
            max_sentence_length=4 * (CHUNK_CHARACTERS + 1),
            num_threads=threads,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise DataError(_explained(str(error), kind, vocabulary, chunks)) from error
    return _quantized(model.getvalue())


def write_tokenizer(model: bytes, output: Path) -> SentencePieceTokenizer:
    """Writes a model file as a whole or not at all, and opens it."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with new_file(output) as staging:
            write_blocks(staging, [model])
            SentencePieceTokenizer(staging)
    except OSError as error:
        raise DataError(f"{output} cannot be written ({error.strerror}): free space or change --output") from error
    return SentencePieceTokenizer(output)


def draw_sample(chunks: Iterable[str], most: int, seed: int) -> list[str]:
    """At most `most` of the chunks, each with the same chance, without holding more than those (reservoir sampling)."""
    draw = random.Random(seed)
    kept: list[str] = []
    for seen, chunk in enumerate(chunks):
        if seen < most:
            kept.append(chunk)
        elif (place := draw.randrange(seen + 1)) < most:
            kept[place] = chunk
    return kept


def split_text(text: str) -> Iterator[str]:
    """Pieces of a text that begin, not end, with a line's end: sentencepiece drops those at the end of a sentence."""
    start = 0
    while start < len(text):
        end = len(text)
        if end - start > CHUNK_CHARACTERS:
            end = text.rfind("\n", start + 1, start + CHUNK_CHARACTERS)
            if end < 0:
                end = start + CHUNK_CHARACTERS
        yield text[start:end]
        start = end


def _quantized(serialized: bytes) -> bytes:
    """Rounds scores to the multiples whose sums are exact; BPE scores are whole numbers already."""
    model = sentencepiece_model_pb2.ModelProto.FromString(serialized)
    for piece in model.pieces:
        if piece.type == Piece.NORMAL:
            piece.score = min(round(piece.score / SCORE_QUANTUM) * SCORE_QUANTUM, 0.0)
    return bytes(model.SerializeToString(deterministic=True))


def _explained(message: str, kind: str, vocabulary: int, chunks: Sequence[str]) -> str:
    """sentencepiece's refusal in our words."""
    amount = f"{sum(map(len, chunks))} characters of text"
    if "too high" in message:
        most = message.rsplit("<=", 1)[-1].strip(" .")
        return (
            f"{amount} give a {kind} tokenizer of at most {most} tokens, and --vocabulary is {vocabulary}: "
            "lower --vocabulary or give more --input"
        )
    if "smaller than required_chars" in message:
        least = message.rsplit(" vs ", 1)[-1].split(".")[0]
        return f"the text's characters alone take {least} tokens, and --vocabulary is {vocabulary}: raise --vocabulary"
    if "all_chars_count" in message or "sentences_.empty()" in message:
        return f"--input holds no text to learn from ({amount}): give other --input"
    return f"sentencepiece could not train on {amount} ({message}): change --input, --vocabulary or --type"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a sentencepiece tokenizer on text.")
    parser.add_argument(
        "--input", nargs="+", required=True, help="files, folders, or stdlib (tools/corpus/documents.py)"
    )
    parser.add_argument("--output", type=Path, required=True, help="model file to write, such as tokenizer.model")
    parser.add_argument("--vocabulary", type=int, default=8192, help="tokens, special ones and bytes included (8192)")
    parser.add_argument("--type", choices=("bpe", "unigram"), default="bpe", help="kind of model (bpe)")
    parser.add_argument("--json-keys", nargs="+", default=["text"], help="keys of the texts in .jsonl lines (text)")
    parser.add_argument(
        "--sample-chunks",
        type=int,
        default=400_000,
        help=f"learn from at most this many chunks of {CHUNK_CHARACTERS} characters, drawn at random (400000)",
    )
    parser.add_argument("--seed", type=int, default=1234, help="of the draw (1234)")
    parser.add_argument(
        "--threads",
        type=int,
        default=4,
        help="of the training; the file depends on it, as on all settings (4)",
    )
    parser.add_argument("--mask-token", action="store_true", help=f"add {MASK}, which train.objective=mlm needs")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    return parser.parse_args()


if __name__ == "__main__":
    run_command(main)
