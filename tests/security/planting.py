"""Puts hostile files in place of good ones, and says how they were refused."""

import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest

from pretrain.checkpoint.format import MANIFEST_NAME
from pretrain.disk import file_checksum
from pretrain.errors import EspalierError
from tests.support.checkpoint_cases import edit_manifest

STEP = "step_000000010"
"""The checkpoint of the `world`."""


def command(tool: object, *arguments: object) -> None:
    """A tool as its command line runs it."""
    with patch.object(sys, "argv", ["tool", *map(str, arguments)]):
        tool.main()  # type: ignore[attr-defined]


def plant(file: Path, content: bytes) -> None:
    """Replaces a file; a manifest beside it says so, as one would whose author means harm."""
    file.write_bytes(content)
    if file.name != MANIFEST_NAME and (file.parent / MANIFEST_NAME).exists():

        def admit(manifest: dict) -> None:
            record = next(r for r in manifest["shards"] + manifest["extra_files"] if r["file"] == file.name)
            record.update(bytes=len(content), checksum=file_checksum(file))

        edit_manifest(file.parent, admit)


def refusal(read: Callable[[Path], object], folder: Path) -> str:
    """The one sentence with which `read` refuses `folder`; it says where."""
    with pytest.raises(EspalierError) as refused:
        read(folder)
    message = str(refused.value)
    assert "\n" not in message
    assert str(folder) in message
    return message
