"""What a run says on a terminal, and where there is none."""

import io
import sys

import pytest

from pretrain.monitor.console import Console


class Terminal(io.StringIO):
    """Standard error as a terminal shows it."""

    def isatty(self) -> bool:
        return True


def test_a_pipe_gets_a_line_for_each_logged_step(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(10, 4, silent=False)
    console.progress(6, {"loss": "2.5"})
    console.log_record("growth", 6, {"seconds": 0.25})
    console.close()
    assert capsys.readouterr() == ("step 6/10  loss 2.5  left 0:00:00\n[growth] step 6  seconds 0.25\n", "")


def test_a_terminal_shows_a_bar_below_what_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    console = Console(10, 4, silent=False)
    console.progress(6, {"loss": "2.5"})
    console.log_record("growth", 6, {"note": ":smile: " + "x" * 200})
    console.close()
    shown = terminal.getvalue()
    assert "step 6/10  loss 2.5  left 0:00:00" in shown
    assert "[growth] step 6  note :smile: " + "x" * 200 in shown
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")


def test_a_silent_console_says_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    console = Console(10, 0, silent=True)
    console.log_record("growth", 6, {})
    console.close()
    assert capsys.readouterr() == ("", "")
