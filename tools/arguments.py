"""Types of arguments that several tools take."""

import argparse
import contextlib
import os
from pathlib import Path

from pydantic import ByteSize, TypeAdapter, ValidationError

from pretrain.errors import ConfigError

_SIZE = TypeAdapter(ByteSize)


def parse_bytes(text: str) -> int:
    """`4GB`, `500 MB`, `2GiB` or a plain number of bytes; ConfigError for anything else."""
    with contextlib.suppress(ValidationError):
        if (size := _SIZE.validate_python(text.strip())) > 0:
            return size
    raise ConfigError(f"{text!r} is not a size: write 4GB, 500MB or 2GiB")


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
