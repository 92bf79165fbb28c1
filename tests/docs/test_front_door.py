"""What a visitor finds beside the code: continuous integration, hooks, issue form, citation, changelog."""

import re
from pathlib import Path
from typing import Any

import yaml

from tests.docs.documented_commands import ROOT

GITHUB = ROOT / ".github"


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def test_every_change_is_tested_on_three_pythons_and_the_long_tests_run_nightly() -> None:
    workflow = read(GITHUB / "workflows" / "tests.yml")
    default, nightly = workflow["jobs"]["default"], workflow["jobs"]["nightly"]
    assert default["strategy"]["matrix"]["python"] == ["3.11", "3.12", "3.13"]
    assert default["steps"][-1]["run"] == ".ci/run"
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o100
    assert "schedule" in workflow[True]  # YAML 1.1 reads the key `on` so
    markers = set(re.findall(r"\w+", " ".join(nightly["strategy"]["matrix"]["tests"]))) - {"and", "not"}
    assert markers == set(re.findall(r'^    "(\w+): ', (ROOT / "pyproject.toml").read_text(), re.MULTILINE))


def test_hooks_run_what_the_checks_run() -> None:
    (repository,) = read(ROOT / ".pre-commit-config.yaml")["repos"]
    *commands, contracts = [hook["entry"] for hook in repository["hooks"]]
    checks = (ROOT / "tests" / "run.sh").read_text()
    assert [command.removesuffix(" --force-exclude") for command in commands] == ["ruff check", "ruff format", "mypy"]
    assert all(f"-m {' '.join(command.split()[:2])}" in checks for command in commands)
    assert f'"$espalier_python" {contracts.removeprefix("python ")}' in checks


def test_the_issue_form_asks_for_the_records_of_the_run() -> None:
    fields = [field for field in read(GITHUB / "ISSUE_TEMPLATE" / "run.yml")["body"] if "validations" in field]
    labels = [field["attributes"]["label"] for field in fields if field["validations"]["required"]]
    assert {"config.yaml", "events.jsonl"} <= set(labels)


def test_there_is_one_version() -> None:
    versions = {
        re.search(r'^    version="(.+)",$', (ROOT / "setup.py").read_text(), re.MULTILINE)[1],  # type: ignore[index]
        read(ROOT / "CITATION.cff")["version"],
        re.search(r"^## \[(\d.+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1],  # type: ignore[index]
    }
    assert len(versions) == 1
