"""Ends the pool of worker processes with the session; see `tests/distributed.py`."""

from collections.abc import Iterator

import pytest

from tests.distributed import WorkerPool, close_pool
from tests.support.pretending import ENVIRONMENT


@pytest.fixture(scope="session", autouse=True)
def _worker_pool() -> Iterator[None]:
    yield
    close_pool()


@pytest.fixture(scope="session")
def pretending() -> Iterator[WorkerPool]:
    """Workers that may enter a `PretendedCuda`."""
    pool = WorkerPool(ENVIRONMENT)
    yield pool
    pool.kill()
