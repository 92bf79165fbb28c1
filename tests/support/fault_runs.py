"""Whole training runs on processes of their own, which faults may kill: outputs and exit codes come back.

A server process imports everything once and forks for each process of a run, so that a run starts in a second.
"""

import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pretrain.checkpoint.format import KEYS
from pretrain.checkpoint.reader import CheckpointReader, find_checkpoint, step_folders
from pretrain.distributed import free_port
from tests.support.training_runs import curve

_forkserver = multiprocessing.get_context("forkserver")
_forkserver.set_forkserver_preload(["tests.support.fault_imports"])

RUN_SECONDS = 90.0
MARKER = "fault-run"


@dataclass
class Ended:
    """What a run left: exit codes by process (−9: killed), what each said, and how long it took."""

    codes: list[int | None]
    stderr: list[str]
    stdout: list[str]
    seconds: float

    @property
    def said(self) -> list[str]:
        """Error lines of all processes, each once."""
        lines = [line for text in self.stderr for line in text.splitlines() if line.startswith("error: ")]
        return list(dict.fromkeys(lines))


class Started:
    """A run on `processes` processes of the loopback interface."""

    def __init__(self, config: Path, overrides: Sequence[str], processes: int, faults: str, outputs: Path) -> None:
        self.outputs, self.began = outputs, time.monotonic()
        outputs.mkdir(parents=True, exist_ok=True)
        arguments = ["--config", str(config), *overrides]
        port = str(free_port())
        self.processes = []
        for number in range(processes):
            environment = {
                "RANK": str(number),
                "LOCAL_RANK": str(number),
                "WORLD_SIZE": str(processes),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "GLOO_SOCKET_IFNAME": "lo",
                "OMP_NUM_THREADS": "1",
                "CUDA_VISIBLE_DEVICES": "",
                "ESPALIER_FAULT": faults,
            }
            process = _forkserver.Process(target=_work, args=(arguments, environment, str(outputs / str(number))))
            process.start()
            self.processes.append(process)

    def output(self, number: int) -> str:
        return _text(self.outputs / f"{number}.out")

    def wait_for(self, text: str, number: int = 0) -> None:
        """Waits until process `number` has printed `text`."""
        end = time.monotonic() + RUN_SECONDS
        while text not in self.output(number):
            if time.monotonic() > end or not self.processes[number].is_alive():
                raise AssertionError(
                    f"never said {text!r}: {self.output(number)}{_text(self.outputs / f'{number}.err')}"
                )
            time.sleep(0.02)

    def signal(self, number: int, what: signal.Signals) -> None:
        os.kill(self.processes[number].pid or 0, what)

    def end(self, seconds: float = RUN_SECONDS) -> Ended:
        """Waits; what is still there after `seconds` is killed, and has no exit code."""
        codes: list[int | None] = []
        last = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(last - time.monotonic(), 0.0))
            codes.append(process.exitcode)
        taken = time.monotonic() - self.began
        for process in self.processes:
            if process.is_alive():
                process.kill()
                process.join()
        places = range(len(self.processes))
        errors = [_text(self.outputs / f"{number}.err") for number in places]
        return Ended(codes, errors, [self.output(number) for number in places], taken)


def train(config: Path, *overrides: str, processes: int = 2, faults: str = "", outputs: Path | None = None) -> Ended:
    """A run to its end, whatever that is."""
    outputs = outputs or config.parent / f"outputs_{time.monotonic_ns()}"
    return Started(config, overrides, processes, faults, outputs).end()


def assert_same_end(run: Path, other: Path) -> None:
    """Masters and moments of both runs' newest checkpoints are the same bits, and so is every logged loss."""
    newest = [find_checkpoint(one / "checkpoints", verify=True) for one in (run, other)]
    mine, theirs = (CheckpointReader(one) for one in newest if one is not None)
    assert mine.step == theirs.step
    assert mine.state["ranks"] == theirs.state["ranks"]
    for name in theirs.layouts:
        for key in KEYS:
            assert torch.equal(mine.read(name, key), theirs.read(name, key)), (name, key)
    assert curve(run) == curve(other)


def events_of(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == kind]


def steps_of(run: Path) -> list[int]:
    """Steps of the checkpoints, oldest first."""
    return [CheckpointReader(one).step for one in reversed(step_folders(run / "checkpoints"))]


def _work(arguments: Sequence[str], environment: Mapping[str, str], output: str) -> None:
    os.environ.update(environment)
    for descriptor, suffix in ((1, "out"), (2, "err")):
        file = os.open(f"{output}.{suffix}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, descriptor)
        os.close(file)
    sys.argv = ["pretrain/train.py", *arguments]
    from pretrain.errors import run_command
    from pretrain.train import main

    run_command(main)


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[None]:
    """`folder` as a file system of its own; root alone can make one."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
