"""Writes docs/settings.md, the page of all settings, and configs/schema.json, by which editors complete and check.

python tools/documentation/settings_page.py          (prints the page's tables)
python tools/documentation/settings_page.py --write  (writes both files)
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from pretrain.config.setting_list import editor_schema, sections
from pretrain.disk import replace_text
from pretrain.errors import run_command

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "settings.md"
SCHEMA = ROOT / "configs" / "schema.json"
BEGIN, END = "<!-- begin: tools/documentation/settings_page.py -->", "<!-- end -->"
HEAD = ("setting", "values", "default", "what it does, and when to change it")


def tables() -> str:
    """A heading and a table for each section."""
    return "\n".join(_lines())


def _lines() -> Iterator[str]:
    for section in sections():
        yield from (f"## `{section.name}`", "", section.description, "", _row(HEAD), _row(("---",) * len(HEAD)))
        for setting in section.settings:
            yield _row((f"`{setting.name}`", setting.kind, setting.default, setting.description))
        yield ""


def _row(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def schema_text() -> str:
    """The schema as it stands in its file."""
    return json.dumps(editor_schema(), indent=1, ensure_ascii=False) + "\n"


def page(present: str) -> str:
    """The page's text with the tables of today."""
    before, _, rest = present.partition(BEGIN)
    return f"{before}{BEGIN}\n{tables()}{END}{rest.partition(END)[2]}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the page of all settings, and the schema for editors.")
    parser.add_argument("--write", action="store_true", help="write docs/settings.md and configs/schema.json")
    if not parser.parse_args().write:
        print(tables())
        return
    replace_text(PAGE, page(PAGE.read_text(encoding="utf-8")))
    replace_text(SCHEMA, schema_text())


if __name__ == "__main__":
    run_command(main)
