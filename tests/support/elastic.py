"""Runs that change their layout: what worker processes do in them, and what is compared."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest.mock import patch

import pytest
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor

from model.process_groups import data_index
from pretrain.config.run import load_config
from pretrain.data.corpus import batch_at
from pretrain.engine.optimizer_state import optimizer_state
from pretrain.engine.zero3 import gathered
from pretrain.train import run_training
from tests.support import distributed
from tests.support.parallel_engine import whole_states
from tests.support.parallel_model import gather_logical

MOST_PROCESSES = 16
COMPUTING = "parameter"
"""Beside `KEYS`: the parameters that compute, which in fp32 are the masters to the bit."""

States = dict[str, dict[str, Tensor]]
"""Whole tensors by key and parameter."""


@dataclass(frozen=True)
class Place:
    """A layout that a run may have."""

    tensor: int
    data: int
    stage: int

    @property
    def processes(self) -> int:
        return self.tensor * self.data

    @property
    def settings(self) -> list[str]:
        return [f"parallel.tensor={self.tensor}", f"deepspeed.stage={self.stage}"]

    def __str__(self) -> str:
        return f"tp{self.tensor}-dp{self.data}-zero{self.stage}"


PLACES = [
    Place(tensor, data, stage)
    for tensor, data in sorted(((t, d) for t in (1, 2, 4) for d in (1, 2, 4)), key=lambda sizes: sizes[0] * sizes[1])
    for stage in (0, 1, 2, 3)
]


@contextmanager
def many_processes() -> Iterator[None]:
    """Inside it `run` takes as many processes as the largest of `PLACES` has; a pool that has grown does not stay."""
    usual = distributed.POOL_SIZE
    with pytest.MonkeyPatch.context() as changed:
        changed.setattr(distributed, "POOL_SIZE", MOST_PROCESSES)
        yield
    if distributed._pool is not None and len(distributed._pool.process_ids) > usual:
        distributed.close_pool()


@dataclass(frozen=True)
class Found:
    """What one process finds in a run."""

    states: States
    ranks: dict[str, int]
    adam_step: float


def train_and_look(config: str, overrides: list[str]) -> Found:
    """A whole run, and the state it ends in."""
    trainer = run_training(load_config(config, overrides), dist.get_world_size())
    assert trainer is not None
    return _look(trainer.engine)


def resume_and_look(config: str, overrides: list[str]) -> Found:
    """A run up to where its first step would begin, and the state it has there."""
    with patch("pretrain.train.train"):
        return train_and_look(config, overrides)


def _look(engine: DeepSpeedEngine) -> Found:
    model = engine.module
    shards = whole_states(engine)
    for name, parameter in model.named_parameters():
        with gathered([parameter]):
            values = parameter.detach().clone()
        shards.setdefault(name, {"master": values})[COMPUTING] = values
    keys = {key for states in shards.values() for key in states}
    states = {key: gather_logical(model, {n: s[key] for n, s in shards.items() if key in s}) for key in sorted(keys)}
    return Found(states, model.ranks(), optimizer_state(engine).counters()["adam_step"])


def train_and_note_samples(config: str, overrides: list[str]) -> tuple[int, list[int]]:
    """A whole run: this process's data-parallel index, and the training samples it took, in order."""
    with patch("pretrain.data.prefetch.batch_at", wraps=batch_at) as reading:
        trainer = run_training(load_config(config, overrides), dist.get_world_size())
    assert trainer is not None
    calls = [call.args for call in reading.call_args_list]
    assert all(dataset is trainer.corpus.train for dataset, _, _ in calls)
    return data_index(), [first + sample for _, first, count in calls for sample in range(count)]
