"""Ends the pool of worker processes with the session (see `tests/support/distributed.py`), and has Triton's interpreter
run the kernels of a GPU on a CPU: a choice that Triton makes when it is imported, in workers as well."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.distributed import WorkerPool, close_pool
from tests.support.pretending import ENVIRONMENT

os.environ["TRITON_INTERPRET"] = "1"


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


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small corpus and its tokenizer, of the module alone: runs keep an index beside a corpus."""
    from tests.support.training_runs import make_corpus  # which imports Triton, too early above

    folder = tmp_path_factory.mktemp("corpus")
    make_corpus(folder)
    return folder
