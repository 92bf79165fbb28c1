"""Keeps a run going: starts its command again after a fault, from the newest checkpoint, until it ends in order.

    python launch/supervise.py deepspeed --num_gpus 8 pretrain/train.py --config FILE run.folder=runs/x

Before a start it waits: `--wait` seconds, twice as long after every life without a new checkpoint, at most five
minutes. After `--attempts` lives in a row that all ended before the next checkpoint it stops and says what they died
of. A run that ended in order (0), was refused (2), has no usable checkpoint or disk (3), makes no numerical sense (4)
or was asked to end (130, 138, 143) is not started again, and its exit code is the supervisor's own.

With `--hostfile FILE` in the command, hosts that do not answer to ssh are left out, as far as the run divides over the
others. SIGTERM and SIGUSR1 are passed on to the training processes of this node.
"""

import argparse
import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import psutil

from pretrain.checkpoint_reader import step_folders
from pretrain.config import RunConfig, load_config
from pretrain.errors import ConfigError, EspalierError, run_command
from pretrain.faults import LIFE

FINAL_CODES = {0, 2, 3, 4, 130, 138, 143}
LONGEST_WAIT_SECONDS = 300.0
LONGEST_SAVE_SECONDS = 600.0
"""Of processes that the launcher has left behind."""
POLL_SECONDS = 0.5
SSH_SECONDS = 5
HOST = re.compile(r"([A-Za-z0-9][A-Za-z0-9.-]*)\s+slots=([1-9][0-9]*)\s*(?:#.*)?")

WORDS = re.compile(r"(?:\[rank\d+\]: *)?((?:error|[\w.]*Error): .*)")
"""What a process says of its end; torch puts its number in front of tracebacks."""


class Supervisor:
    """One command, and its lives."""

    def __init__(self, command: Sequence[str], wait_seconds: float, attempts: int) -> None:
        self.command, self.wait_seconds, self.attempts = list(command), wait_seconds, attempts
        self.config = config_of(command)
        self.checkpoints = Path(self.config.run.folder) / "checkpoints"
        self.asked: int = 0
        self.running: subprocess.Popen[str] | None = None
        self.workers: set[psutil.Process] = set()
        self.last_words: deque[str] = deque(maxlen=5)

    def run(self) -> int:
        """The exit code of the last life."""
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._pass_on)
        life, fruitless, deaths = 0, 0, list[int]()
        while True:
            before = newest_step(self.checkpoints)
            code = self._live(life)
            if self.asked:
                return 128 + self.asked
            after = newest_step(self.checkpoints)
            # The deepspeed launcher says 0, too, when what it started was killed.
            if code in FINAL_CODES and (code or after >= self.config.train.steps):
                return code
            fruitless = 0 if after != before else fruitless + 1
            deaths = [*deaths, code] if fruitless else []
            if fruitless >= self.attempts:
                words = "; ".join(self.last_words) or "nothing"
                raise EspalierError(
                    f"{fruitless} starts in a row ended before the checkpoint after step {after}, with exit codes "
                    f"{', '.join(map(str, deaths))}: the same fault comes back. The last one said: {words}"
                )
            wait = min(self.wait_seconds * 2**fruitless, LONGEST_WAIT_SECONDS)
            print(f"[supervise] exit code {code}; starting again from step {after} in {wait:g} s", flush=True)
            life += 1
            self._sleep(wait)
            if self.asked:
                return 128 + self.asked

    def _live(self, life: int) -> int:
        self.last_words.clear()
        with tempfile.TemporaryDirectory() as folder:
            command = with_hosts_that_answer(self.command, self.config, Path(folder))
            environment = os.environ | {LIFE: str(life)}
            self.running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
            reader = threading.Thread(target=self._listen, args=(self.running,), daemon=True)
            reader.start()
            while self.running.poll() is None:
                self.workers |= training_processes(self.running.pid)
                time.sleep(POLL_SECONDS)
            self._wait_for_the_left_behind()
            reader.join(1.0)
            code = self.running.returncode
            return code if code >= 0 else 128 - code

    def _wait_for_the_left_behind(self) -> None:
        """A launcher that was killed leaves its processes training; they are asked to save and end."""
        left = [one for one in self.workers if one.is_running()]
        for one in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.send_signal(self.asked or signal.SIGTERM)
        _, left = psutil.wait_procs(left, timeout=LONGEST_SAVE_SECONDS)
        for one in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        self.workers = set()

    def _listen(self, running: "subprocess.Popen[str]") -> None:
        for line in running.stderr or ():
            sys.stderr.write(line)
            if match := WORDS.match(line):
                self.last_words.append(match[1].strip())

    def _pass_on(self, number: int, _frame: FrameType | None) -> None:
        """To the training processes themselves: the deepspeed launcher keeps signals from them on one node."""
        self.asked = number
        if self.running is None or self.running.poll() is not None:
            return
        for one in training_processes(self.running.pid) or {psutil.Process(self.running.pid)}:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.send_signal(number)

    def _sleep(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not self.asked and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, 0.2))


def training_processes(launcher: int) -> set[psutil.Process]:
    """Those below a launcher that have a place in the run."""
    found = set()
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(launcher).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if "RANK" in child.environ() and any(word.endswith("train.py") for word in child.cmdline()):
                    found.add(child)
    return found


def config_of(command: Sequence[str]) -> RunConfig:
    """The settings in `... pretrain/train.py --config FILE section.key=value ...`."""
    place = next((number for number, word in enumerate(command) if word.endswith("train.py")), None)
    if place is None:
        raise ConfigError(f"there is no pretrain/train.py in {' '.join(command)!r}: give the whole command of the run")
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    parser.add_argument("--config", required=True)
    parser.add_argument("overrides", nargs="*")
    known, _ = parser.parse_known_intermixed_args(command[place + 1 :])
    return load_config(known.config, known.overrides)


def newest_step(checkpoints: Path) -> int:
    """Of what is there by its name; 0: none."""
    found = step_folders(checkpoints)
    return int(re.sub(r"\D", "", found[0].name)) if found else 0


def with_hosts_that_answer(command: Sequence[str], config: RunConfig, folder: Path) -> list[str]:
    """The command, its hostfile replaced where hosts do not answer."""
    place = next((number for number, word in enumerate(command) if word in ("--hostfile", "-H")), None)
    if place is None:
        return list(command)
    hosts = read_hosts(Path(command[place + 1]))
    answering = [(host, slots) for host, slots in hosts if answers(host)]
    if len(answering) == len(hosts):
        return list(command)
    gone = ", ".join(host for host, _ in hosts if (host, _) not in answering)
    kept = most_that_divide(answering, config)
    print(f"[supervise] {gone} does not answer; going on with {', '.join(host for host, _ in kept)}", flush=True)
    file = folder / "hosts"
    file.write_text("".join(f"{host} slots={slots}\n" for host, slots in kept), encoding="utf-8")
    return [*command[: place + 1], str(file), *command[place + 2 :]]


def read_hosts(path: Path) -> list[tuple[str, int]]:
    """Names and slots of a hostfile."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}): give another --hostfile") from error
    hosts = []
    for line in lines:
        if not line or line.startswith("#"):
            continue
        match = HOST.fullmatch(line)
        if match is None:
            raise ConfigError(f"{path}: {line!r} is not `host slots=NUMBER`")
        hosts.append((match[1], int(match[2])))
    if not hosts:
        raise ConfigError(f"{path} names no host: list them as `host slots=NUMBER`")
    return hosts


def answers(host: str) -> bool:
    if host in ("localhost", "127.0.0.1"):
        return True
    ssh = ["ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={SSH_SECONDS}", "--", host, "true"]
    return subprocess.run(ssh, stdin=subprocess.DEVNULL, capture_output=True, check=False).returncode == 0


def most_that_divide(hosts: Sequence[tuple[str, int]], config: RunConfig) -> Sequence[tuple[str, int]]:
    """The most of the first hosts over which the run divides; ConfigError if there are none."""
    for count in range(len(hosts), 0, -1):
        try:
            config.layout(sum(slots for _, slots in hosts[:count]))
        except ConfigError:
            continue
        return hosts[:count]
    raise ConfigError(
        f"{len(hosts)} hosts answer, and the run divides over none of their numbers: change train.global_batch, or "
        "bring the others back"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Start a run again after faults, from its newest checkpoint.")
    parser.add_argument("--wait", type=float, default=5.0, metavar="SECONDS", help="before a new start (5)")
    parser.add_argument("--attempts", type=int, default=3, help="lives in a row without a new checkpoint (3)")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="the whole command of the run")
    arguments = parser.parse_args()
    if not arguments.command:
        raise ConfigError("there is nothing to start: give the whole command of the run, deepspeed and all")
    if arguments.wait < 0 or arguments.attempts < 1:
        raise ConfigError("--wait is 0 or more, and --attempts 1 or more")
    sys.exit(Supervisor(arguments.command, arguments.wait, arguments.attempts).run())


if __name__ == "__main__":
    run_command(main)
