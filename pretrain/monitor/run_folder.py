"""A run's folder: whether it is ours to write, and the resolved config in it."""

import platform
from collections.abc import Sequence
from pathlib import Path

from pretrain.config.files import read_settings, with_present_names
from pretrain.config.run import RunConfig, dump_config, parse_config
from pretrain.disk import replace_text
from pretrain.errors import ConfigError
from pretrain.provenance import git_revision, installed_versions

CONFIG_FILE = "config.yaml"
SIGNATURE = "# Espalier run"
LOGS_FOLDER = "logs"
"""Folder of the processes' logs in a run over several nodes."""


def refuse_foreign_folder(folder: Path, expected: Sequence[str] = ()) -> None:
    """ConfigError if `folder` holds something that is not a run of ours: nothing is written among other files.

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


def recorded_config(folder: Path) -> RunConfig:
    """The resolved config that a run wrote into its folder, with this version or an earlier one; ConfigError if there
    is none."""
    record = folder / CONFIG_FILE
    if not record.is_file():
        raise ConfigError(f"{folder} is no run folder, it has no {CONFIG_FILE}: give a run.folder")
    return parse_config(with_present_names(read_settings(record)))


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
