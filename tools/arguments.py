"""Types of arguments that several tools take."""

import argparse
import os
import re
from pathlib import Path

from pretrain.errors import ConfigError

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_bytes(text: str) -> int:
    """`4GB`, `500 MB`, `2GiB` or a plain number of bytes; ConfigError for anything else."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)", text.strip())
    size = int(float(match[1]) * _UNITS.get(match[2].upper(), 0)) if match else 0
    if size < 1:
        raise ConfigError(f"{text!r} is not a size: write 4GB, 500MB or 2GiB")
    return size


def positive(text: str) -> int:
    """A whole number above 0, as argparse wants a type."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not above 0")
    return number


def above_zero(text: str) -> float:
    """A number above 0."""
    number = float(text)
    if not number > 0.0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


def output_file(text: str) -> Path:
    """A file to write at the end of long work, in a folder that is there from the beginning."""
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {path.parent}: make it, or name another file")
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{path} cannot be written: name another file")
    return path
