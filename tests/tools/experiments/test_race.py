"""A small race through the real training command."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.race_cases import RACE, write_race, write_text
from tools.experiments.race_plan import (
    due_runs,
    load_race,
    tuned_rate,
)
from tools.experiments.race_report import MARKER, write_report
from tools.experiments.race_results import Results
from tools.experiments.race_runs import ROOT


@pytest.mark.slow
def test_a_small_race_goes_on_after_an_interruption_and_reports(tmp_path: Path) -> None:
    rates = [1e-27, 1e-2, 1e23]  # nothing is learned, something is, and nothing is finite any more
    methods = {name: {**method, "seeds": [1], "learning_rates": rates} for name, method in RACE["methods"].items()}
    methods["growing"]["check_rates"] = [2e-2]
    config = write_race(tmp_path / "race.yaml", methods=methods)
    results = tmp_path / "docs" / "results.json"
    results.parent.mkdir()
    (results.parent / "results.md").write_text(f"# Plan\n{MARKER}\nold\n")
    command = [
        sys.executable,
        str(ROOT / "tools" / "experiments" / "race.py"),
        "--config",
        str(config),
        "--results",
        str(results),
    ]
    text = ["--work", str(tmp_path / "work"), "--text", str(write_text(tmp_path / "all.jsonl"))]

    begun = subprocess.Popen([*command, *text], cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert begun.stdout is not None
    for line in begun.stdout:
        if line.startswith("dense/lr0.01_seed1_steps4: begins"):
            break
    while not (tmp_path / "work/runs/dense/lr0.01_seed1_steps4/training/metrics.jsonl").exists():
        assert begun.poll() is None
        time.sleep(0.02)
    os.kill(begun.pid, signal.SIGTERM)
    rest, _ = begun.communicate(timeout=60)
    assert begun.returncode == 130
    assert "dense/lr0.01_seed1_steps4: interrupted" in rest
    assert list(Results(results).read()["runs"]) == ["dense/lr1e-27_seed1_steps4"]

    subprocess.run([*command, *text, "--jobs", "2"], cwd=ROOT, check=True, timeout=3600)
    content = Results(results).read()
    race = load_race(config)
    assert not due_runs(race, content["runs"])
    diverged = content["runs"]["growing/lr1e+23_seed1_steps4"]
    assert (diverged["diverged"], diverged["validation_loss"]) == (True, None)
    assert tuned_rate(race, "growing", content["runs"]) == 1e-2
    full = content["runs"]["growing/lr0.01_seed1_steps8"]
    assert [(stretch["first_step"], stretch["mean_rank"]) for stretch in full["ranks"]] == [(0, 2.0), (4, 4.0)]
    assert [point["step"] for point in full["validation"]] == [4, 8]
    assert full["validation_loss"] == full["validation"][-1]["loss"]

    subprocess.run([*command, *text[:2], "--speed"], cwd=ROOT, check=True, timeout=3600)
    assert len(Results(results).read()["speed"]) == 3 * race.speed_repeats
    write_report(race, Results(results))
    report = (results.parent / "results.md").read_text()
    assert report.startswith(f"# Plan\n{MARKER}\n")
    assert "old" not in report.splitlines()
    assert "| growing | 0.01 | 1 |" in report
    assert "diverged" in report
    table = report.partition("What other rates come to at full length")[2].splitlines()
    assert table[2] == "| method | 0.01 | 0.02 |"
    assert re.fullmatch(r"\| growing \| \*\*\d\.\d+\*\* \| \d\.\d+ \|", table[4])
    assert sorted(path.name for path in (results.parent / "images").iterdir()) == [
        "race_flops.png",
        "race_ranks.png",
        "race_seconds.png",
    ]
