"""Models as transformers saves them, and their import."""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from pretrain.convert.consolidated import ConsolidatedModel
from tests.support.consolidated_folder import small_tokenizer
from tests.support.huggingface_models import Maker, save_random
from tools import import_huggingface


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def saved(tokenizer_path: Path, tmp_path: Path) -> Maker:
    """Saves a random model as transformers does, with a tokenizer beside it."""
    return partial(save_random, tmp_path, tokenizer_path)


@pytest.fixture
def imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., ConsolidatedModel]:
    """Runs the tool as its command line does."""

    def call(source: Path, parametrization: str, *flags: object) -> ConsolidatedModel:
        output = tmp_path / "starts" / parametrization
        arguments = ["--input", source, "--output", output, "--parametrization", parametrization, *flags]
        monkeypatch.setattr(sys, "argv", ["import_huggingface.py", *map(str, arguments)])
        import_huggingface.main()
        return ConsolidatedModel(output)

    return call
