"""Micro-batches that are read ahead are those that were asked for, in their order, with their errors."""

import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from model.process_groups import initialize_process_groups
from pretrain.config.run import TrainConfig
from pretrain.data.corpus import BATCH_KEYS, batch_at
from pretrain.data.prefetch import AHEAD, Prefetch, training_starts
from pretrain.errors import DataError
from pretrain.schedule import samples_before
from tests.support.distributed import run


class Numbers:
    """A dataset whose sample `index` is filled with its own number."""

    def __init__(self, damaged: int | None = None) -> None:
        self.damaged, self.threads, self.read = damaged, set[str](), list[int]()

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        self.threads.add(threading.current_thread().name)
        self.read.append(index)
        if index == self.damaged:
            raise DataError(f"sample {index} is damaged: write the corpus anew")
        return {key: torch.full((4,), index) for key in BATCH_KEYS}


def test_batches_come_in_order_from_another_thread() -> None:
    dataset, starts = Numbers(), [0, 3, 6, 30]
    batches = Prefetch(dataset, 3, iter(starts))
    try:
        taken = [batches.take() for _ in starts]
    finally:
        batches.close()
    for batch, start in zip(taken, starts, strict=True):
        expected = batch_at(Numbers(), start, 3)
        assert batch.keys() == expected.keys()
        assert all(torch.equal(batch[key], expected[key]) for key in BATCH_KEYS)
    assert threading.current_thread().name not in dataset.threads
    assert not [one for one in threading.enumerate() if one.name.startswith("batches")]


def test_no_more_is_read_than_is_due() -> None:
    dataset = Numbers()
    batches = Prefetch(dataset, 1, iter(range(100)))
    batches.take()
    batches.close()
    assert len(dataset.read) <= 1 + AHEAD


def test_an_error_is_raised_where_its_batch_is_taken() -> None:
    batches = Prefetch(Numbers(damaged=3), 2, iter([0, 2, 4]))
    try:
        assert batches.take()["tokens"][:, 0].tolist() == [0, 1]
        with pytest.raises(DataError, match=r"^sample 3 is damaged: write the corpus anew$"):
            batches.take()
    finally:
        batches.close()


def _starts(settings: dict[str, Any], step: int, consumed: int) -> list[int]:
    initialize_process_groups(1)
    return list(training_starts(TrainConfig(**settings), step, consumed))


def test_samples_are_those_of_all_steps_to_come() -> None:
    """The samples go through a batch ramp, and after a rollback begin with others than those of the step."""
    ramp = {"start": 4, "increment": 4, "steps": 4}
    settings = {"micro_batch": 2, "global_batch": 12, "steps": 6, "batch_ramp": ramp}
    train = TrainConfig(**settings)
    for step, consumed in ((0, 0), (3, 100)):
        shares = run(_starts, 2, settings, step, consumed)
        samples = sorted(start + offset for share in shares for start in share for offset in range(2))
        due = samples_before(6, 12, train.batch_ramp) - samples_before(step, 12, train.batch_ramp)
        assert samples == list(range(consumed, consumed + due))
        assert all(share == sorted(share) for share in shares)
        assert len(shares[0]) == len(shares[1])
