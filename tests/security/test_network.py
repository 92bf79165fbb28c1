"""TensorBoard, as the README and the scripts start it, is for this machine alone."""

import re
import shlex
from pathlib import Path

import pytest
from tensorboard import program  # type: ignore[import-untyped]

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = [
    (file, options)
    for file in ("README.md", "launch/quickstart.sh")
    for options in re.findall(r"\btensorboard (--[^\n`]*)", (ROOT / file).read_text())
]


def listening_address(options: list[str]) -> str:
    board = program.TensorBoard()
    board.configure(["tensorboard", *options, "--port", "0"])
    server = program.WerkzeugServer(lambda environment, start_response: [], board.flags)
    try:
        address: str = server.socket.getsockname()[0]
        return address
    finally:
        server.server_close()


@pytest.mark.parametrize(("file", "options"), COMMANDS)
def test_tensorboard_listens_on_the_loopback_interface(file: str, options: str) -> None:
    assert listening_address(shlex.split(options, comments=True)) in ("127.0.0.1", "::1")


def test_there_are_such_commands_and_others_would_show() -> None:
    assert {file for file, _ in COMMANDS} == {"README.md", "launch/quickstart.sh"}
    assert listening_address(["--logdir", "runs", "--bind_all"]) in ("0.0.0.0", "::")
