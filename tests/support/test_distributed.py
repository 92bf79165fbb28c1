"""The pool itself: one set of workers serves any number of processes in turn, and failures reach the test."""

import os
import signal
import time

import deepspeed
import pytest
import torch
import torch.distributed as dist
from torch import nn

from model.process_groups import DeepSpeedProcessGroups, initialize_process_groups
from pretrain.errors import ConfigError
from tests.support import distributed
from tests.support.distributed import WorkerLostError, WorkerTracebackError, run, run_alone
from tests.support.worker import WorkerError


def describe(greeting: str, *, sign: str) -> tuple[str, int, int, int]:
    places = torch.tensor([dist.get_rank()])
    dist.all_reduce(places)
    return greeting + sign, os.getpid(), dist.get_rank(), int(places)


def train(tensor_parallel: int) -> tuple[float, int, int]:
    """Two steps of ZeRO 1: the last loss, the data-parallel size DeepSpeed believes in, the size of its partition."""
    initialize_process_groups(tensor_parallel)
    torch.manual_seed(0)
    model = nn.Linear(8, 8)
    engine, *_ = deepspeed.initialize(
        model=model,
        mpu=DeepSpeedProcessGroups,
        config={
            "train_micro_batch_size_per_gpu": 1,
            "optimizer": {"type": "AdamW", "params": {"lr": 0.1, "torch_adam": True}},
            "zero_optimization": {"stage": 1},
        },
    )
    for _ in range(2):
        loss = engine(torch.ones(1, 8)).square().mean()
        engine.backward(loss)
        engine.step()
    partition = engine.optimizer.single_partition_of_fp32_groups[0]
    return loss.item(), engine.dp_world_size, partition.numel()


def refuse() -> None:
    if dist.get_rank() == 1:
        raise ConfigError("1 is not a good place")
    dist.barrier()


class UnpicklableError(Exception):
    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def raise_unpicklable() -> None:
    raise UnpicklableError(1, 2)


def die_at(place: int) -> None:
    if dist.get_rank() == place:
        os.kill(os.getpid(), signal.SIGKILL)


def hang_at(place: int) -> None:
    if dist.get_rank() == place:
        time.sleep(600)


def leave_traces() -> None:
    os.environ["ESPALIER_TRACE"] = "1"
    os.chdir("/")
    torch.rand(1)


def look_for_traces() -> tuple[bool, str, float]:
    return "ESPALIER_TRACE" in os.environ, os.getcwd(), float(torch.rand(1))


def test_calls_on_all_processes_and_keeps_the_workers():
    first = run(describe, 2, "hello", sign="!")
    second = run(describe, 2, "hello", sign="?")
    assert [(text, place, total) for text, _, place, total in first] == [("hello!", 0, 1), ("hello!", 1, 1)]
    assert len({process for _, process, _, _ in first} | {os.getpid()}) == 3
    assert [process for _, process, _, _ in first] == [process for _, process, _, _ in second]


def test_deepspeed_and_megatron_follow_the_number_of_processes():
    """72 parameters of fp32, split over the data-parallel processes; the loss does not depend on how."""
    losses = set()
    for processes, tensor_parallel in ((1, 1), (2, 1), (4, 1), (4, 2), (2, 2)):
        data_parallel = processes // tensor_parallel
        results = run(train, processes, tensor_parallel)
        assert [size for _, size, _ in results] == [data_parallel] * processes
        assert [elements for _, _, elements in results] == [72 // data_parallel] * processes
        losses |= {round(loss, 5) for loss, _, _ in results}
    assert len(losses) == 1


def test_an_exception_arrives_with_its_type_and_traceback_and_the_workers_stay():
    workers = run(os.getpid, 2)
    with pytest.raises(ConfigError, match="1 is not a good place") as caught:
        run(refuse, 2)
    assert isinstance(caught.value.__cause__, WorkerTracebackError)
    assert "process 1 of 2" in str(caught.value.__cause__)
    assert "in refuse" in str(caught.value.__cause__)
    assert run(os.getpid, 2) == workers


def test_an_exception_that_cannot_be_pickled_arrives_as_text():
    with pytest.raises(WorkerError, match="UnpicklableError: 1 and 2"):
        run(raise_unpicklable, 1)


def test_a_task_starts_from_the_same_surroundings():
    before = run(look_for_traces, 1)
    run(leave_traces, 1)
    assert run(look_for_traces, 1) == before
    assert before[0][0] is False


def test_more_processes_than_the_pool_holds_are_refused():
    with pytest.raises(ValueError, match="1 to 4 processes, not on 5"):
        run(os.getpid, 5)


@pytest.mark.faults
def test_a_lost_worker_is_named_and_replaced():
    workers = run(os.getpid, 2)
    with pytest.raises(WorkerLostError, match="process 1 of 2 was killed by SIGKILL"):
        run(die_at, 2, 1)
    replaced = run(os.getpid, 2)
    assert not set(workers) & set(replaced)
    with pytest.raises(WorkerLostError, match="process 0 of 2 hung: no answer within 2 s"):
        run(hang_at, 2, 0, timeout_seconds=2)
    assert distributed._pool is not None
    assert distributed._pool.process_ids == []


@pytest.mark.faults
def test_fresh_processes_give_their_exit_codes():
    assert run_alone(die_at, 2, 1) == [0, -signal.SIGKILL]
