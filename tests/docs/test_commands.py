"""Every command of README.md and docs/ exists, with its options and settings, and is run by a test or marked as needing
a cluster. `RUN` are pages whose commands are carried out one by one as they stand."""

import ast
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from pydantic import BaseModel

from pretrain.config.run import RunConfig, load_config
from tests.docs.documented_commands import PAGES, ROOT, Command, commands
from tests.support.huggingface_files import byte_level
from tests.support.training_runs import make_corpus
from tests.tools.test_wikitext import SHARES, text_of

ALL = [command for page in PAGES for command in commands(page)]
RUN = ("docs/data.md", "docs/paper.md")
OTHERS = {"source", "tensorboard", "kubectl", "pip", "lm_eval", "huggingface-cli", "srun"}
"""Programs that are not ours; `tests/security/test_network.py` starts TensorBoard as documented."""


def named(command: Command) -> str:
    return f"{command.page}: {command.text[:60]}"


def test_there_are_commands() -> None:
    assert len(ALL) > 60
    assert {command.page for command in ALL} >= {"README.md", *RUN}


@pytest.mark.parametrize("command", ALL, ids=named)
def test_it_exists(command: Command) -> None:
    """The file, its options, the settings it names."""
    script = command.script
    if script is None:
        assert command.words[0] in OTHERS
        return
    assert (ROOT / script).is_file()
    if script.startswith("tools/"):
        known, given = options_of(ROOT / script), command.words[command.words.index(script) + 1 :]
        assert {word.partition("=")[0] for word in given if word.startswith("--")} - known == set()
    for word in command.words:
        if match := re.fullmatch(r"([a-z]+)\.([a-z_.0-9]+)=(.*)", word, flags=re.DOTALL):
            assert_is_setting(match[1], match[2])


def options_of(path: Path) -> set[str]:
    """All strings in a tool, and in modules of tools/ it imports, that look like options; all words of a script."""
    if path.suffix == ".sh":
        return set(re.findall(r"--[a-z-]+", path.read_text(encoding="utf-8")))
    tree = ast.parse(path.read_text(encoding="utf-8"))
    constants = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    found = {value for value in constants if isinstance(value, str) and value.startswith("--")}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("tools."):
            modules = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            paths = [ROOT / f"{name.replace('.', '/')}.py" for name in modules]
            found = found.union(*(options_of(file) for file in paths if file.is_file()))
    return found


def assert_is_setting(section: str, key: str) -> None:
    model: type[BaseModel] | None = RunConfig
    for name in (section, *key.split(".")):
        assert model is not None
        assert name in model.model_fields
        kind = model.model_fields[name].annotation
        model = kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


@pytest.mark.parametrize("command", ALL, ids=named)
def test_it_is_run_by_a_test_or_needs_a_cluster(command: Command) -> None:
    script = command.script
    if command.needs_a_cluster or script is None or (command.page in RUN and not command.has_placeholders):
        return
    name = Path(script).name if script.endswith((".sh", ".sbatch")) else Path(script).stem
    # In a room below tools/ the name alone (`step`) says little: there the room stands in front of it.
    room = "".join(rf"\b{part}\b.*" for part in Path(script).parent.parts[1:])
    use = re.compile(rf"{room}\b{re.escape(name)}\b")
    tests = [path for path in (ROOT / "tests").rglob("*") if path.suffix in (".py", ".sh")]
    using = [path for path in tests if path.parent.name != "docs" and use.search(path.read_text())]
    assert using, f"no test uses {script}"


def test_installed_configs_of_commands_load() -> None:
    names = {
        word
        for command in ALL
        for before, word in zip(command.words, command.words[1:], strict=False)
        if before == "--config" and re.fullmatch(r"[a-z0-9_]+", word)
    }
    assert len(names) > 3
    for name in names:
        load_config(name, ["data.prefix=corpus", "data.tokenizer=tokenizer.model"])


@pytest.fixture
def sandbox(tmp_path: Path) -> Path:
    """A folder with the source and what the pages take for given: texts, an archive, a published tokenizer."""
    for name in ("configs", "launch", "model", "pretrain", "tools"):
        (tmp_path / name).symlink_to(ROOT / name)
    make_corpus(tmp_path / "made")
    (tmp_path / "made" / "text").rename(tmp_path / "texts")
    texts = [path.read_text(encoding="utf-8") for path in sorted((tmp_path / "texts").iterdir())]
    (tmp_path / "web.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:6]))
    import zstandard

    (tmp_path / "web.jsonl.zst").write_bytes(zstandard.compress((tmp_path / "web.jsonl").read_bytes()))
    byte_level(tmp_path / "gpt2")
    with zipfile.ZipFile(tmp_path / "wikitext-103-raw-v1.zip", "w") as archive:
        for share in SHARES:
            articles = text_of([f"{share}{number}" for number in range(20)]) + " \n = Sources = \n \n" + "".join(texts)
            archive.writestr(f"wikitext-103-raw/wiki.{share}.raw", articles)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN)
def test_the_commands_of_a_page_run_in_order(page: str, sandbox: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = 0
    for command in commands(page):
        if command.needs_a_cluster or command.has_placeholders:
            continue
        result = subprocess.run(
            ["bash", "-c", command.text], cwd=sandbox, env=environment, capture_output=True, text=True, timeout=600
        )
        assert result.returncode == 0, f"{command.text}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}"
        done += 1
    assert done >= 3
