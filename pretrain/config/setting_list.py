"""All settings as data: for `--print-config`, the page docs/settings.md, and the schema by which editors complete.

Everything is read from the pydantic models of `pretrain/config/run.py`: names, types, bounds, defaults, descriptions.
"""

import json
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from pretrain.config.files import BASE_KEY
from pretrain.config.run import RunConfig

WIDTH = 120
_BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
_TYPES = {"integer": "integer", "number": "number", "string": "text", "boolean": "true, false", "null": "none"}
_REFERENCE = "#/$defs/"


@dataclass(frozen=True)
class Setting:
    """One setting, as text for people."""

    name: str
    """Full name: `section.key`, or `section.key[].inner` inside a list."""
    kind: str
    default: str
    description: str


@dataclass(frozen=True)
class Section:
    """The settings under one heading of a config."""

    name: str
    description: str
    settings: tuple[Setting, ...]


def sections() -> list[Section]:
    """Every section of a run's config, in the order of the file."""
    schema = RunConfig.model_json_schema()
    found = []
    for name, field in schema["properties"].items():
        model = _model_of(field, schema)
        assert model is not None
        settings = tuple(_settings(model, f"{name}.", schema))
        found.append(Section(name, " ".join(model["description"].split()), settings))
    return found


def editor_schema() -> dict[str, Any]:
    """JSON schema of a config file. Only the keys of a list's entries are required: anything else may come from the
    file's base or from the command line."""
    schema = RunConfig.model_json_schema()
    entries = {_name(field["items"]) for model in schema["$defs"].values() for field in _lists(model)}
    for name, model in schema["$defs"].items():
        if name not in entries:
            model.pop("required", None)
    schema.pop("required", None)
    base = {"type": "string", "description": "file whose settings this one is laid over"}
    schema["properties"] = {BASE_KEY: base, **schema["properties"]}
    return {"$schema": "http://json-schema.org/draft-07/schema#", **_without_titles(schema)}


def commented(config: RunConfig) -> str:
    """The resolved config as YAML that `load_config` reads back; a comment above each setting says what it does."""
    values = config.model_dump(mode="json")
    blocks = []
    for section in sections():
        lines = [*_comment(section.description, ""), f"{section.name}:"]
        for setting in section.settings:
            key = setting.name.removeprefix(f"{section.name}.")
            if key in values[section.name]:  # else it is part of another setting
                lines += _comment(setting.description, "  ")
                text = yaml.safe_dump({key: values[section.name][key]}, sort_keys=False, width=WIDTH)
                lines.append(textwrap.indent(text.rstrip("\n"), "  "))
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"


def print_config(config: RunConfig) -> None:
    """Prints the resolved config."""
    print(commented(config), end="")


def _comment(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")


def _settings(model: Mapping[str, Any], prefix: str, schema: Mapping[str, Any]) -> Iterator[Setting]:
    required = model.get("required", ())
    for key, field in model["properties"].items():
        default = "required" if key in required else _shown(field.get("default"))
        yield Setting(prefix + key, _kind(field, schema), default, field.get("description", ""))
        for choice in field.get("anyOf", [field]):
            inner = _model_of(choice.get("items", choice), schema)
            if inner is not None:
                yield from _settings(inner, f"{prefix}{key}{'[]' if 'items' in choice else ''}.", schema)


def _kind(field: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    """The values that a setting takes, in words."""
    if "anyOf" in field:
        return ", or ".join(_kind(choice, schema) for choice in field["anyOf"])
    if "enum" in field:
        return ", ".join(map(str, field["enum"]))
    model = _model_of(field, schema)
    if model is not None:
        return f"{{{', '.join(model['properties'])}}}"
    if "type" not in field:  # pydantic's JsonValue
        return "any value"
    if field["type"] == "array":
        return f"list of {_kind(field['items'], schema)}"
    if field["type"] == "object":
        return f"{{name: {_kind(field['additionalProperties'], schema)}, …}}"
    bounds = [f"{sign} {_shown(field[key])}" for key, sign in _BOUNDS.items() if key in field]
    return " ".join([_TYPES[field["type"]], *bounds])


def _model_of(field: Mapping[str, Any], schema: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The section that a field holds; None if it holds a value."""
    model = schema["$defs"][_name(field)] if "$ref" in field else {}
    return model if "properties" in model else None


def _name(field: Mapping[str, Any]) -> str:
    return str(field.get("$ref", "")).removeprefix(_REFERENCE)


def _lists(model: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    return (field for field in model.get("properties", {}).values() if "items" in field)


def _shown(value: Any) -> str:
    """A value as YAML has it."""
    if value is None:
        return "none"
    return f"{value:g}" if isinstance(value, float) else str(json.dumps(value)).strip('"')


def _without_titles(node: Any) -> Any:
    """A schema without the titles that pydantic makes out of names: editors would show them in place of the names."""
    if isinstance(node, list):
        return [_without_titles(item) for item in node]
    if not isinstance(node, dict):
        return node
    return {key: _without_titles(value) for key, value in node.items() if key != "title" or not isinstance(value, str)}
