"""Evaluates a model on a held-out text: loss, perplexity, bits per byte.

    python tools/evaluate.py --model runs/quickstart --text held_out/
    python tools/evaluate.py --model runs/quickstart/export --text book.txt --stride 128
    deepspeed --num_gpus 2 tools/evaluate.py --model runs/quickstart --tensor-parallel 2 --corpus my --split 98,2,0 \
        --share validation
    torchrun --nproc-per-node 2 tools/evaluate.py --model runs/quickstart/consolidated --text a.txt --json found.json

`--model` is a run folder or a checkpoint, a consolidated folder, or a dense export; the figures are the same but for
rounding, on any number of processes and any `--tensor-parallel`. Other models: lm_eval (docs/evaluation.md).
"""

import argparse
import json
from pathlib import Path

import numpy as np

from model.process_groups import initialize_process_groups
from pretrain.data.index_check import check_index
from pretrain.disk import replace_text
from pretrain.distributed import is_first_process, joined_processes, together
from pretrain.errors import ConfigError, DataError, run_command
from pretrain.evaluation import evaluate, find_model
from pretrain.tokenizer.base import Tokenizer
from pretrain.tokenizer.load import open_tokenizer
from tools.arguments import output_file, positive
from tools.corpus.documents import find_files, read_documents

SHARES = ("training", "validation", "test")


def main() -> None:
    arguments = _parse_arguments()
    with joined_processes() as processes:
        if processes % arguments.tensor_parallel:
            raise ConfigError(
                f"{processes} processes do not divide into groups of --tensor-parallel {arguments.tensor_parallel}: "
                "change either"
            )
        model = together(lambda: find_model(arguments.model, arguments.tensor_parallel))
        tokenizer = together(lambda: open_tokenizer(model.tokenizer_path))
        stride = arguments.stride or model.positions
        if stride > model.positions:
            raise ConfigError(f"--stride {stride} is above the {model.positions} positions of the model: lower it")
        stream = together(lambda: _stream(arguments, tokenizer))
        initialize_process_groups(arguments.tensor_parallel)
        losses = together(model.load)
        found = evaluate(
            losses,
            stream,
            tokenizer.byte_lengths(),
            length=model.positions,
            stride=stride,
            micro_batch=arguments.micro_batch,
            end_of_document=tokenizer.end_of_document if arguments.within_documents else None,
        )
        if is_first_process():
            if arguments.json is not None:
                facts = {"model": str(arguments.model), "kind": model.kind, **found.facts()}
                replace_text(arguments.json, json.dumps(facts, indent=2) + "\n")
            print(f"{model.kind} {arguments.model}: windows of {found.length}, stride {found.stride}")
            print(f"{found.tokens:,} tokens, {found.bytes:,} bytes")
            print(
                f"loss {found.lm_loss:.6f}  perplexity {found.perplexity:.4f}  bits per byte {found.bits_per_byte:.6f}"
            )


def _stream(arguments: argparse.Namespace, tokenizer: Tokenizer) -> np.ndarray:
    """The text as one row of tokens, an end of document first."""
    end = tokenizer.end_of_document
    if arguments.corpus is None:
        stream = [end]
        for document in read_documents(find_files(arguments.text), arguments.json_keys):
            stream += [*tokenizer.encode(document.text), end]
        if len(stream) < 3:
            raise DataError(f"{' '.join(arguments.text)} holds no text: change --text")
        return np.array(stream, dtype=np.int64)
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    facts = check_index(arguments.corpus, tokenizer.vocabulary, tokenizer.fingerprint)
    first, last = _share(arguments.split, arguments.share, facts.documents)
    index = IndexedDataset(str(arguments.corpus))
    documents = [np.asarray(index[place], dtype=np.int64) for place in range(first, last)]
    if sum(map(len, documents)) < 2:
        raise DataError(f"the {arguments.share} share of --split {arguments.split} holds no text: change either")
    return np.concatenate([np.array([end]), *documents])


def _share(split: str, share: str, documents: int) -> tuple[int, int]:
    """First document and the one behind the last; the rounding is megatron-core's, as in a run."""
    try:
        shares = [float(part) for part in split.split(",")]
    except ValueError:
        shares = []
    if len(shares) != len(SHARES) or min(shares) < 0.0 or not 0.0 < sum(shares) < float("inf"):
        raise ConfigError(f"--split is {split!r}: give three shares such as 98,2,0 (training, validation, test)")
    place = SHARES.index(share)
    bounds = [sum(shares[:place]) / sum(shares), sum(shares[: place + 1]) / sum(shares)]
    return round(bounds[0] * float(documents)), round(bounds[1] * float(documents))


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Evaluates a model on a held-out text.")
    parser.add_argument("--model", type=Path, required=True, help="run, checkpoint or model folder", metavar="DIR")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", nargs="+", help="files or folders, as for preprocess_corpus.py", metavar="PATH")
    source.add_argument("--corpus", type=Path, help="corpus of preprocess_corpus.py, without .bin", metavar="PREFIX")
    parser.add_argument("--json-keys", nargs="+", default=["text"], help="of .jsonl files (text)", metavar="KEY")
    parser.add_argument("--split", default="0,0,100", help="of the corpus, as data.split (all of it)", metavar="A,B,C")
    parser.add_argument("--share", choices=SHARES, default="test", help="which share of --split (test)")
    parser.add_argument("--stride", type=positive, help="tokens between windows (the model's positions)", metavar="N")
    parser.add_argument(
        "--within-documents", action="store_true", help="see every document alone, as data.within_documents trains"
    )
    parser.add_argument("--micro-batch", type=positive, default=8, help="windows at a time (8)", metavar="N")
    parser.add_argument("--tensor-parallel", type=positive, default=1, help="processes to a model (1)", metavar="N")
    parser.add_argument("--json", type=output_file, help="write the figures there as well", metavar="FILE")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    return parser.parse_args()


if __name__ == "__main__":
    run_command(main)
