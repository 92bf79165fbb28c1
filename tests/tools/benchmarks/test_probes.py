"""The probe benchmark: its arithmetic by hand, and one short run of it through the real trainer."""

import json
import sys
from pathlib import Path

import pytest

from pretrain.disk import JsonLines
from tests.support.training_runs import make_corpus, write_config
from tools.benchmarks import probes
from tools.benchmarks.probes import CHECK_EVERY, costs


def test_cost_is_what_the_decisions_of_the_run_took(tmp_path: Path) -> None:
    metrics, events = JsonLines(tmp_path / "metrics.jsonl"), JsonLines(tmp_path / "events.jsonl")
    for step in range(1, 4 * CHECK_EVERY + 1):
        warm_up = step <= 2 * CHECK_EVERY
        metrics.append({"step": step, "step_seconds": 9.0 if warm_up else 8.0 if -step % CHECK_EVERY < 3 else 1.0})
        if step % CHECK_EVERY == 0:
            events.append({"step": step, "event": "decision", "seconds": 9.0 if warm_up else 0.5})
    found = costs(tmp_path, 1 / 100)
    assert (found["plain_step_seconds"], found["decision_seconds"]) == (1.0, 0.5)
    assert found["decisions"] == 2
    assert found["share_of_training_time"] == pytest.approx(0.5 / 100)


@pytest.mark.slow
def test_benchmark_measures_a_real_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_corpus(tmp_path / "corpus")
    config = write_config(tmp_path / "run.yaml", tmp_path / "corpus", tmp_path / "unused")
    flags = ["--config", str(config), "--output", str(tmp_path), "--json", str(tmp_path / "cost.json")]
    monkeypatch.setattr(sys, "argv", ["probes.py", *flags, "--decisions", "2", "rank.probe=4"])
    probes.main()
    facts = json.loads((tmp_path / "cost.json").read_text())
    assert facts["decisions"] == 2
    assert facts["plain_step_seconds"] > 0.0
    assert "of training time" in capsys.readouterr().out
    events = JsonLines(tmp_path / "run" / "events.jsonl").read()
    assert "growth" not in {event["event"] for event in events}
