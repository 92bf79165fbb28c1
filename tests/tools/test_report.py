"""`tools/report.py` on a small run's records, hostile ones too, and `tools/documentation/screenshots.py` in a real
browser."""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pretrain.disk import JsonLines
from pretrain.errors import ConfigError
from pretrain.monitor.monitor import Monitor
from pretrain.monitor.run_folder import write_run_record
from pretrain.train_state import GrowthRecord, Validation
from tests.pretrain.monitor.test_monitor import CONFIG, FIRST, RANKS, metrics
from tools import report
from tools.documentation import screenshots
from tools.run_report.history import RunHistory

HOSTILE = '</pre><script>alert("1")</script><img src=x onerror=alert(1)>$\\frac{'


def make_run(folder: Path, *, dense: bool = False) -> Path:
    """Twenty steps with one growth event; a dense run has none."""
    model = CONFIG.model.model_copy(update={"parametrization": "dense"}) if dense else CONFIG.model
    config = CONFIG.model_copy(update={"model": model})
    write_run_record(folder, config)
    monitor = Monitor(folder, config, {} if dense else RANKS, active=True)
    for step in range(1, 21):
        monitor.train_step(step, metrics(step, lm_loss=4.0 - 0.1 * step))
        if step % 10 == 0:
            monitor.validation(step, {"": Validation(4.1 - 0.1 * step, 1.0)})
        if step == 10 and not dense:
            monitor.growth(GrowthRecord(step, 4 * step, {FIRST: 8}, {FIRST: 16}, seconds=0.25))
            monitor.spectra(step, {name: np.array([2.0, 1.0, 0.5]) for name in RANKS})
    monitor.close()
    return folder


def write_report(monkeypatch: pytest.MonkeyPatch, *flags: object) -> None:
    monkeypatch.setattr(sys, "argv", ["report.py", *map(str, flags)])
    report.main()


class Page(HTMLParser):
    """The tags and the text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [str(value) for name, value in attrs if name in ("src", "href")]
        assert not [name for name, _ in attrs if name.startswith("on")]

    def handle_data(self, data: str) -> None:
        self.words += data


def test_a_report_has_pictures_tables_and_nothing_from_elsewhere(tmp_path, monkeypatch) -> None:
    run, dense = make_run(tmp_path / "grown"), make_run(tmp_path / "dense", dense=True)
    JsonLines(run / "events.jsonl").append({"step": 12, "event": HOSTILE, "reason": HOSTILE, "time": HOSTILE})
    JsonLines(run / "metrics.jsonl").append({"step": 21, "lm_loss": HOSTILE, "training_flops": [], HOSTILE: 1})
    JsonLines(run / "events.jsonl").append({"step": 15, "event": "growth", "before": 3, "after": {HOSTILE: 4}})
    write_report(monkeypatch, "--run", run, "--beside", dense)
    page = Page((run / "report.html").read_text())
    assert "script" not in page.tags
    assert page.tags.count("img") == 5  # timeline, by FLOPs, by seconds, rank map, singular values
    assert all(source.startswith("data:image/svg+xml;base64,") for source in page.sources)
    assert page.words.count(HOSTILE) >= 2
    for fact in ("dense", "growth", "2.1000", "layer 1", "global_batch: 4"):
        assert fact in page.words

    write_report(monkeypatch, "--run", dense, "--output", tmp_path / "other.html")
    assert Page((tmp_path / "other.html").read_text()).tags.count("img") == 3


def test_ranks_follow_the_life_that_counts(tmp_path) -> None:
    run = make_run(tmp_path / "run")
    events = JsonLines(run / "events.jsonl")
    events.append({"step": 16, "event": "growth", "before": {FIRST: 16}, "after": {FIRST: 32}})
    events.append({"step": 14, "event": "resume"})
    events.append({"step": 18, "event": "growth", "before": {FIRST: 16}, "after": {FIRST: 24}})
    steps = [(step, ranks[FIRST]) for step, ranks in RunHistory(run).ranks]
    assert steps == [(0, 8), (10, 16), (18, 24)]


def test_a_run_of_an_earlier_version_is_read(tmp_path) -> None:
    """Version 0.1 called a growth an augmentation, and the schedule of ranks events."""
    run = make_run(tmp_path / "run")
    record = run / "config.yaml"
    record.write_text(record.read_text().replace("\n  schedule:", "\n  events:"))
    assert "\n  events:" in record.read_text()
    JsonLines(run / "events.jsonl").append(
        {"step": 18, "event": "augmentation", "before": {FIRST: 16}, "after": {FIRST: 24}}
    )
    history = RunHistory(run)
    assert history.ranks[-1][1][FIRST] == 24
    assert history.marks()[-1]["event"] == "growth"


def test_what_is_no_run_is_refused(tmp_path, monkeypatch) -> None:
    with pytest.raises(ConfigError, match=r"is no run folder, it has no config\.yaml"):
        write_report(monkeypatch, "--run", tmp_path)
    run = make_run(tmp_path / "run")
    (run / "summary.json").write_text("[" * 100_000)
    with pytest.raises(ConfigError, match=r"summary\.json cannot be read"):
        write_report(monkeypatch, "--run", run)


@pytest.mark.slow
def test_a_browser_shows_what_the_documentation_has(tmp_path, monkeypatch) -> None:
    try:
        screenshots.find_browser()
    except ConfigError as error:
        pytest.skip(str(error))
    run, dense = make_run(tmp_path / "grown"), make_run(tmp_path / "dense", dense=True)
    flags = ["--run", str(run), "--beside", str(dense), "--output", str(tmp_path / "pictures")]
    monkeypatch.setattr(sys, "argv", ["screenshots.py", *flags])
    screenshots.main()
    shown = {path.stem for path in (tmp_path / "pictures").glob("*.png")}
    documented = (Path(screenshots.__file__).parents[2] / "docs" / "tensorboard.md").read_text()
    assert shown == set(re.findall(r"images/(\w+)\.png", documented))
    for path in (tmp_path / "pictures").glob("*.png"):
        with Image.open(path) as picture:
            colours = picture.convert("RGB").getcolors(maxcolors=2**24)
        assert colours is not None
        assert len(colours) > 100  # an empty page has a few
