"""The page of the race is what its tool writes from the full record, and the thinned record is small and current."""

import shutil
from pathlib import Path

from tests.docs.documented_commands import ROOT
from tools.experiments.race import DEFAULT_RESULTS, refuse_changed_methods
from tools.experiments.race_plan import load_race
from tools.experiments.race_report import write_report
from tools.experiments.race_results import Results

RACE = ROOT / "configs" / "race" / "small.yaml"


def test_the_report_is_that_of_the_full_record(tmp_path: Path) -> None:
    for name in ("results.md", "results.json.xz"):
        shutil.copy(ROOT / "docs" / name, tmp_path / name)
    race, results = load_race(RACE), Results(tmp_path / "results.json.xz")
    refuse_changed_methods(race, results.read()["runs"])
    write_report(race, results)
    for name in ("results.md", "results.json"):
        assert (tmp_path / name).read_bytes() == (ROOT / "docs" / name).read_bytes()


def test_the_thinned_record_is_small() -> None:
    assert DEFAULT_RESULTS.with_suffix("").stat().st_size < 200_000
