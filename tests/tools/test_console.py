"""Tables and bars of the tools, where there is no terminal."""

import pytest

from tools.console import progress, table_lines


def test_a_table_is_as_wide_as_it_is_and_shows_text_as_it_is() -> None:
    name = "[red]" + "x" * 200 + "[/red]"
    assert table_lines(["name", "number"], [[name, "1"], ["b", "22,222"]]) == [
        f"name{' ' * (len(name) - 4)}  number",
        f"{name}       1",
        f"b{' ' * (len(name) - 1)}  22,222",
    ]


def test_a_bar_is_silent_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("work", 3) as bar:
        bar.advance()
        bar.stand(3, "three")
    assert capsys.readouterr() == ("", "")
