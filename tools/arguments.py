"""Types of arguments that several tools take."""

import argparse
import re

from pretrain.errors import ConfigError

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_bytes(text: str) -> int:
    """`4GB`, `500 MB`, `2GiB` or a plain number of bytes; ConfigError for anything else."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)", text.strip())
    size = int(float(match[1]) * _UNITS.get(match[2].upper(), 0)) if match else 0
    if size < 1:
        raise ConfigError(f"{text!r} is not a size: give --max-shard-size as 4GB, 500MB or 2GiB")
    return size


def positive(text: str) -> int:
    """A whole number above 0, as argparse wants a type."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not above 0")
    return number
