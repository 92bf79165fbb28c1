"""Measures how much rank training uses, against dropout and the objective (causal or masked).

    python tools/benchmarks/used_rank.py --input books.jsonl --held-out others.jsonl --output FOLDER --json used.json
    python tools/benchmarks/used_rank.py --input stdlib --held-out notes/ --output FOLDER --steps 100 --seeds 1

Trains small dense models, one for each objective, dropout and seed, through the ordinary training command with
`rank.track=true`, and reads what that measured at the end: of the cumulative update W - W0 of every projection the
effective rank exp(entropy of s/Σs) and the numbers of directions that hold 90 % and 99 % of the energy Σs², and the
effective rank of the representations behind every layer on held-out text. All are means over projections, or layers.

Everything lies in FOLDER. Finished runs are kept: interrupted, the same command goes on.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from pretrain.config.run import RunConfig, load_config, parse_config
from pretrain.disk import JsonLines, json_text, replace_text
from pretrain.errors import ConfigError, EspalierError, run_command
from pretrain.monitor.run_folder import CONFIG_FILE
from pretrain.provenance import git_revision, hardware, installed_versions
from pretrain.tokenizer.load import open_tokenizer
from tools.corpus.documents import find_files, read_documents
from tools.preprocess_corpus import preprocess
from tools.train_tokenizer import train_tokenizer, write_tokenizer

ROOT = Path(__file__).resolve().parents[2]
OBJECTIVES = ("causal", "mlm")
TOKENIZER_CHUNKS = 20_000
"""20 million characters are enough for a vocabulary this small."""
COLUMNS = ("update_effective_rank", "update_rank_90", "update_rank_99", "representation_effective_rank")


@dataclass(frozen=True)
class Case:
    """One run."""

    objective: str
    dropout: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.objective}_dropout_{self.dropout:g}_seed_{self.seed}"


def main() -> None:
    arguments = _arguments()
    data = prepare_text(arguments.input, arguments.held_out, arguments.vocabulary, arguments.output)
    seeds = range(1, arguments.seeds + 1)
    # One seed of all cases before the next: what an interrupted benchmark leaves can be compared.
    cases = [Case(*case) for case in ((o, d, s) for s, o, d in product(seeds, OBJECTIVES, arguments.dropout))]
    records = []
    for number, case in enumerate(cases, 1):
        print(f"[{number}/{len(cases)}] {case.name}", flush=True)
        config = parse_config(run_settings(case, data, arguments)).with_vocabulary(arguments.vocabulary)
        train(config, threads=arguments.threads)
        records.append({**asdict(case), **figures_of(config)})
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)  # `hardware` says what the runs had
    facts = {
        "benchmark": "used_rank",
        "settings": {key: getattr(arguments, key) for key in ("steps", "batch", "learning_rate", "vocabulary")},
        "commit": git_revision(),
        "versions": installed_versions(),
        "hardware": hardware(),
        "runs": records,
    }
    if arguments.json is not None:
        replace_text(arguments.json, json_text(facts, indent=2) + "\n")
    print("\n".join(table(records)))


def prepare_text(inputs: Sequence[str], held_out: Sequence[str], vocabulary: int, folder: Path) -> dict[str, str]:
    """The data section of the runs: one tokenizer with a mask token for all, held-out documents last in the corpus."""
    training_files, held_out_files = find_files(inputs), find_files(held_out)
    prefix, tokenizer = folder / "corpus", folder / "tokenizer.model"
    if not tokenizer.is_file():
        write_tokenizer(
            train_tokenizer(training_files, vocabulary=vocabulary, sample_chunks=TOKENIZER_CHUNKS, mask_token=True),
            tokenizer,
        )
    if open_tokenizer(tokenizer).vocabulary != vocabulary:
        raise ConfigError(
            f"{folder} holds a tokenizer of {open_tokenizer(tokenizer).vocabulary} tokens, and --vocabulary is "
            f"{vocabulary}: name another --output"
        )
    if not prefix.with_suffix(".json").is_file():
        preprocess([*training_files, *held_out_files], prefix, tokenizer)
    counts = [
        sum(1 for document in read_documents(files, ["text"]) if document.text)
        for files in (training_files, held_out_files)
    ]
    return {"prefix": str(prefix), "tokenizer": str(tokenizer), "split": f"{counts[0]},{counts[1]},0"}


def run_settings(case: Case, data: Mapping[str, str], arguments: argparse.Namespace) -> dict[str, Any]:
    """The config of one run: the same model, length and learning rate for all."""
    quarter = max(1, arguments.steps // 4)
    return {
        "run": {"folder": str(arguments.output / case.name), "seed": case.seed},
        "model": {
            "family": "llama",
            "layers": 4,
            "hidden": 128,
            "heads": 4,
            "sequence_length": 128,
            "parametrization": "dense",
            "hidden_dropout": case.dropout,
            "attention_dropout": case.dropout,
        },
        "train": {
            "objective": case.objective,
            "steps": arguments.steps,
            "micro_batch": arguments.batch,
            "global_batch": arguments.batch,
            "validate_every": quarter,
            "validation_sequences": 256,
            "log_every": 20,
        },
        # Decay would add a share of W0, which has full rank, to every update.
        "optimizer": {
            "learning_rate": arguments.learning_rate,
            "minimum_learning_rate": arguments.learning_rate / 10,
            "weight_decay": 0.0,
        },
        "schedule": {"shape": "cosine", "warmup_steps": arguments.steps // 20},
        "rank": {"policy": "fixed", "track": True},
        "data": dict(data),
        "checkpoint": {"every": quarter, "keep": 2},
        "deepspeed": {"stage": 0},
    }


def train(config: RunConfig, *, threads: int) -> None:
    """Runs, or goes on with, the training of `config`; a finished one is left as it is."""
    folder = Path(config.run.folder)
    if (folder / CONFIG_FILE).is_file() and load_config(str(folder / CONFIG_FILE)) != config:
        raise ConfigError(f"{folder} holds a run with other settings: name another --output")
    if (folder / "summary.json").is_file():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    file, log = (folder.with_name(f"{folder.name}.{ending}") for ending in ("yaml", "log"))
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")), encoding="utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "pretrain" / "train.py"), "--config", str(file)]
    start = time.perf_counter()
    with log.open("ab") as output:
        status = subprocess.run(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, check=False
        ).returncode
    if status:
        raise EspalierError(f"a training run ended with exit code {status}: see {log}")
    print(f"  {time.perf_counter() - start:.0f} s", flush=True)


def figures_of(config: RunConfig) -> dict[str, Any]:
    """What a finished run came to, at its end and at every validation before."""
    folder = Path(config.run.folder)
    validations = {
        event["step"]: event for event in JsonLines(folder / "events.jsonl").read() if event["event"] == "validation"
    }
    curve = [
        {
            "step": line["step"],
            "validation_loss": validations[line["step"]]["lm_loss"],
            "accuracy": validations[line["step"]].get("accuracy"),
            **used_rank(line),
        }
        for line in JsonLines(folder / "tracking.jsonl").read()
    ]
    return {**curve[-1], "curve": curve[:-1]}


def used_rank(tracked: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of the table from one line of `tracking.jsonl`, and the effective ranks of every layer."""
    updates, representations = tracked["update"], tracked["representation"]
    return {
        "update_effective_rank": fmean(one["effective_rank"] for one in updates.values()),
        "update_rank_90": fmean(one["energy_rank_90"] for one in updates.values()),
        "update_rank_99": fmean(one["energy_rank_99"] for one in updates.values()),
        "representation_effective_rank": fmean(one["effective_rank"] for one in representations.values()),
        "update_effective_ranks": {name: one["effective_rank"] for name, one in updates.items()},
        "representation_effective_ranks": {name: one["effective_rank"] for name, one in representations.items()},
    }


def table(records: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Markdown: a line for each objective and dropout, means over the seeds and half their spread."""
    yield (
        "| objective | dropout | validation loss | accuracy | effective rank of updates | 90 % of their energy | 99 % "
        "| effective rank of representations |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    for objective, dropout in dict.fromkeys((record["objective"], record["dropout"]) for record in records):
        group = [record for record in records if (record["objective"], record["dropout"]) == (objective, dropout)]

        def cell(key: str, digits: int, group: Sequence[Mapping[str, Any]] = group) -> str:
            values = [record[key] for record in group]
            if None in values:
                return "–"
            spread = (max(values) - min(values)) / 2
            return f"{fmean(values):.{digits}f}" + (f" ± {spread:.{digits}f}" if len(values) > 1 else "")

        cells = [cell("validation_loss", 3), cell("accuracy", 3), *(cell(column, 1) for column in COLUMNS)]
        yield f"| {objective} | {dropout:g} | " + " | ".join(cells) + " |"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure the rank that training uses, against dropout and objective.")
    parser.add_argument("--input", nargs="+", required=True, help="text to train on (as tools/preprocess_corpus.py)")
    parser.add_argument("--held-out", nargs="+", required=True, help="text to validate on")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for corpus and runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures as JSON")
    parser.add_argument("--dropout", type=float, nargs="+", default=[0.0, 0.1, 0.3], help="values to compare")
    parser.add_argument("--seeds", type=int, default=2, help="runs of every case (2)")
    parser.add_argument("--steps", type=int, default=300, help="steps of every run (300)")
    parser.add_argument("--batch", type=int, default=16, help="sequences of 128 tokens a step (16)")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="peak, the same for all (2e-3)")
    parser.add_argument("--vocabulary", type=int, default=1024, help="tokens of the tokenizer (1024)")
    parser.add_argument("--threads", type=int, default=1, help="of every run (1)")
    arguments = parser.parse_args()
    for flag in ("seeds", "steps", "batch", "threads"):
        if getattr(arguments, flag) < 1:
            raise ConfigError(f"--{flag} is {getattr(arguments, flag)}: set it to 1 or more")
    return arguments


if __name__ == "__main__":
    run_command(main)
