"""Whole training runs on small corpora, in worker processes and through the launcher."""

import json
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import yaml
from torch import Tensor

from model.process_groups import tensor_group, tensor_size
from pretrain.config.run import load_config
from pretrain.growth.event import change_ranks
from pretrain.tokenizer.sentencepiece import SentencePieceTokenizer
from pretrain.train import run_training
from pretrain.trainer import Trainer
from tests.support.distributed import run
from tests.support.parallel_engine import RELEASING, allow_fp16_on_cpu
from tests.support.parallel_model import positions_of
from tools.corpus.documents import find_files
from tools.preprocess_corpus import preprocess
from tools.train_tokenizer import train_tokenizer, write_tokenizer

ROOT = Path(__file__).resolve().parents[2]
LAUNCHED = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
"""Variables of a run in processes of its own."""
SMALL: dict[str, dict[str, Any]] = {
    "model": {"layers": 2, "hidden": 32, "heads": 4, "sequence_length": 32},
    "train": {"steps": 12, "micro_batch": 4, "global_batch": 8, "log_every": 1, "validate_every": 0},
    "optimizer": {"learning_rate": 3e-3},
    "rank": {
        "policy": "schedule",
        "initial": 4,
        "quantum": 2,
        "schedule": [{"step": 4, "rank": 6}, {"step": 8, "rank": 10}],
    },
    "checkpoint": {"every": 0, "keep": 20},
}


def make_corpus(folder: Path, *, mask_token: bool = False) -> None:
    """`folder/corpus` and `folder/tokenizer.model`: some modules of the standard library."""
    text = folder / "text"
    text.mkdir(parents=True)
    for module in ("ast", "argparse", "bisect", "calendar", "dis", "enum", "heapq", "inspect", "json", "string"):
        source = Path(__import__(module).__file__ or "")
        (text / f"{module}.py").write_bytes(source.read_bytes())
    files = find_files([str(text)])
    write_tokenizer(train_tokenizer(files, vocabulary=500, mask_token=mask_token), folder / "tokenizer.model")
    preprocess(files, folder / "corpus", folder / "tokenizer.model")


def write_config(path: Path, corpus: Path, folder: Path, **sections: dict[str, Any]) -> Path:
    """A YAML config: the small run with `sections` laid over it."""
    settings: dict[str, dict[str, Any]] = {
        **{name: {**SMALL.get(name, {}), **sections.get(name, {})} for name in {*SMALL, *sections}},
    }
    defaults = {"prefix": str(corpus / "corpus"), "tokenizer": str(corpus / "tokenizer.model"), "split": "80,20,0"}
    settings["data"] = {**defaults, **sections.get("data", {})}
    settings["run"] = {"folder": str(folder), **sections.get("run", {})}
    path.write_text(yaml.safe_dump(settings))
    return path


def releasing(path: Path) -> Path:
    """A DeepSpeed config with which ZeRO 3 releases parameters after use, and fetches others ahead."""
    path.write_text(json.dumps({"zero_optimization": RELEASING | {"stage3_prefetch_bucket_size": 2000}}))
    return path


def train_in_workers(config: str, overrides: list[str]) -> None:
    """A whole run in a worker."""
    allow_fp16_on_cpu()
    run_training(load_config(config, overrides), dist.get_world_size())


def train_and_lose_a_file(config: str, overrides: list[str], file: str) -> None:
    """A whole run in a worker; `file` is gone when ranks first grow."""

    def change_ranks_without_it(*arguments: Any, **settings: Any) -> Any:
        Path(file).unlink(missing_ok=True)
        return change_ranks(*arguments, **settings)

    with patch("pretrain.trainer.change_ranks", change_ranks_without_it):
        train_in_workers(config, overrides)


def train_and_count_tokenizers(config: str, overrides: list[str]) -> tuple[int, int]:
    """A whole run in a worker: how often a tokenizer was opened, and how often all of its tokens were measured."""
    opened, measured = SentencePieceTokenizer.__init__, SentencePieceTokenizer.byte_lengths
    with (
        patch.object(SentencePieceTokenizer, "__init__", autospec=True, side_effect=opened) as opening,
        patch.object(SentencePieceTokenizer, "byte_lengths", autospec=True, side_effect=measured) as measuring,
    ):
        train_in_workers(config, overrides)
    return opening.call_count, measuring.call_count


def train_and_probe(config: str, overrides: list[str], new_tokens: int) -> tuple[Tensor, list[int]]:
    """A whole run, and then what the trained model says: logits `(1, seq, padded vocabulary)` of a fixed text, and its
    greedy continuation of the first half of it."""
    trainer = run_training(load_config(config, overrides), dist.get_world_size())
    assert trainer is not None
    trainer.engine.eval()
    tokens = probe_tokens(trainer.config.model.vocabulary, trainer.config.model.sequence_length)
    logits = _whole_logits(trainer, tokens)
    text = tokens[:, : tokens.shape[1] // 2]
    for _ in range(new_tokens):
        best = _whole_logits(trainer, text)[:, -1:, : trainer.config.model.vocabulary].argmax(-1)
        text = torch.cat([text, best], dim=1)
    return logits, text[0].tolist()


@torch.no_grad()
def _whole_logits(trainer: Trainer, tokens: Tensor) -> Tensor:
    logits = trainer.engine(tokens, positions_of(tokens), None).contiguous()
    every = [torch.empty_like(logits) for _ in range(tensor_size())]
    dist.all_gather(every, logits, group=tensor_group())
    return torch.cat(every, dim=-1)


def probe_tokens(vocabulary: int, length: int) -> Tensor:
    return torch.randint(0, vocabulary, (1, length), generator=torch.Generator().manual_seed(9))


def curve(folder: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl` without the times."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timed = ("seconds", "per_second")
    return [{key: value for key, value in line.items() if not key.endswith(timed)} for line in lines]


def train(corpus: Path, folder: Path, processes: int, *overrides: str, **sections: dict[str, Any]) -> Path:
    """Trains in workers; the run's folder."""
    config = write_config(folder.with_suffix(".yaml"), corpus, folder, **sections)
    if "deepspeed.stage=3" in overrides:
        overrides += (f"deepspeed.config={releasing(folder.with_suffix('.json'))}",)
    run(train_in_workers, processes, str(config), list(overrides))
    return folder


def twenty_steps(family: str, parametrization: str, factored_layers: str) -> dict[str, dict[str, Any]]:
    """Sections of a run of 20 steps with two growth events, of a variant."""
    sections: dict[str, dict[str, Any]] = {
        "model": {"family": family, "parametrization": parametrization, "factored_layers": factored_layers},
        "train": {"steps": 20},
        "optimizer": {"learning_rate": 1e-3},
    }
    if parametrization == "dense":
        sections["rank"] = {"policy": "fixed", "schedule": []}
    return sections


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    """The records of one kind in `events.jsonl`."""
    lines = map(json.loads, (folder / "events.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == kind]


def cut_back(folder: Path, copy: Path, step: int) -> None:
    """What a kill after the checkpoint of `step` leaves: nothing later, `latest` pointing at what is gone."""
    shutil.copytree(folder, copy)
    for checkpoint in (copy / "checkpoints").glob("step_*"):
        if int(checkpoint.name.removeprefix("step_")) > step:
            shutil.rmtree(checkpoint)
