"""The used-rank benchmark: its table by hand, and two short runs of it through the real trainer."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from pretrain.errors import ConfigError
from tools.benchmarks import used_rank as tool
from tools.benchmarks.used_rank import table, used_rank


def _numbers(effective_rank: float) -> dict[str, Any]:
    return {"effective_rank": effective_rank, "energy_rank_90": 10, "energy_rank_99": 20}


def test_table_has_means_over_layers_and_seeds() -> None:
    tracked = [
        {"update": {"a": _numbers(10.0 + n), "b": _numbers(20.0 + n)}, "representation": {"layer": _numbers(5.0)}}
        for n in (0, 2)
    ]
    records = [
        {"objective": "mlm", "dropout": 0.1, "validation_loss": 4.0, "accuracy": 0.25, **used_rank(line)}
        for line in tracked
    ]
    records.append({**records[0], "objective": "causal", "accuracy": None})
    lines = list(table(records))
    assert lines[2] == (
        "| mlm | 0.1 | 4.000 ± 0.000 | 0.250 ± 0.000 | 16.0 ± 1.0 | 10.0 ± 0.0 | 20.0 ± 0.0 | 5.0 ± 0.0 |"
    )
    assert lines[3] == "| causal | 0.1 | 4.000 | – | 15.0 | 10.0 | 20.0 | 5.0 |"


@pytest.mark.slow
def test_benchmark_runs_and_keeps_finished_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    library = Path(json.__file__).parent
    flags = ["--input", str(library), "--held-out", str(library.parent / "email"), "--output", str(tmp_path / "work")]
    flags += ["--json", str(tmp_path / "used.json"), "--dropout", "0.1", "--seeds", "1", "--vocabulary", "500"]

    def call(steps: int) -> str:
        monkeypatch.setattr(sys, "argv", ["used_rank.py", *flags, "--steps", str(steps)])
        tool.main()
        return capsys.readouterr().out

    shown = call(4)
    facts = json.loads((tmp_path / "used.json").read_text())
    assert [(run["objective"], run["step"]) for run in facts["runs"]] == [("causal", 4), ("mlm", 4)]
    for record in facts["runs"]:
        assert 1.0 < record["update_effective_rank"] < 128.0
        assert 0 < record["update_rank_90"] < record["update_rank_99"] <= 128
        assert 1.0 < record["representation_effective_rank"] < 128.0
        assert len(record["curve"]) == 3
    assert facts["runs"][0]["accuracy"] is None
    assert 0.0 <= facts["runs"][1]["accuracy"] <= 1.0
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").glob("*/summary.json")}
    assert len(written) == 2
    again = call(4)
    assert again.splitlines()[-4:] == shown.splitlines()[-4:]
    assert {path: path.stat().st_mtime_ns for path in written} == written
    with pytest.raises(ConfigError, match="holds a run with other settings: name another --output"):
        call(8)
