"""A run of the real trainer on random tokens whose ranks grow, with a clock on the phases of every event.

The phases are those of `pretrain/growth/augmentation.py`, told apart where its functions begin and end:

    measure → decide → verify (logits before) → new factors (rows) → stash → tear down → new factors → rebuild →
    restore → verify → release
"""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import accumulate
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from model.config import ModelConfig
from pretrain.config.run import parse_config
from pretrain.data.corpus import Corpus
from pretrain.growth import augmentation, rank_control
from pretrain.trainer import Trainer
from tools.benchmarks.step_report import synchronize

_PHASES = (
    (rank_control, "plan_growth", "decide", None),
    (augmentation, "_fixed_batch_logits", "verify", None),
    (augmentation, "_refuse_non_finite", "verify", "stash"),
    (augmentation, "_factor_changes", "new factors", None),
    (augmentation, "tear_down", "tear down", "new factors"),
    (augmentation, "release_free_memory", "release", None),
)
"""Module, function, the phase it is, and the phase that follows; None: the one before goes on."""
PHASES = ("measure", "decide", "verify", "stash", "tear down", "new factors", "rebuild", "restore", "release")


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


@contextmanager
def watched(clock: PhaseClock, owner: Any, name: str, phase: str, following: str | None) -> Iterator[None]:
    """Calls of `owner.name` are `phase`; then comes `following`, or goes on what was before."""
    original = getattr(owner, name)

    def timed(*arguments: Any, **named: Any) -> Any:
        before = clock.phase
        clock.switch(phase)
        try:
            return original(*arguments, **named)
        finally:
            clock.switch(following or before)

    setattr(owner, name, timed)
    try:
        yield
    finally:
        setattr(owner, name, original)


@contextmanager
def watched_events(clock: PhaseClock, trainer: Trainer) -> Iterator[None]:
    """The clock tells the phases of `trainer.decide_if_due` apart, once it was switched to "measure"."""
    with ExitStack() as stack:
        for owner, name, phase, following in _PHASES:
            stack.enter_context(watched(clock, owner, name, phase, following))
        stack.enter_context(watched(clock, trainer, "_new_engine", "rebuild", "restore"))
        yield


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
    """Of a run on random tokens with so many steps before, between and behind its events, in which ranks grow by half
    of the first one; `arguments` are those of `tools/benchmarks/augmentation.py`."""
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
                "events": [{"step": end, "rank": first + added * number} for number, end in enumerate(ends[:-1], 1)],
            },
            "data": {"prefix": "random", "tokenizer": "none"},
            "deepspeed": {"stage": stage},
        }
    )
    # Nothing is validated and no checkpoint written: nobody asks for the tokenizer, nor what the corpus is.
    corpus = Corpus(_RandomText(config.model), {}, tokenizer=cast(Any, None), fingerprint="random")
    return Trainer(config, config.layout(processes), corpus, None)
