"""Pages are wrapped, and each begins with one heading."""

import re

import pytest

from tests.docs.documented_commands import PAGES, ROOT
from tests.docs.prose import LONGEST, prose_lines

WRITTEN = (*PAGES, "CHANGELOG.md", "SECURITY.md")


@pytest.mark.parametrize("page", WRITTEN)
def test_lines_are_wrapped(page: str) -> None:
    long = [number for number, line in prose_lines(ROOT / page) if len(line) > LONGEST]
    assert long == [], f"lines of more than {LONGEST} characters"


@pytest.mark.parametrize("page", WRITTEN)
def test_there_is_one_title(page: str) -> None:
    titles = [line for _, line in prose_lines(ROOT / page) if line.startswith("# ")]
    assert len(titles) == 1
    assert (ROOT / page).read_text(encoding="utf-8").startswith(titles[0])


@pytest.mark.parametrize("page", WRITTEN)
def test_nothing_is_left_to_be_filled_in(page: str) -> None:
    assert "TODO" not in (ROOT / page).read_text(encoding="utf-8")


def test_the_readme_is_short() -> None:
    """One screen for what it is, and a few for the rest."""
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1000


def test_where_things_are_is_true() -> None:
    """Every file in CONTRIBUTING's table of places exists, and has the names that stand behind it."""
    table = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## Where is")[2].partition("\n## ")[0]
    answers = [row.split("|")[2] for row in table.splitlines() if row.startswith("| ") and "`" in row]
    assert len(answers) == 8
    for answer in answers:
        quoted = re.findall(r"`([^`]+)`", answer)
        source, folder = "", ROOT
        for name in quoted:
            if name.endswith(".py"):
                path = ROOT / name if "/" in name else folder / name
                folder, source = path.parent, source + path.read_text(encoding="utf-8")
        names = [part for name in quoted if not name.endswith(".py") for part in name.split(".")]
        assert [name for name in names if not re.search(rf"\b{name}\b", source)] == []
