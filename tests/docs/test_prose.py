"""Pages are wrapped, and each begins with one heading."""

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


def test_the_readme_is_short() -> None:
    """One screen for what it is, and a few for the rest."""
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1000
