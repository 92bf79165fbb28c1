"""The table of all error messages in docs/troubleshooting.md, out of the source itself.

    python tools/documentation/error_table.py          (shows it)
    python tools/documentation/error_table.py --write  (puts it into the page)

A message of ours is one sentence: what is wrong, with the numbers, and behind the last colon what to do. It stands
where it is raised, so the table is read from there: every `EspalierError`, `agreed(...)`, and the ValueErrors of
settings. What a message fills in is shown in italics.
"""

import argparse
import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pretrain import errors
from pretrain.disk import replace_text

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "troubleshooting.md"
BEGIN, END = "<!-- begin: tools/documentation/error_table.py -->", "<!-- end -->"
ROOMS = ("launch", "model", "pretrain", "tools")
RAISED = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, Exception)}
MAKERS = {"agreed": "NumericalError"}
TEXTS = (ast.JoinedStr, ast.IfExp)
FEWEST_WORDS = 2
"""Own words of a message that is worth a row."""
HANDED_ON = "the end of the line says why"
AREAS = {
    "Settings": "pretrain/(config/.*|engine/deepspeed_config|planning/(fitting|step)|schedule|policies/.*)"
    "|model/config",
    "Text, tokenizers, corpora": "pretrain/(data|tokenizer)/.*"
    "|tools/(corpus/.*|corpus_statistics|preprocess_corpus|train_tokenizer|wikitext)",
    "Start and launch": "launch/.*|pretrain/(distributed|device_.*|devices|resilience/run_lock|monitor/run_folder)",
    "Training": "pretrain/(train|trainer|resilience/.*|growth/(rank_control|event|probe)|engine/build"
    "|monitor/(tracking|monitor))",
    "Checkpoints and resume": "pretrain/(checkpoint/.*|disk|resume|growth/(initial_values|stash)|train_state"
    "|engine/(replica_check|zero3|optimizer_state))",
    "Consolidated models, imports, exports": "pretrain/(convert/.*|evaluation)|model/huggingface/.*"
    "|tools/(consolidate_checkpoint|densify_checkpoint|export_adapter|import_huggingface|inspect_checkpoint"
    "|model_export|generate|evaluate)",
    "Benchmarks, plans, reports": ".*",
}
"""Headings, and the files whose messages stand below each; the first that fits."""
OTHERWISE = {
    "Settings": "correct that line of the file",
    "Start and launch": "correct the command",
    "Training": "see the events before it in events.jsonl, and lower optimizer.learning_rate",
    "Checkpoints and resume": "that checkpoint is damaged: a run takes up the newest whole one by itself, and "
    "tools/inspect_checkpoint.py --verify says which are",
    "Consolidated models, imports, exports": "that folder is damaged or was edited: make it again with the tool that "
    "wrote it",
    "Benchmarks, plans, reports": "see what was said above it",
}
"""What to do about a message that does not say so itself: it names a damaged file, or comes behind another one."""


@dataclass(frozen=True, order=True)
class Message:
    """One message, as a reader sees it."""

    area: str
    wrong: str
    cure: str
    exit_code: int


def main() -> None:
    parser = argparse.ArgumentParser(description="All error messages, as a table.")
    parser.add_argument("--write", action="store_true", help="put it into the page")
    arguments = parser.parse_args()
    found = table(list(messages()))
    if not arguments.write:
        print(found)
        return
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    replace_text(PAGE, f"{before}{BEGIN}\n{found}{END}{rest.split(END, 1)[1]}")


def messages() -> Iterator[Message]:
    """All messages of the product; some are raised in several places."""
    paths = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
    trees = {str(path.relative_to(ROOT).with_suffix("")): ast.parse(path.read_text(encoding="utf-8")) for path in paths}
    constants = {name: text for tree in trees.values() for name, text in _constants(tree)}
    for name, tree in trees.items():
        area = next(heading for heading, pattern in AREAS.items() if re.fullmatch(pattern, name))
        for call, local in _raised_calls(tree, settings=area == "Settings"):
            text = _template(call.args[0], constants | local)
            if len(_own_words(text)) >= FEWEST_WORDS:  # else it is another message, handed on
                wrong, _, cure = text.rpartition(": ")
                if cure and not _own_words(cure):
                    cure = HANDED_ON
                yield Message(area, wrong or cure, cure if wrong else "", _exit_code(call))


def table(found: list[Message]) -> str:
    """Markdown: a heading and a table for each area."""
    lines = []
    for area in AREAS:
        here = sorted({message for message in found if message.area == area}, key=_sort_key)
        lines += [f"### {area}", "", "| code | what is wrong | what to do |", "| --- | --- | --- |"]
        cures = [one.cure or OTHERWISE[area] for one in here]
        lines += [
            f"| {one.exit_code} | {_cell(one.wrong)} | {_cell(cure)} |" for one, cure in zip(here, cures, strict=True)
        ]
        lines.append("")
    return "\n".join(lines)


def _constants(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Texts that a module gives a name in capitals, which messages then use."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield from ((str(ast.unparse(target)), node.value.value) for target in node.targets)


def _raised_calls(tree: ast.Module, *, settings: bool) -> Iterator[tuple[ast.Call, dict[str, str]]]:
    """Calls that make an error with a message, whether raised there or a line later, and what local names mean."""
    kinds = RAISED | MAKERS.keys() | ({"ValueError"} if settings else set())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    local = {id(inner): _local_texts(function) for function in functions for inner in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in kinds and node.args:
            yield node, local.get(id(node), {})


def _local_texts(function: ast.FunctionDef) -> dict[str, str]:
    """Names that a function gives to a text, or to one of two, once."""
    found: dict[str, list[ast.expr]] = {}
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found.setdefault(node.targets[0].id, []).append(node.value)
    once = {name: values[0] for name, values in found.items() if len(values) == 1}
    texts = {name: _template(value, {}) for name, value in once.items() if isinstance(value, TEXTS)}
    return {name: text for name, text in texts.items() if _own_words(text) and ": " not in text}


def _own_words(text: str) -> list[str]:
    """The words of a message that are always the same."""
    return re.findall(r"[A-Za-z]{2,}", re.sub(r"\*[^*]*\*", "", text))


def _exit_code(call: ast.Call) -> int:
    assert isinstance(call.func, ast.Name)
    kind = getattr(errors, MAKERS.get(call.func.id, call.func.id), errors.ConfigError)
    return int(getattr(kind, "exit_code", errors.ConfigError.exit_code))


def _template(node: ast.expr, constants: Mapping[str, str]) -> str:
    """The text of a message, what is filled in between asterisks."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_template(part, constants) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return _template(node.value, constants)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _template(node.left, constants) + _template(node.right, constants)
    if isinstance(node, ast.IfExp):
        either = [_template(branch, constants) for branch in (node.body, node.orelse)]
        return " / ".join(text for text in either if text)
    if isinstance(node, ast.Name) and node.id in constants:
        return constants[node.id]
    return f"*{_name(node)}*"


def _name(node: ast.expr) -> str:
    """A short name for a value: the last of its own names."""
    if isinstance(node, ast.Name):
        return node.id.strip("_").replace("_", " ")
    if isinstance(node, ast.Attribute):
        return (
            _name(node.value) if node.attr in ("name", "stem", "__name__") else node.attr.strip("_").replace("_", " ")
        )
    if isinstance(node, ast.Call) and node.args and not isinstance(node.args[0], ast.Starred):
        return _name(node.args[0])
    if isinstance(node, ast.Subscript):
        return _name(node.value)
    return "…"


def _sort_key(message: Message) -> tuple[str, Message]:
    """Key that sorts messages by their letters alone; equal ones keep an order that stays."""
    return re.sub(r"[^a-z0-9 ]", "", message.wrong.lower()).strip(), message


def _cell(text: str) -> str:
    """A table's cell: on one line, and with nothing that Markdown or HTML would take for its own."""
    plain = re.sub(r"\s+", " ", text).replace("|", "\\|").replace("<", "&lt;")
    return plain.replace("*…*", "…").replace("**", "* *")


if __name__ == "__main__":
    main()
