"""The page of all settings, the schema for editors, and the comments of --print-config are what the models say."""

import json
from pathlib import Path
from typing import Any

import pytest

from pretrain.config.files import parse_yaml
from pretrain.config.run import load_config
from pretrain.config.setting_list import commented, sections
from tools.documentation.settings_page import PAGE, SCHEMA, page, schema_text

CONFIGS = sorted(SCHEMA.parent.glob("*.yaml"))
TYPES: dict[str, type | tuple[type, ...]] = {
    "integer": int,
    "number": (int, float),
    "string": str,
    "boolean": bool,
    "object": dict,
    "array": (list, tuple),
}
SETTINGS = [setting for section in sections() for setting in section.settings]


def test_the_page_is_current() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert page(text) == text, "run python tools/documentation/settings_page.py --write"


def test_the_schema_is_current() -> None:
    assert SCHEMA.read_text(encoding="utf-8") == schema_text(), (
        "run python tools/documentation/settings_page.py --write"
    )


def test_every_setting_says_what_it_does() -> None:
    assert len(SETTINGS) > 80
    assert [setting.name for setting in SETTINGS if len(setting.description) < 15] == []


def test_values_and_defaults_are_readable() -> None:
    shown = {setting.name: (setting.kind, setting.default) for setting in SETTINGS}
    assert shown["train.steps"] == ("integer ≥ 1", "1000")
    assert shown["train.mask_probability"] == ("number > 0 < 1, or none", "none")
    assert shown["train.precision"] == ("fp32, bf16, fp16", "fp32")
    assert shown["train.batch_ramp"] == ("{start, increment, steps}, or none", "none")
    assert shown["train.batch_ramp.start"] == ("integer ≥ 1", "required")
    assert shown["rank.schedule"] == ("list of {step, rank}", "[]")
    assert shown["rank.schedule[].rank"] == ("integer ≥ 1", "required")
    assert shown["data.blend"] == ("{name: number, …}, or none", "none")
    assert shown["data.tokenizer"] == ("text", "required")
    assert shown["optimizer.epsilon"] == ("number > 0", "1e-08")


RAMP = ["train.global_batch=32", "train.batch_ramp={start: 8, increment: 8, steps: 20}"]


@pytest.mark.parametrize("overrides", [[], RAMP], ids=["plain", "nested"])
def test_the_printed_config_is_the_config_with_a_comment_for_each_setting(tmp_path: Path, overrides: list[str]) -> None:
    config = load_config("quickstart", ["data.prefix=corpus", "data.tokenizer=tokenizer.model", *overrides])
    text = commented(config)
    (tmp_path / "printed.yaml").write_text(text, encoding="utf-8")
    assert load_config(str(tmp_path / "printed.yaml")) == config
    assert "  # optimizer steps of the run. A complete run goes on when it is raised\n  steps: 320\n" in text
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_editors_accept_the_installed_configs(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.splitlines()[0] == f"# yaml-language-server: $schema={SCHEMA.name}"
    assert fits(parse_yaml(text, path.name), SCHEMA_CONTENT)


SCHEMA_CONTENT = json.loads(SCHEMA.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "content",
    [
        {"trian": {}},
        {"train": {"stpes": 3}},
        {"train": {"steps": "many"}},
        {"train": {"steps": True}},
        {"train": {"precision": "fp8"}},
        {"rank": {"schedule": [{"step": 3}]}},
        {"train": {"batch_ramp": {"begin": 3}}},
    ],
    ids=str,
)
def test_editors_mark_mistakes(content: Any) -> None:
    assert not fits(content, SCHEMA_CONTENT)


def fits(value: Any, schema: dict[str, Any]) -> bool:
    """Whether a value has the shape that a schema asks for: types, choices and keys; bounds are not looked at."""
    if "$ref" in schema:
        return fits(value, SCHEMA_CONTENT["$defs"][schema["$ref"].rpartition("/")[2]])
    if "anyOf" in schema:
        return any(fits(value, choice) for choice in schema["anyOf"])
    if "enum" in schema:
        return value in schema["enum"]
    if schema["type"] == "null":
        return value is None
    if not isinstance(value, TYPES[schema["type"]]) or (isinstance(value, bool) and schema["type"] != "boolean"):
        return False
    if isinstance(value, list):
        return all(fits(item, schema["items"]) for item in value)
    if not isinstance(value, dict):
        return True
    known, others = schema.get("properties", {}), schema.get("additionalProperties", True)
    if not set(schema.get("required", ())) <= value.keys():
        return False
    return all(
        fits(item, known[key]) if key in known else isinstance(others, dict) and fits(item, others)
        for key, item in value.items()
    )
