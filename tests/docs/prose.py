"""Lines of the pages that people write and wrap."""

import re
from collections.abc import Iterator
from pathlib import Path

LONGEST = 160
_GENERATED_BEGINS = re.compile(r"^<!-- (begin:|figures:|Below:)")
_GENERATED_ENDS = re.compile(r"^<!-- end")


def prose_lines(page: Path) -> Iterator[tuple[int, str]]:
    """Lines with their numbers from 1, without tables, code blocks, pictures, and what tools write."""
    in_block = generated = False
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        generated = bool(_GENERATED_BEGINS.match(line)) or (generated and not _GENERATED_ENDS.match(line))
        if line.startswith("```"):
            in_block = not in_block
        elif not (in_block or generated or line.startswith(("|", "![", "<!--"))):
            yield number, line
