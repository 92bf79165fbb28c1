"""The commands in the shell blocks of README.md, CONTRIBUTING.md and docs/."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
_BLOCK = re.compile(r"^```(?:bash|sh)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
_PLACEHOLDER = re.compile(r"(.*[=/])?[A-Z]{2,}$|\.\.\.$")


@dataclass(frozen=True)
class Command:
    """One command of the documentation: one line, its continuations joined."""

    page: str
    text: str

    @property
    def words(self) -> list[str]:
        """Words of the command, without variables in front and comment behind."""
        words = shlex.split(self.text, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words.pop(0)
        return words

    @property
    def needs_a_cluster(self) -> bool:
        return "needs a cluster" in self.text.partition(" #")[2]

    @property
    def has_placeholders(self) -> bool:
        """Words that a reader replaces, such as FILE."""
        return any(_PLACEHOLDER.fullmatch(word) for word in self.words)

    @property
    def script(self) -> str | None:
        """The file of ours that it runs, relative to the root."""
        return next((word for word in self.words if re.fullmatch(r"(tools|launch|pretrain|tests)/\S+", word)), None)


def commands(page: str) -> list[Command]:
    blocks = _BLOCK.findall((ROOT / page).read_text(encoding="utf-8"))
    lines = [line for block in blocks for line in re.sub(r"\\\n\s*", "", block).splitlines()]
    return [Command(page, line) for line in lines if shlex.split(line, comments=True)]
