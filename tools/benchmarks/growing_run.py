"""A run of the real trainer on random tokens whose ranks grow, with a clock on the phases of every event.

decide      spectra and the policy
take down   logits of a fixed batch, new factors, the stash, the end of the old engine
rebuild     the new engine
put back    masters and moments, and the check of the logits
"""

import argparse
import time
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, cast

import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor

from model.config import ModelConfig
from model.gpt import EspalierModel
from pretrain.config.run import parse_config
from pretrain.data.corpus import Corpus
from pretrain.engine.build import build_engine
from pretrain.engine.deepspeed_config import deepspeed_dict
from pretrain.growth.event import change_ranks
from pretrain.trainer import Trainer
from tools.benchmarks.step_report import synchronize

PHASES = ("decide", "take down", "rebuild", "put back")


class PhaseClock:
    """Adds up seconds by phase; `observe(phase)` is called at the end of each, outside the time."""

    def __init__(self, observe: Callable[[str], None] | None = None) -> None:
        self.seconds: dict[str, float] = {}
        self.phase: str | None = None
        self._observe = observe
        self._since = time.perf_counter()

    def switch(self, phase: str | None) -> None:
        """Ends the present phase, if there is one, and begins another, if it is one."""
        synchronize()  # what a phase started on a device is part of it
        if self.phase is not None:
            spent = time.perf_counter() - self._since
            self.seconds[self.phase] = self.seconds.get(self.phase, 0.0) + spent
            if self._observe is not None:
                self._observe(self.phase)
        self.phase, self._since = phase, time.perf_counter()

    def taken(self) -> dict[str, float]:
        """Seconds by phase since the last call."""
        taken, self.seconds = self.seconds, {}
        return taken


def run_event(trainer: Trainer, clock: PhaseClock) -> None:
    """The event that is due, as `Trainer.decide_if_due` carries it out, with every phase on the clock; a collective."""
    clock.switch("decide")
    answer = trainer.rank_control.ask(trainer.model, trainer.state)
    if answer.plan is None:
        raise AssertionError(f"the schedule has no entry after step {trainer.state.step}")
    config = trainer.config

    def rebuild(model: EspalierModel) -> DeepSpeedEngine:
        clock.switch("rebuild")
        settings = deepspeed_dict(config, trainer.layout)
        engine = build_engine(model, config.optimizer, settings, compiled=config.train.compile)
        clock.switch("put back")
        return engine

    clock.switch("take down")
    trainer.engine, record = change_ranks(
        trainer.engine,
        answer.plan,
        rebuild=rebuild,
        seed=config.run.seed,
        consumed_samples=trainer.state.consumed_samples,
        directions=answer.directions,
    )
    clock.switch(None)
    trainer.state.growth.append(record)


class _RandomText:
    """Samples as `GPTDataset` gives them, of random tokens."""

    def __init__(self, config: ModelConfig) -> None:
        self._config = config

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        length = self._config.sequence_length
        generator = torch.Generator().manual_seed(index)
        text = torch.randint(0, self._config.vocabulary, (length + 1,), generator=generator)
        return {
            "tokens": text[:-1],
            "labels": text[1:],
            "loss_mask": torch.ones(length),
            "position_ids": torch.arange(length),
        }


def growing_trainer(arguments: argparse.Namespace, stage: int, steps: Sequence[int]) -> Trainer:
    """The trainer of a run on random tokens. `steps` are counts before, between and behind its events, and every event
    raises the ranks by half of the first one. `arguments` are those of `tools/benchmarks/growth.py`."""
    processes = dist.get_world_size()
    first, added = arguments.first_rank, max(1, arguments.first_rank // 2)
    ends = list(accumulate(steps))
    config = parse_config(
        {
            "model": {
                "layers": arguments.layers,
                "hidden": arguments.width,
                "heads": arguments.width // 64,
                "sequence_length": arguments.sequence,
                "vocabulary": arguments.vocabulary,
            },
            "parallel": {"tensor": arguments.tensor},
            "train": {
                "steps": ends[-1],
                "micro_batch": arguments.batch,
                "global_batch": arguments.batch * processes // arguments.tensor,
                "precision": arguments.precision if stage else "fp32",
                "validate_every": 0,
                "validation_sequences": 0,
            },
            "schedule": {"shape": "constant"},
            "rank": {
                "policy": "schedule",
                "initial": first,
                "quantum": added,
                "schedule": [{"step": end, "rank": first + added * number} for number, end in enumerate(ends[:-1], 1)],
            },
            "data": {"prefix": "random", "tokenizer": "none"},
            "deepspeed": {"stage": stage},
        }
    )
    # Nothing is validated and no checkpoint written: nobody asks for the tokenizer, nor what the corpus is.
    corpus = Corpus(_RandomText(config.model), {}, tokenizer=cast(Any, None), fingerprint="random")
    return Trainer(config, config.parallel_layout(processes), corpus, None)
