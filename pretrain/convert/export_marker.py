"""Marks our exports, so that replacing one never removes somebody's files.

An export holds `espalier.json` with its kind and the list of its files. A folder that holds any other file is not ours.
"""

import shutil
from pathlib import Path
from typing import Any

from pretrain.convert.consolidated import FACTS_LIMIT_BYTES, FACTS_NAME
from pretrain.disk import read_json
from pretrain.errors import CheckpointError

DENSE_EXPORT, ADAPTER_EXPORT = "dense_export", "adapter_export"
TITLES = {DENSE_EXPORT: "a dense export", ADAPTER_EXPORT: "an adapter export"}
_SPARE_BYTES = 64 * 2**20
"""Bytes for settings, tokenizer and headers."""


def read_marker(folder: Path, kind: str) -> dict[str, Any] | None:
    """The facts of an earlier export of this kind in `folder`; None if there is none."""
    path = folder / FACTS_NAME
    if not path.is_file():
        return None
    facts = read_json(path, FACTS_LIMIT_BYTES)
    files = facts.get("files")
    known = isinstance(files, list) and all(isinstance(file, str) for file in files)
    return facts if known and facts.get("kind") == kind else None


def files_below(folder: Path) -> list[str]:
    """Paths of all files in and below `folder`, relative to it."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())


def check_source(source: Path) -> None:
    """CheckpointError if `source`, which should be a consolidated model, was written by an export tool."""
    for kind, title in TITLES.items():
        if read_marker(source, kind) is not None:
            raise CheckpointError(f"{source} is {title} already: give a consolidated model as --input")


def check_output(output: Path, source: Path, kind: str, *, overwrite: bool) -> None:
    """An `EspalierError` if the export must not be written to `output`."""
    title = TITLES[kind]
    if output == source or source.is_relative_to(output) or output.is_relative_to(source):
        raise CheckpointError(f"--output {output} and --input {source} lie inside each other: choose another --output")
    if not output.exists():
        return
    if not output.is_dir():
        raise CheckpointError(f"{output} is a file: choose another --output")
    if not any(output.iterdir()):
        return
    marker = read_marker(output, kind)
    foreign = set(files_below(output)) - set(marker["files"] if marker else ())
    if foreign:
        raise CheckpointError(
            f"{output} holds {min(foreign)}, which is not part of {title} of Espalier and which replacing the "
            "folder would remove: choose another --output"
        )
    if not overwrite:
        raise CheckpointError(f"{output} is {title} already: pass --overwrite to replace it")


def check_disk(output: Path, needed_bytes: int) -> None:
    """CheckpointError if the export does not fit on the disk of `output`."""
    existing = next(folder for folder in output.parents if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < needed_bytes + _SPARE_BYTES:
        raise CheckpointError(
            f"the export needs {needed_bytes / 1e9:.2f} GB and the disk of {existing} has {free / 1e9:.2f} GB free: "
            "free some space, choose another --output, or pass --dtype bfloat16"
        )
