"""What one node says of itself before a run: what must be the same everywhere, and what must suffice.

The package must be importable with nothing but what the trainer needs; a node where it is not says so in its own words.
"""

import hashlib
import os
import platform
import shutil
import socket
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch

from model.costs.arithmetic import total_parameters, trained_parameters
from pretrain.checkpoint.format import FP32_BYTES, KEYS
from pretrain.config.run import RunConfig, dump_config
from pretrain.device_check import check_device
from pretrain.errors import ConfigError
from pretrain.planning.rank_outlook import outlooks
from pretrain.provenance import git_revision, installed_versions
from pretrain.tokenizer.base import main_file

CORPUS_SUFFIXES = (".bin", ".idx", ".json")


@dataclass(frozen=True)
class NodeFacts:
    """One node's answers."""

    host: str
    slots: int
    error: str = ""
    """Why the settings cannot be read there; empty if they can. With an error the rest is missing."""
    python: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    revision: str = ""
    config: str = ""
    """Digest of the resolved settings."""
    gpus: list[tuple[str, int]] = field(default_factory=list)
    """Name and bytes of memory, in the order in which processes take them."""
    device_error: str = ""
    """Why training on these devices is impossible; empty if it is possible."""
    visible: str = ""
    """`CUDA_VISIBLE_DEVICES`; empty: all."""
    cores: int = 0
    memory_bytes: int = 0
    free_bytes: int = 0
    """Free bytes where checkpoints go."""
    files: dict[str, str] = field(default_factory=dict)
    """Sizes of corpus and tokenizer, by setting; `missing`."""
    sees_folder: bool = False
    """Whether this node sees the file that the first node has put where run.folder will be."""
    clock_seconds: float = 0.0
    """Seconds by which this node's clock is ahead of the first node's."""


def gather(config: RunConfig, slots: int, *, token: Path, clock_seconds: float) -> NodeFacts:
    """The facts of this node; `token` lies on the first node's run.folder."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else range(0)
    properties = [torch.cuda.get_device_properties(device) for device in devices]
    return NodeFacts(
        host=socket.gethostname(),
        slots=slots,
        python=platform.python_version(),
        versions=installed_versions(),
        revision=git_revision(),
        config=hashlib.sha256(dump_config(config).encode()).hexdigest()[:12],
        gpus=[(one.name, one.total_memory) for one in properties],
        device_error=_device_error(config.train.precision, min(slots, max(1, len(devices)))),
        visible=os.environ.get("CUDA_VISIBLE_DEVICES", ""),
        cores=len(psutil.Process().cpu_affinity()),
        memory_bytes=psutil.virtual_memory().total,
        free_bytes=shutil.disk_usage(nearest_folder(Path(config.run.folder))).free,
        files=_files(config),
        sees_folder=token.exists(),
        clock_seconds=clock_seconds,
    )


def _device_error(precision: str, processes: int) -> str:
    try:
        check_device(precision, processes)
    except ConfigError as error:
        return str(error)
    return ""


def nearest_folder(path: Path) -> Path:
    """The folder itself, or the nearest one above it that is there."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.is_dir())


def checkpoints_bytes(config: RunConfig) -> int:
    """The most that retained checkpoints take, with the one that is being written. The vocabulary must be known."""
    ahead = outlooks(config)
    ahead = ahead[:-1] or ahead  # the last one is the dense model, for comparison
    numbers = max(
        total_parameters(one.model, one.ranks) + (len(KEYS) - 1) * trained_parameters(one.model, one.ranks)
        for one in ahead
    )
    return FP32_BYTES * numbers * (config.checkpoint.keep + 1)


def tokenizer_file(config: RunConfig) -> Path:
    """The file that is read as `data.tokenizer`, which may name its folder."""
    path = Path(config.data.tokenizer)
    name = main_file({file.name for file in path.iterdir()}) if path.is_dir() else None
    return path / name if name else path


def _files(config: RunConfig) -> dict[str, str]:
    """Sizes by name; a name begins with the setting."""
    data = config.data
    trained_on = "data.prefix" if data.blend is None else "data.blend"
    named = [(trained_on, prefix) for prefix in data.weights()]
    named += [("data.validation", prefix) for prefix in data.validation.values()]
    paths = {f"{name} {prefix}{suffix}": Path(prefix + suffix) for name, prefix in named for suffix in CORPUS_SUFFIXES}
    paths["data.tokenizer"] = tokenizer_file(config)
    return {name: f"{path.stat().st_size:,} bytes" if path.is_file() else "missing" for name, path in paths.items()}
