"""Files that run code when they are unpickled or loaded as unsafe YAML. The code makes a folder, the canary."""

import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch


class Bait:
    """Unpickled, it makes the folder `canary`."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.canary),)


def pickled(canary: Path) -> bytes:
    return pickle.dumps(Bait(canary))


def pickled_as_text(canary: Path) -> bytes:
    """Protocol 0: ASCII, so that no decoder stops it."""
    return pickle.dumps(Bait(canary), protocol=0)


def torch_file(canary: Path) -> bytes:
    """What `torch.save` writes: a zip file with a pickle inside."""
    buffer = io.BytesIO()
    torch.save({"weight": Bait(canary)}, buffer)
    return buffer.getvalue()


def array_file(canary: Path) -> bytes:
    """A `.npy` file of Python objects."""
    buffer = io.BytesIO()
    np.save(buffer, np.array([Bait(canary)], dtype=object), allow_pickle=True)
    return buffer.getvalue()


PICKLES: dict[str, Callable[[Path], bytes]] = {
    "pickle": pickled,
    "text": pickled_as_text,
    "torch": torch_file,
    "numpy": array_file,
}


def yaml_texts(canary: Path) -> list[str]:
    """Tags of PyYAML's unsafe loaders, as a file's root and inside a section."""
    return [
        f'!!python/object/apply:os.mkdir ["{canary}"]\n',
        f'train: !!python/object/apply:os.mkdir ["{canary}"]\n',
        f'train: {{steps: !<tag:yaml.org,2002:python/object/apply:os.mkdir> ["{canary}"]}}\n',
        f'%TAG ! tag:yaml.org,2002:python/\n---\ntrain: !object/apply:os.mkdir ["{canary}"]\n',
        f"train: !!python/object/new:os.mkdir {{args: ['{canary}']}}\n",
    ]
