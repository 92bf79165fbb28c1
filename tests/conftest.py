"""Ends the pool of worker processes with the session; see `tests/distributed.py`."""

from collections.abc import Iterator

import pytest

from tests.distributed import close_pool


@pytest.fixture(scope="session", autouse=True)
def _worker_pool() -> Iterator[None]:
    yield
    close_pool()
