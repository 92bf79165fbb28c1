"""Adapts a model pretrained on one text to another: growing rank, fixed ranks, PEFT and full fine-tuning.

    python tools/benchmarks/adaptation.py --corpus-from stdlib --adapt-to peps.jsonl.xz --output FOLDER \\
        --json adaptation.json --picture docs/images/adaptation.png --page docs/adaptation.md
    python tools/benchmarks/adaptation.py --corpus-from stdlib --adapt-to notes/ --output FOLDER --base-steps 40 \\
        --steps 20

A small llama is trained densely on the first text (with a tokenizer of both), exported for transformers and imported
again with the ordinary tools; then it is adapted to the second text in each of these ways, at every learning rate of
the way's own grid, and the best counts:

    full        all weights are trained
    lora        W0 + B A of a fixed rank, factors alone are trained
    peft        the same with the `peft` library, in a plain PyTorch loop on the same batches
    growing     W0 + B A whose rank grows between the first two of them, by each of `GROWTH`

Everything lies in FOLDER. Finished runs are kept: interrupted, the same command goes on.
"""

import argparse
import json
import os
import random
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from model.costs.arithmetic import linear_parameters
from pretrain.config.files import merge, read_json, read_settings
from pretrain.config.run import RunConfig, parse_config
from pretrain.disk import json_text, replace_text
from pretrain.errors import ConfigError, EspalierError, run_command
from tools.benchmarks.adaptation_report import facts_of_benchmark, write_page, write_picture
from tools.benchmarks.used_rank import train
from tools.corpus.documents import find_files, read_documents
from tools.preprocess_corpus import preprocess
from tools.train_tokenizer import train_tokenizer, write_tokenizer

ROOT = Path(__file__).resolve().parents[2]
VOCABULARY, BATCH, VALIDATION_SEQUENCES = 1024, 16, 512
TOKENIZER_CHUNKS = 20_000
RANKS = (4, 16, 32)
FIRST_RANK, LAST_RANK = RANKS[0], RANKS[1]
HELD_OUT_SHARE = 0.1
RATES = {
    "full": (1e-3, 2e-3, 4e-3, 8e-3),
    "lora": (5e-3, 1e-2, 2e-2, 5e-2),
    "peft": (5e-3, 1e-2, 2e-2, 5e-2),
    "growing": (5e-3, 1e-2, 2e-2, 5e-2),
}
GROWTH: dict[str, dict[str, Any]] = {
    "schedule": {"schedule": [(0.25, 8), (0.5, LAST_RANK)]},
    "gradient": {"check_every": 0.15, "stop_step": 0.6, "probe": 8},
}
"""Policies and their settings; steps are shares of the run."""
MODEL = {"family": "llama", "layers": 4, "hidden": 128, "heads": 4, "sequence_length": 128}


@dataclass(frozen=True)
class Case:
    """One run."""

    method: str
    rank: int | None
    """Rank at the start of the run."""
    learning_rate: float
    policy: str = "fixed"

    @property
    def way(self) -> str:
        """What is compared: the case without its learning rate."""
        rank = "" if self.rank is None else f"_rank_{self.rank}"
        return self.method + (f"_{self.policy}" if self.policy != "fixed" else rank)

    @property
    def name(self) -> str:
        return f"{self.way}_rate_{self.learning_rate:g}"


def all_cases() -> list[Case]:
    """Every way at every learning rate of its grid."""
    cases = [Case("full", None, rate) for rate in RATES["full"]]
    cases += [Case("lora", rank, rate) for rank in RANKS for rate in RATES["lora"]]
    cases += [Case("peft", rank, rate) for rank in (FIRST_RANK, LAST_RANK) for rate in RATES["peft"]]
    cases += [Case("growing", FIRST_RANK, rate, policy) for policy in GROWTH for rate in RATES["growing"]]
    return cases


def main() -> None:
    arguments = _arguments()
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    torch.set_num_threads(arguments.threads)
    folder: Path = arguments.output.resolve()
    texts = prepare_texts(arguments.corpus_from, arguments.adapt_to, folder)
    base = pretrain_base(texts["base"], folder, arguments)
    cases = all_cases()
    records = []
    for number, case in enumerate(cases, 1):
        print(f"[{number}/{len(cases)}] {case.name}", flush=True)
        records.append(adapt(case, texts["adapt"], base, folder, arguments))
    facts = facts_of_benchmark(records, vars(arguments) | {"batch": BATCH, "model": MODEL})
    if arguments.json is not None:
        replace_text(arguments.json, json_text(facts, indent=2) + "\n")
    if arguments.picture is not None:
        write_picture(facts, arguments.picture)
    if arguments.page is not None:
        write_page(facts, arguments.page)
    print("\n".join(facts["table"]))


def prepare_texts(corpus_from: Sequence[str], adapt_to: Sequence[str], folder: Path) -> dict[str, dict[str, str]]:
    """Data sections of both texts, one tokenizer for both; documents of the second are shuffled, the last held out."""
    folder.mkdir(parents=True, exist_ok=True)
    first, shuffled, tokenizer = find_files(corpus_from), folder / "adapt.jsonl", folder / "tokenizer.model"
    if not shuffled.is_file():
        documents = [document.text for document in read_documents(find_files(adapt_to), ["text"])]
        random.Random(1234).shuffle(documents)
        replace_text(shuffled, "".join(json.dumps({"text": text}) + "\n" for text in documents))
    if not tokenizer.is_file():
        files = [*first, shuffled]
        write_tokenizer(train_tokenizer(files, vocabulary=VOCABULARY, sample_chunks=TOKENIZER_CHUNKS), tokenizer)
    sections = {}
    for name, files, held_out in (("base", first, 0.02), ("adapt", [shuffled], HELD_OUT_SHARE)):
        prefix = folder / name
        if not prefix.with_suffix(".json").is_file():
            preprocess(files, prefix, tokenizer)
        split = f"{100 * (1 - held_out):g},{100 * held_out:g},0"
        sections[name] = {"prefix": str(prefix), "tokenizer": str(tokenizer), "split": split}
    return sections


def run_settings(
    data: Mapping[str, str], folder: Path, steps: int, learning_rate: float, sections: Mapping[str, Any]
) -> RunConfig:
    """What all runs have in common, and `sections` laid over it."""
    common: dict[str, Any] = {
        "run": {"folder": str(folder)},
        "train": {
            "steps": steps,
            "micro_batch": BATCH,
            "global_batch": BATCH,
            "validate_every": 0,
            "validation_sequences": VALIDATION_SEQUENCES,
            "log_every": 20,
        },
        "optimizer": {
            "learning_rate": learning_rate,
            "minimum_learning_rate": learning_rate / 10,
            "weight_decay": 0.0,
        },
        "schedule": {"shape": "cosine", "warmup_steps": steps // 20},
        "data": dict(data),
        "checkpoint": {"every": 0, "keep": 2},
        "deepspeed": {"stage": 1},
    }
    return parse_config(merge(common, dict(sections)))


def pretrain_base(data: Mapping[str, str], folder: Path, arguments: argparse.Namespace) -> Path:
    """The Hugging Face folder of the model that is adapted."""
    run, export = folder / "base_run", folder / "base_export"
    sections = {"model": {**MODEL, "parametrization": "dense", "vocabulary": VOCABULARY}}
    print(f"[base] {arguments.base_steps} steps", flush=True)
    train(run_settings(data, run, arguments.base_steps, 2e-3, sections), threads=arguments.threads)
    if not export.is_dir():
        merged = folder / "base_merged"
        _tool("consolidate_checkpoint", "--checkpoint", run, "--output", merged, "--overwrite")
        _tool("densify_checkpoint", "--input", merged, "--output", export)
    return export


def adapt(
    case: Case, data: Mapping[str, str], base: Path, folder: Path, arguments: argparse.Namespace
) -> dict[str, Any]:
    """The record of one adaptation."""
    run = folder / "runs" / case.name
    run.parent.mkdir(exist_ok=True)
    start = _start(case, base, folder)
    config = run_settings(data, run, arguments.steps, case.learning_rate, _sections(case, start, arguments.steps))
    figures = run / "figures.json" if case.method == "peft" else run / "summary.json"
    if case.method != "peft":
        train(config, threads=arguments.threads)
    elif not figures.is_file():
        from tools.benchmarks.adaptation_peft import train_with_peft  # the one way that needs PEFT

        found = train_with_peft(config, base, case.rank or 0)
        replace_text(figures, json_text(found))
    facts = read_json(figures)
    keys = ("trained_parameters", "validation_loss", "validation_loss_before", "mean_rank")
    what = {"way": case.way, "method": case.method, "policy": case.policy, "rank": case.rank}
    return {**what, "learning_rate": case.learning_rate, **{key: facts[key] for key in keys if key in facts}}


def _start(case: Case, base: Path, folder: Path) -> Path:
    """The folder that a run of this way starts from, made by the ordinary import; PEFT's settings are a dense run's."""
    kind = ("dense",) if case.method in ("full", "peft") else ("additive", "--rank", case.rank)
    start = folder / ("start_dense" if len(kind) == 1 else f"start_rank_{case.rank}")
    if not start.is_dir():
        _tool("import_huggingface", "--input", base, "--output", start, "--parametrization", *kind)
    return start


def _sections(case: Case, start: Path, steps: int) -> dict[str, Any]:
    imported = read_settings(start / "training.yaml")
    sections = {key: imported[key] for key in ("model", "checkpoint")}
    if case.method in ("full", "peft"):
        return sections
    model = sections["model"] | {"trained": "factors"}
    return {**sections, "model": model, "rank": rank_section(case, model, steps)}


def rank_section(case: Case, model: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """Ranks of a run that starts at `case.rank`."""
    rank: dict[str, Any] = {"initial": case.rank, "quantum": FIRST_RANK, "policy": case.policy}
    if case.policy == "schedule":
        rank["schedule"] = [{"step": round(share * steps), "rank": to} for share, to in GROWTH["schedule"]["schedule"]]
    elif case.policy != "fixed":
        shares = {key: round(GROWTH[case.policy][key] * steps) for key in ("check_every", "stop_step")}
        rank |= {**GROWTH[case.policy], **shares, "budget": _budget(model)}
    return rank


def _budget(model: Mapping[str, Any]) -> float:
    """What factors of `LAST_RANK` in every layer cost, as a share of the dense weights."""
    settings = {"model": model, "rank": {"initial": LAST_RANK}, "data": {"prefix": "-", "tokenizer": "-"}}
    config = parse_config(settings)
    dense = linear_parameters(config.model, {})
    return (linear_parameters(config.model, config.initial_ranks()) - dense) / dense


def _tool(name: str, *arguments: object) -> None:
    command = [sys.executable, str(ROOT / "tools" / f"{name}.py"), *map(str, arguments)]
    status = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False).returncode
    if status:
        raise EspalierError(f"tools/{name}.py ended with exit code {status}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare ways to adapt a pretrained model to another text.")
    parser.add_argument(
        "--corpus-from", nargs="+", required=True, help="text to pretrain on (as tools/preprocess_corpus.py)"
    )
    parser.add_argument("--adapt-to", nargs="+", required=True, help="text to adapt to")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for corpora and runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures as JSON")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw loss against trained parameters")
    parser.add_argument("--page", type=Path, metavar="FILE", help="put the figures into this page, between its marks")
    parser.add_argument("--base-steps", type=int, default=800, help="steps of the pretraining (800)")
    parser.add_argument("--steps", type=int, default=240, help="steps of every adaptation (240)")
    parser.add_argument("--threads", type=int, default=1, help="of every run (1)")
    arguments = parser.parse_args()
    for flag, fewest in (("base_steps", 20), ("steps", 20), ("threads", 1)):
        if getattr(arguments, flag) < fewest:
            raise ConfigError(f"--{flag.replace('_', '-')} is {getattr(arguments, flag)}: set it to {fewest} or more")
    return arguments


if __name__ == "__main__":
    run_command(main)
