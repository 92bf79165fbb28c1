"""What processes agree on is the same everywhere, and counts everything once."""

import math
import signal

import pytest
import torch
import torch.distributed as dist

from model.process_groups import data_index, initialize_process_groups
from pretrain.agreement import Agreement, Flags, agree
from tests.support.distributed import run


def _agreed(tensor: int, losses: list[float], flags: list[Flags]) -> Agreement:
    initialize_process_groups(tensor)
    process = dist.get_rank()
    return agree(torch.tensor(losses[data_index()]), torch.tensor(10.0**process, dtype=torch.float64), flags[process])


@pytest.mark.parametrize(("tensor", "loss"), [(1, 2.75), (2, 2.5)])
def test_each_loss_counts_once_and_each_share_of_the_norm(tensor: int, loss: float) -> None:
    found = run(_agreed, 2, tensor, [2.5, 0.25], [Flags(), Flags()])
    assert found == [Agreement(loss, 11.0, Flags())] * 2


@pytest.mark.parametrize(
    ("flags", "agreed"),
    [
        ([Flags(signal.SIGUSR1), Flags(0, writing=True)], Flags(signal.SIGUSR1, writing=True)),
        ([Flags(signal.SIGUSR1, writing=True), Flags(signal.SIGTERM, writing=True)], Flags(signal.SIGTERM, True)),
    ],
    ids=str,
)
def test_what_one_knows_all_know_whatever_the_loss(flags: list[Flags], agreed: Flags) -> None:
    found = run(_agreed, 2, 1, [math.nan, 1.0], flags)
    assert all(math.isnan(one.loss) and one.squared_norm == 11.0 and one.flags == agreed for one in found)
