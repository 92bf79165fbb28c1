"""docs/troubleshooting.md lists every error message as the source has it, and its codes and links are right."""

import re
from pathlib import Path

import pytest

from pretrain import errors
from pretrain.data.index_check import read_facts
from tests.docs.documented_commands import PAGES, ROOT
from tools.documentation.error_table import PAGE, messages, table


def test_the_table_is_current() -> None:
    assert table(list(messages())) in PAGE.read_text(encoding="utf-8"), (
        "run python tools/documentation/error_table.py --write"
    )


def test_it_has_the_messages_of_every_room() -> None:
    """Also one that is raised for real here."""
    found = list(messages())
    assert len({message.area for message in found}) == 7
    assert len(found) > 300
    with pytest.raises(errors.DataError) as raised:
        read_facts(Path("/nowhere/corpus"))
    wrong, cure = str(raised.value).rsplit(": ", 1)
    assert any(message.exit_code == 2 and message.cure == cure and matches(message.wrong, wrong) for message in found)


def matches(template: str, text: str) -> bool:
    return re.fullmatch(re.sub(r"\\\*[^*]*\\\*", ".*", re.escape(template)), text) is not None


def test_every_exit_code_is_explained() -> None:
    kinds = [
        kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.EspalierError)
    ]
    codes = {str(getattr(kind, "exit_code", 1)) for kind in kinds} - {"None"}
    explained = re.findall(r"^\| ([-0-9, ]+) \|", PAGE.read_text(encoding="utf-8").partition("\n## ")[0], re.MULTILINE)
    assert codes <= {code for cell in explained for code in cell.split(", ")}


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_resolve(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if not target.startswith(("http://", "https://")):
            assert ((ROOT / page).parent / target).exists(), target
