"""Turns text into a corpus: a megatron-core indexed dataset (`P.bin`, `P.idx`) and the facts about it (`P.json`).

    python tools/preprocess_corpus.py --input stdlib --tokenizer-model tokenizer.model --append-eod \\
        --output-prefix corpus
    python tools/preprocess_corpus.py --input data/*.jsonl.zst --json-keys text --tokenizer-model llama3/ \\
        --append-eod --workers 16 --output-prefix corpora/web

Flags are named as in Megatron-LM's own tool. Complete parts are kept in `P.parts` until the corpus is whole: the same
command goes on where a run of it was ended. On several nodes with a shared file system each does its share with
`--nodes N --node 0` (to N-1), and the command without the two then joins the parts:

    srun --nodes 4 bash -c 'python tools/preprocess_corpus.py ... --nodes 4 --node $SLURM_NODEID'
    python tools/preprocess_corpus.py ...

The corpus depends neither on workers and nodes nor on interruptions. A `.txt` or `.py` file is one document and is held
in memory as a whole.
"""

import argparse
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pretrain.data.index_check import CorpusFacts, files_of, read_facts, scan_index
from pretrain.disk import commit_files
from pretrain.errors import ConfigError, DataError, run_command
from pretrain.tokenizer.base import Tokenizer
from pretrain.tokenizer.load import open_tokenizer
from tools.arguments import positive
from tools.console import progress
from tools.corpus.documents import find_files
from tools.corpus.encoding import encode_all
from tools.corpus.parts import PartFolder, Unit, batches, plan_units, token_type_of

FORMAT = 1
"""Version of the parts: raised when other tokens come out of the same input."""


def main() -> None:
    arguments = _arguments()
    if not 0 <= arguments.node < arguments.nodes:
        raise ConfigError(
            f"--node is {arguments.node}, and --nodes {arguments.nodes}: number the nodes from 0 to "
            f"{arguments.nodes - 1}"
        )
    start = time.perf_counter()
    prefix, folder = arguments.output_prefix, PartFolder(arguments.output_prefix)
    job = Job(
        find_files(arguments.input),
        prefix,
        open_tokenizer(arguments.tokenizer_model),
        json_keys=tuple(arguments.json_keys),
        append_eod=arguments.append_eod,
        workers=arguments.workers,
        overwrite=arguments.overwrite,
    )
    try:
        tokens = job.tokenize(arguments.node, arguments.nodes)
        if arguments.nodes > 1:
            print(
                f"node {arguments.node} of {arguments.nodes} has done its share: when all have, give the same command "
                "without --nodes and --node"
            )
            return
        facts = job.join()
    finally:
        if folder.path.is_dir():
            print(f"complete parts are kept in {folder.path}: the same command goes on from there", file=sys.stderr)
    seconds = time.perf_counter() - start
    went_on = f"; {facts.tokens - tokens:,} tokens were there" if tokens < facts.tokens else ""
    print(
        f"{prefix}: {facts.documents:,} documents, {facts.tokens:,} tokens ({facts.token_type}), "
        f"{facts.text_bytes:,} bytes of text ({facts.text_bytes / facts.tokens:.2f} a token)\n"
        f"{seconds:.1f} s, {tokens / seconds:,.0f} tokens/s with {arguments.workers} workers{went_on}\n"
        f"{facts.round_trip_exceptions} documents do not decode to themselves"
    )


def preprocess(
    files: Sequence[Path],
    prefix: Path,
    tokenizer_model: Path,
    *,
    json_keys: Sequence[str] = ("text",),
    append_eod: bool = True,
    workers: int = 1,
    overwrite: bool = False,
) -> CorpusFacts:
    """Writes the corpus of the documents in `files`."""
    tokenizer = open_tokenizer(tokenizer_model)
    job = Job(files, prefix, tokenizer, tuple(json_keys), append_eod, workers, overwrite)
    job.tokenize(0, 1)
    return job.join()


@dataclass(frozen=True)
class Job:
    """One corpus to be written."""

    files: Sequence[Path]
    prefix: Path
    tokenizer: Tokenizer
    json_keys: tuple[str, ...]
    append_eod: bool
    workers: int
    overwrite: bool

    def tokenize(self, node: int, nodes: int) -> int:
        """Makes the missing parts of every `nodes`-th unit, from unit `node` on; how many tokens that were."""
        _check_output(self.prefix, self.overwrite)
        # megatron-core takes seconds to import, and what it warns of is no concern here.
        warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
        folder, units = PartFolder(self.prefix), self._units()
        try:
            with folder.held(node, nodes):
                missing = []
                for number in range(node, len(units), nodes):
                    parts = folder.complete_parts(units[number])
                    if not parts or not parts[-1][1].ends_unit:
                        missing.append((number, units[number], parts[-1][1].documents_read if parts else 0))
                todo = batches(missing, self.json_keys)
                encoded = encode_all(todo, self.tokenizer.path, self.append_eod, self.workers)
                total = sum(unit.stored_bytes for _, unit, _ in missing)
                written = tokens = 0
                with progress("tokenizing", total, unit="bytes") as bar:
                    for piece in folder.write(encoded, units, token_type_of(self.tokenizer.vocabulary)):
                        written, tokens = written + len(piece.lengths), tokens + len(piece.tokens)
                        note = f"{written} documents, {tokens / 1e6:.2f} M tokens"
                        bar.stand(piece.batch.stored_bytes_read, note)
                return tokens
        except OSError as error:
            raise self._cannot_write(error) from error

    def join(self) -> CorpusFacts:
        """Makes the corpus of all parts."""
        folder, units = PartFolder(self.prefix), self._units()
        try:
            with folder.held(0, 1), tempfile.TemporaryDirectory(dir=self.prefix.parent, prefix=".join.") as staging:
                staged = Path(staging, "corpus")
                facts = self._join(folder, units, staged)
                # The facts come last: together with the fingerprint in them they make the three files one corpus.
                commit_files(dict(zip(files_of(staged), files_of(self.prefix), strict=True)))
                folder.clear()
        except OSError as error:
            raise self._cannot_write(error) from error
        return facts

    def _units(self) -> list[Unit]:
        settings = {
            "format": FORMAT,
            "tokenizer": self.tokenizer.fingerprint,
            "json_keys": self.json_keys,
            "append_eod": self.append_eod,
        }
        return plan_units(self.files, settings)

    def _join(self, folder: PartFolder, units: Sequence[Unit], staged: Path) -> CorpusFacts:
        """Writes the three files under another name."""
        tokenizer = self.tokenizer
        token_type = token_type_of(tokenizer.vocabulary)
        parts = folder.join(units, staged, token_type, tokenizer.vocabulary)
        content = scan_index(staged, tokenizer.vocabulary)
        facts = CorpusFacts(
            documents=content.documents,
            tokens=content.tokens,
            text_bytes=sum(part.text_bytes for part in parts),
            token_type=np.dtype(token_type).name,
            vocabulary=tokenizer.vocabulary,
            tokenizer_fingerprint=tokenizer.fingerprint,
            end_of_document=self.append_eod,
            round_trip_exceptions=sum(part.round_trip_exceptions for part in parts),
            fingerprint=content.fingerprint,
        )
        facts_path = files_of(staged)[2]
        facts_path.write_text(facts.model_dump_json(indent=2) + "\n", encoding="utf-8")
        return facts

    def _cannot_write(self, error: OSError) -> DataError:
        return DataError(
            f"the corpus {self.prefix} cannot be written ({error.strerror}): free space or change --output-prefix"
        )


def _check_output(prefix: Path, overwrite: bool) -> None:
    existing = [path for path in files_of(prefix) if path.exists()]
    if not existing:
        return
    try:
        read_facts(prefix)
    except DataError:
        raise DataError(
            f"{existing[0]} exists and was not written by this tool: remove it or change --output-prefix"
        ) from None
    if not overwrite:
        raise DataError(f"the corpus {prefix} exists: add --overwrite or change --output-prefix")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Tokenize text into a megatron-core indexed dataset.")
    parser.add_argument(
        "--input", nargs="+", required=True, help="files, folders, or stdlib (tools/corpus/documents.py)"
    )
    parser.add_argument("--output-prefix", type=Path, required=True, help="writes PREFIX.bin, .idx and .json")
    parser.add_argument(
        "--tokenizer-model",
        type=Path,
        required=True,
        help="written by tools/train_tokenizer.py, or a tokenizer.json of Hugging Face, or the folder of either",
    )
    parser.add_argument("--json-keys", nargs="+", default=["text"], help="keys of the texts in .jsonl lines (text)")
    parser.add_argument("--append-eod", action="store_true", help="end each document with the end-of-document token")
    parser.add_argument("--workers", type=positive, default=1, help="processes that tokenize (1)")
    parser.add_argument("--nodes", type=positive, default=1, help="that share the work, see above (1)", metavar="N")
    parser.add_argument("--node", type=int, default=0, help="which of them this is, from 0 (0)", metavar="I")
    parser.add_argument("--overwrite", action="store_true", help="replace a corpus this tool wrote")
    return parser.parse_args()


if __name__ == "__main__":
    run_command(main)
