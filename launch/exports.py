"""Which variables of the environment go along to other nodes, and how: in a file of plain words.

DeepSpeed reads `NAME=VALUE` lines, by itself from `.deepspeed_env` in the home and in the current folder, and writes
them into a command of a remote shell, where `$(...)` would run. So the file is ours, named by `DS_ENV_FILE`, it holds
what is listed here and no more, and a value that a shell would take apart is refused.
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from pretrain.errors import ConfigError

PREFIXES = ("ESPALIER_", "GLOO_", "NCCL_", "TORCH_", "UCX_")
NAMES = (
    "CUDA_DEVICE_MAX_CONNECTIONS",
    "HF_HUB_OFFLINE",
    "LD_LIBRARY_PATH",
    "OMP_NUM_THREADS",
    "TOKENIZERS_PARALLELISM",
)
DEEPSPEED_PREFIXES = ("MLFLOW", "MV2", "PYTHON", "UCX")
"""Beginnings of the variables that DeepSpeed sends by itself."""
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_VALUE = re.compile(r"[A-Za-z0-9_@%+=:,./^ -]*")
STALE_NAME = ".deepspeed_env"


def exported(environment: Mapping[str, str], names: Sequence[str]) -> dict[str, str]:
    """Variables that go along to all hosts: those known to matter, and those that the user names."""
    for name in names:
        if not _NAME.fullmatch(name):
            raise ConfigError(f"--export {name!r} is not the name of a variable")
        if name not in environment:
            raise ConfigError(f"--export {name}: the variable is not set here")
    found = {
        name: value
        for name, value in sorted(environment.items())
        if name.startswith(PREFIXES) or name in NAMES or name in names
    }
    sent = found | {name: value for name, value in environment.items() if name.startswith(DEEPSPEED_PREFIXES)}
    for name, value in sent.items():
        if not (_NAME.fullmatch(name) and _VALUE.fullmatch(value)):
            raise ConfigError(
                f"the variable {name} would go to all nodes, and its value {value!r} holds what a shell takes apart: "
                "set it to plain words, or unset it"
            )
    return found


def refuse_stale_files() -> None:
    """ConfigError where a file of DeepSpeed's own lies about, which this launch would not read."""
    for folder in (Path.home(), Path.cwd()):
        path = folder / STALE_NAME
        if path.exists():
            raise ConfigError(
                f"{path} is left from another launch, and is not read by this one: set what it holds as variables here "
                "(--export NAME sends them along), and remove it"
            )


def write_exports(path: Path, variables: Mapping[str, str]) -> None:
    """Writes the file that `DS_ENV_FILE` names."""
    path.write_text("".join(f"{name}={value}\n" for name, value in variables.items()), encoding="utf-8")


def with_exports(path: Path) -> dict[str, str]:
    """The environment of a `deepspeed` that reads the file at `path`."""
    return os.environ | {"DS_ENV_FILE": str(path.absolute())}
