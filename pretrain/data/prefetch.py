"""Reads micro-batches in a thread, ahead of the step that takes them, and copies them to the device without a wait.

The thread reads and collates while the main thread launches kernels or waits for the device. It reads exactly the
micro-batches that the run takes, in their order. An error in the thread is raised where the micro-batch is taken. The
host does not wait for a copy from pinned memory: torch's allocator of pinned memory hands a block out anew only when
the copies that were launched from it have finished.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from torch import Tensor

from model.process_groups import data_index, data_size, device
from pretrain.config.run import TrainConfig
from pretrain.data.corpus import batch_at, micro_batch_start
from pretrain.schedule import global_batch_at

AHEAD = 2
"""Micro-batches that are read ahead."""

Batch = dict[str, Tensor]


class Prefetch:
    """The micro-batches of one dataset whose first samples are `starts`, in this order."""

    def __init__(self, dataset: Any, micro_batch: int, starts: Iterator[int]) -> None:
        self._dataset, self._micro_batch, self._starts = dataset, micro_batch, starts
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self._coming: deque[Future[Batch]] = deque()

    def take(self) -> Batch:
        """The next micro-batch, on the host."""
        while len(self._coming) <= AHEAD and (start := next(self._starts, None)) is not None:
            self._coming.append(self._reader.submit(batch_at, self._dataset, start, self._micro_batch))
        return self._coming.popleft().result()

    def close(self) -> None:
        """Ends the thread."""
        self._reader.shutdown(cancel_futures=True)


def training_starts(train: TrainConfig, step: int, consumed_samples: int) -> Iterator[int]:
    """First samples of this process's micro-batches from training step `step` to the end of the run;
    `consumed_samples`: those taken before."""
    for at in range(step, train.steps):
        sequences = global_batch_at(at, train.global_batch, train.batch_ramp)
        for micro_step in range(sequences // (train.micro_batch * data_size())):
            yield micro_batch_start(consumed_samples, micro_step, train.micro_batch, data_index(), data_size())
        consumed_samples += sequences


def on_device(batch: Batch) -> Batch:
    """The batch on the device on which this process computes."""
    if device().type == "cpu":
        return batch
    return {key: values.pin_memory().to(device(), non_blocking=True) for key, values in batch.items()}
