"""Everything that touches a checkpoint, within a limit of memory that the dense form would break."""

import json
import os
import sys
from pathlib import Path

import pytest

from pretrain.errors import ConfigError
from tests.support.training_runs import make_corpus
from tools.benchmarks import memory_limit

LARGE = [
    *("model.hidden=2048", "model.layers=24", "model.heads=16", "model.query_groups=16", "model.sequence_length=64"),
    *("train.micro_batch=1", "train.global_batch=2", "data.split=80,20,0"),
    *("rank.policy=fixed", "rank.schedule=[]", "rank.initial=16"),
]


def measure(monkeypatch: pytest.MonkeyPatch, folder: Path, limit: str, *overrides: str) -> None:
    make_corpus(folder / "corpus")
    data = [f"data.prefix={folder / 'corpus/corpus'}", f"data.tokenizer={folder / 'corpus/tokenizer.model'}"]
    options = ["--config", "quickstart", "--out", str(folder / "out"), "--limit", limit]
    monkeypatch.setattr(sys, "argv", ["benchmark", *options, "--json", str(folder / "rows.json"), *data, *overrides])
    memory_limit.main()


def test_a_limit_that_shows_nothing_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="shows nothing"):
        measure(monkeypatch, tmp_path, "3GB")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can limit memory")
def test_all_of_it_fits_where_the_dense_form_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure(monkeypatch, tmp_path, "3GB", *LARGE)
    facts = json.loads((tmp_path / "rows.json").read_text())
    assert facts["dense_bytes"] > facts["limit_bytes"]
    rows = {row["what"]: row for row in facts["rows"]}
    for row in rows.values():
        assert row["peak_bytes"] < facts["limit_bytes"]
        assert row.get("above_bytes", 0) < 2 * 2 * facts["largest_parameter_bytes"]  # of two processes together
    assert rows["densify"]["peak_bytes"] < facts["dense_bytes"] / 4
