"""The run that faults happen to, and the same one left alone."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.fault_runs import train
from tests.support.training_runs import make_corpus, write_config

EVERY = 3
"""Steps between saves, of the 12 of the run; ranks grow after 4 and 8 (`tests/support/training_runs.py`)."""


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus, and a config of a run of `STEPS` steps."""
    folder = tmp_path_factory.mktemp("faults")
    make_corpus(folder / "corpus")
    return folder


@pytest.fixture
def config(folder: Path, tmp_path: Path) -> Path:
    checkpoint = {"every": EVERY, "keep": 20}
    return write_config(tmp_path / "run.yaml", folder / "corpus", tmp_path / "run", checkpoint=checkpoint)


@pytest.fixture(scope="session")
def undisturbed(folder: Path) -> Iterator[Path]:
    """The folder of a run that nothing happens to."""
    checkpoint = {"every": EVERY, "keep": 20}
    config = write_config(folder / "run.yaml", folder / "corpus", folder / "undisturbed", checkpoint=checkpoint)
    assert train(config).codes == [0, 0]
    yield folder / "undisturbed"
    shutil.rmtree(folder / "undisturbed")
