"""The files of a run's folder that people read: its resolved config, and one JSON object per line of metrics and
events.

A resumed run goes on in the same files. Metrics of steps behind the checkpoint it resumes from are cut first, for those
steps are taken again; events are history and stay. A line torn by a kill is dropped.
"""

import contextlib
import json
import math
import os
import platform
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from pretrain.config.run import RunConfig, dump_config
from pretrain.errors import ConfigError

CONFIG_FILE = "config.yaml"
SIGNATURE = "# Espalier run"
LOGS_FOLDER = "logs"
"""Of the processes of a run over several nodes."""
PACKAGES = ("torch", "deepspeed", "megatron-core", "numpy", "sentencepiece")


def refuse_foreign_folder(folder: Path, expected: Sequence[str] = ()) -> None:
    """ConfigError if `folder` holds something that is not a run of ours: we write nothing among others' files.

    `expected`: what may lie in a new folder, such as the run's own corpus (with any suffix) and tokenizer.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ConfigError(f"run.folder {folder} is a file: set run.folder to a new folder")
    record = folder / CONFIG_FILE
    if record.is_file():
        with record.open(encoding="utf-8", errors="replace") as lines:
            if lines.readline().startswith(SIGNATURE):
                return
    known = {Path(path).resolve() for path in expected}
    if not all({entry.resolve(), entry.resolve().with_suffix("")} & known for entry in folder.iterdir()):
        raise ConfigError(
            f"run.folder {folder} is not empty and holds no Espalier run ({CONFIG_FILE}): "
            "set run.folder to a new or empty folder"
        )


def write_run_record(folder: Path, config: RunConfig) -> None:
    """Writes the resolved config, under versions and git revision as comments.

    `--config FOLDER/config.yaml` repeats the run.
    """
    header = [f"{SIGNATURE}; resolved config", f"# python {platform.python_version()}", f"# git {git_revision()}"]
    header += [f"# {name} {version}" for name, version in installed_versions().items()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        replace_text(folder / CONFIG_FILE, "\n".join(header) + "\n" + dump_config(config))
    except OSError as error:
        raise ConfigError(
            f"run.folder {folder} cannot be written ({error.strerror}): set run.folder to another place"
        ) from error


def installed_versions() -> dict[str, str]:
    """Versions of the packages that decide what a run computes."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def git_revision() -> str:
    """Revision of the source tree, marked `-dirty` if files differ from it; `unknown` outside a work tree."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return "unknown"
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10.0, check=False)
    except (OSError, subprocess.TimeoutExpired):  # no git here, or a work tree on a slow file system: not worth a run
        return "unknown"
    return answer.stdout.strip() or "unknown"


def replace_text(path: Path, text: str) -> None:
    """Writes a whole file, or leaves the old one."""
    replace_bytes(path, text.encode())


def replace_bytes(path: Path, content: bytes) -> None:
    """Writes a whole file, or leaves the old one."""
    staging = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with staging.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        staging.replace(path)
    finally:
        staging.unlink(missing_ok=True)


def json_text(value: Any, indent: int | None = None) -> str:
    """JSON for any reader: NaN and infinity, which JSON lacks, become null."""

    def finite(item: Any) -> Any:
        if isinstance(item, dict):
            return {key: finite(inner) for key, inner in item.items()}
        if isinstance(item, (list, tuple)):
            return [finite(inner) for inner in item]
        return None if isinstance(item, float) and not math.isfinite(item) else item

    return json.dumps(finite(value), indent=indent, allow_nan=False)


class JsonLines:
    """A file of one JSON object per line."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, record: dict[str, Any]) -> None:
        """Adds one line; on an OSError the file is as before."""
        line = json_text(record) + "\n"
        with self.path.open("ab", buffering=0) as file:
            before = file.tell()
            try:
                if file.write(line.encode()) < len(line.encode()):
                    raise OSError(f"{self.path} took only part of a line")
            except OSError:
                file.truncate(before)
                raise

    def read(self) -> list[dict[str, Any]]:
        """All records; a line that holds none, such as one that a kill tore, is left out."""
        if not self.path.exists():
            return []
        records = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError, RecursionError):
                record = json.loads(line)
                if isinstance(record, dict) and isinstance(record.get("step"), int):
                    records.append(record)
        return records

    def cut(self, last_step: int | None) -> None:
        """Drops a torn line, and lines whose step is after `last_step` (None: keeps all steps)."""
        if not self.path.exists():
            return
        kept = [record for record in self.read() if last_step is None or record["step"] <= last_step]
        replace_text(self.path, "".join(json_text(record) + "\n" for record in kept))
