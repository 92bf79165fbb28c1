"""Files of a race: results, locks, and the text that is held out."""

import json
import math
from pathlib import Path

import pytest

from pretrain.errors import DataError
from tests.support.race_cases import write_race, write_text
from tools.experiments import race_results
from tools.experiments.race_plan import (
    due_runs,
    load_race,
)
from tools.experiments.race_results import Results, locked
from tools.experiments.race_runs import Busy, Runner
from tools.experiments.race_text import Text, split_text


@pytest.mark.parametrize("name", ["results.json", "results.json.xz"])
def test_results_keep_what_another_race_wrote(tmp_path: Path, name: str) -> None:
    ours, theirs = Results(tmp_path / name), Results(tmp_path / name)
    ours.add("runs", "a", {"loss": 1.0})
    theirs.add("runs", "b", {"loss": math.inf})
    assert ours.read()["runs"] == {"a": {"loss": 1.0}, "b": {"loss": None}}
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format_version": 9, "runs": {}, "speed": {}}'])
def test_other_files_are_no_results(tmp_path: Path, content: str) -> None:
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(DataError, match="--results"):
        Results(tmp_path / "results.json").read()


def test_damaged_and_bottomless_results_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = Results(tmp_path / "results.json.xz")
    results.add("runs", "a", {"loss": 1.0})
    whole = results.path.read_bytes()
    for content in (b"", b"{}", whole[:-20]):
        results.path.write_bytes(content)
        with pytest.raises(DataError, match="--results"):
            results.read()
    results.path.write_bytes(whole)
    monkeypatch.setattr(race_results, "LARGEST_BYTES", 50)
    with pytest.raises(DataError, match="--results"):
        results.read()


def test_only_the_first_race_removes_the_lock_of_a_killed_compilation(tmp_path: Path) -> None:
    lock = tmp_path / "torch_extensions" / "operator" / "lock"
    lock.parent.mkdir(parents=True)
    text = Text(tmp_path / "corpus", tmp_path / "tokenizer.model", "1,1,0")
    lock.touch()
    Runner(tmp_path, text)
    assert not lock.exists()
    lock.touch()
    Runner(tmp_path, text)
    assert lock.exists()


def test_a_run_is_claimed_by_one_race(tmp_path: Path) -> None:
    race = load_race(write_race(tmp_path / "race.yaml"))
    runner = Runner(tmp_path, Text(tmp_path / "corpus", tmp_path / "tokenizer.model", "1,1,0"))
    run = due_runs(race, {})[0]
    runner.folder(run.key).mkdir(parents=True)
    with locked(runner.folder(run.key)), pytest.raises(Busy, match="another race is at work"):
        runner.execute(race, run)


def test_whole_sources_are_held_out(tmp_path: Path) -> None:
    text = write_text(tmp_path / "all.jsonl")
    training, held_out = tmp_path / "train.jsonl", tmp_path / "held_out.jsonl"
    race = load_race(write_race(tmp_path / "race.yaml"))
    split_text(race.text, [str(text)], training, held_out)
    sources = [[json.loads(line)["source"] for line in path.read_text().splitlines()] for path in (training, held_out)]
    assert sources == [["in/a", "in/b", "in/c"], ["out/a"]]
    missing = race.text.model_copy(update={"held_out": ("nowhere/",)})
    with pytest.raises(DataError, match="no document whose source begins with nowhere/"):
        split_text(missing, [str(text)], training, held_out)
