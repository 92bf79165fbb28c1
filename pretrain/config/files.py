"""Reads a run's settings: YAML files, the files they extend, overrides from the command line; and explains mistakes.

Everything here works on plain mappings and on any pydantic model. The settings themselves are declared in
`pretrain/config/run.py`.
"""

import difflib
import importlib.resources
import re
from collections.abc import Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from pretrain.disk import decode_json
from pretrain.errors import ConfigError

MAXIMUM_BYTES = 256 * 1024
MAXIMUM_DEPTH = 32
BASE_KEY = "extends"
RENAMED = {"rank.events": "rank.schedule"}
"""Settings of earlier versions (0.1), and what they are called now."""


class _Loader(yaml.SafeLoader):
    """Safe YAML without duplicate keys, tags or aliases, and with the plain scalars of YAML 1.2.

    `1e-3` is a number, while `2024_01`, `on` and `12:30` are the text they look like.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.YAMLError(f"a key is no plain word (line {key.start_mark.line + 1})")
            if key.value in seen:
                raise yaml.YAMLError(f"key {key.value!r} appears twice (line {key.start_mark.line + 1})")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", r"^(~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"^(true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"^[-+]?(0|[1-9][0-9]*)$", list("-+0123456789")),
    ("float", r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$", list("-+.0123456789")),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)


_OPENING = (
    yaml.BlockMappingStartToken,
    yaml.BlockSequenceStartToken,
    yaml.FlowMappingStartToken,
    yaml.FlowSequenceStartToken,
)
_CLOSING = (yaml.BlockEndToken, yaml.FlowMappingEndToken, yaml.FlowSequenceEndToken)


def parse_yaml(text: str, source: str) -> Any:
    """The value that `text` stands for; `source` names it in errors."""
    depth = 0
    try:
        for token in yaml.scan(text):
            if isinstance(token, (yaml.TagToken, yaml.AliasToken)):
                raise yaml.YAMLError(f"tags and aliases are not allowed (line {token.start_mark.line + 1})")
            depth += isinstance(token, _OPENING) - isinstance(token, _CLOSING)
            if depth > MAXIMUM_DEPTH:  # a scan takes time in the square of the depth
                raise yaml.YAMLError(f"it is nested too deeply to be a config (line {token.start_mark.line + 1})")
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except (yaml.YAMLError, ValueError) as error:  # the latter: a number with thousands of digits
        raise ConfigError(f"{source} is not valid YAML: {' '.join(str(error).split())}") from error


def find_file(name: str, folder: str, suffix: str) -> Path:
    """The file at path `name`, or the one that is installed in package `folder` as `name + suffix`."""
    path = Path(name)
    if path.is_file():
        return path
    installed = importlib.resources.files(folder)
    if path.name == name and not path.suffix:
        bundled = Path(str(installed.joinpath(name + suffix)))
        if bundled.is_file():
            return bundled
    known = sorted(entry.name.removesuffix(suffix) for entry in installed.iterdir() if entry.name.endswith(suffix))
    raise ConfigError(
        f"there is no config {name}: give the path of a {suffix} file, or one of {', '.join(known) or 'none installed'}"
    )


def read_text(path: Path) -> str:
    """The text of a settings file; ConfigError if it is too large for one."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}): is it the right file?") from error
    if size > MAXIMUM_BYTES:
        raise ConfigError(f"{path} has {size} bytes, and a config has at most {MAXIMUM_BYTES}: is it the right file?")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text: is it the right file?") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}): is it the right file?") from error


def read_settings(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The mapping in a YAML file, laid over that of the file it extends.

    `above`: the files that extend this one, to find cycles.
    """
    resolved = path.resolve()
    if resolved in above:
        chain = " -> ".join(file.name for file in (*above, resolved))
        raise ConfigError(f"{path} extends itself ({chain}): remove one of the {BASE_KEY} lines")
    settings = parse_yaml(read_text(path), str(path))
    if settings is None:
        settings = {}
    if not isinstance(settings, dict):
        raise ConfigError(f"{path} holds a {type(settings).__name__} where sections with settings are expected")
    base = settings.pop(BASE_KEY, None)
    if base is None:
        return settings
    if not isinstance(base, str):
        raise ConfigError(f"{BASE_KEY} in {path} is {base!r}: give one file name")
    base_path = path.parent / base
    if not base_path.is_file():
        raise ConfigError(f"{path} extends {base_path}, which does not exist: correct its {BASE_KEY} line")
    return merge(read_settings(base_path, (*above, resolved)), settings)


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` laid over `base`: mappings are merged, everything else is replaced."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def parse_override(text: str) -> dict[str, Any]:
    """`section.key=value` as a nested mapping."""
    path, equals, value = text.partition("=")
    keys = path.strip().split(".")
    if not equals or len(keys) < 2 or not all(keys):
        raise ConfigError(f"{text!r} is not an override: write section.key=value, for example train.steps=100")
    nested: Any = parse_yaml(value, f"the value in {text!r}")
    for key in reversed(keys):
        nested = {key: nested}
    return nested


def setting_names(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every `section.key` of a model, sections included."""
    for name, field in model.model_fields.items():
        yield prefix + name
        for inner in (field.annotation, *get_args(field.annotation)):
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                yield from setting_names(inner, f"{prefix}{name}.")


def nearest_setting(unknown: str, model: type[BaseModel]) -> str | None:
    """The setting that `unknown` most likely means: the same key of another section, or the closest spelling; or
    None."""
    names = list(setting_names(model))
    key = unknown.rpartition(".")[2]
    elsewhere = [name for name in names if name.rpartition(".")[2] == key]
    close = difflib.get_close_matches(unknown, names, n=1, cutoff=0.6)
    return next(iter(elsewhere + close), None)


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """The first mistake in a validation error, as one sentence. A misspelt key comes before the keys that are then
    missing."""
    first = min(error.errors(), key=lambda mistake: mistake["type"] != "extra_forbidden")
    path = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        if path in RENAMED:
            return f"{path} is called {RENAMED[path]} now: write that"
        nearest = nearest_setting(".".join(part for part in first["loc"] if isinstance(part, str)), model)
        return f"there is no setting {path}" + (f": did you mean {nearest}?" if nearest else "")
    if first["type"] == "missing":
        return f"{path} is missing: set it"
    if first["type"] == "value_error":  # one of our own validators, whose message names the setting
        return str(first["ctx"]["error"])
    if first["type"] == "model_type":
        return f"{path} is {first['input']!r}, and it is a section: write {path}.key=value, or indent settings below it"
    return f"{path} is {first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}"


def with_present_names(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What an earlier version wrote, under the names that settings have now."""
    result = {name: dict(section) if isinstance(section, Mapping) else section for name, section in settings.items()}
    for old, new in RENAMED.items():
        (section, old_key), (_, new_key) = old.split("."), new.split(".")
        if isinstance(result.get(section), dict) and old_key in result[section]:
            result[section].setdefault(new_key, result[section].pop(old_key))
    return result


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; duplicate keys and numbers that are not finite are refused."""
    try:
        return decode_json(read_text(path))
    except ValueError as error:
        raise ConfigError(f"{path} cannot be used, {error}: correct it") from error
