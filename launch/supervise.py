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

from launch.hosts import most_that_divide, read_hosts, silences, write_hosts
from pretrain.checkpoint.reader import step_folders
from pretrain.config.run import RunConfig, load_config
from pretrain.errors import ConfigError, EspalierError, run_command
from pretrain.resilience.fault_injection import LIFE

FINAL_CODES = {0, 2, 3, 4, 130, 138, 143}
LONGEST_WAIT_SECONDS = 300.0
LONGEST_SAVE_SECONDS = 600.0
"""Longest time that processes may take to save and end when their launcher has left them behind."""
POLL_SECONDS = 0.5
FIRST_WAIT_SECONDS = 5.0
"""Seconds before hosts are asked a second time, when none has answered."""

WORDS = re.compile(r"(?:\[rank\d+\]: *)?((?:error|[\w.]*Error): .*)")
"""What a process says of its end; torch puts its number in front of tracebacks."""


class Supervisor:
    """Runs one command, and starts it again when it ends by a fault."""

    def __init__(self, command: Sequence[str], wait_seconds: float, attempts: int) -> None:
        self.command, self.wait_seconds, self.attempts = list(command), wait_seconds, attempts
        self.config = config_of(command)
        self.checkpoints = Path(self.config.run.folder) / "checkpoints"
        self.asked: int = 0
        self.running: subprocess.Popen[str] | None = None
        self.workers: set[psutil.Process] = set()
        self.last_words: deque[str] = deque(maxlen=5)

    def run(self) -> int:
        """Runs the command until it has ended for good; the exit code of its last start."""
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
        """Passes a signal on to the training processes: on one node the deepspeed launcher keeps it from them."""
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
    """The processes below a launcher that train: they have a rank in the run."""
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
    """Step of the newest checkpoint by its folder's name; 0 if there is none."""
    found = step_folders(checkpoints)
    return int(re.sub(r"\D", "", found[0].name)) if found else 0


def hostfile_of(command: Sequence[str]) -> tuple[int, Path] | None:
    """Where a command names its hostfile, and which; in all spellings that `deepspeed` takes."""
    for place, word in enumerate(command):
        option, equals, value = word.partition("=")
        if option in ("--hostfile", "-H"):
            return (place, Path(value)) if equals else (place + 1, Path(command[place + 1]))
    return None


def with_hosts_that_answer(command: Sequence[str], config: RunConfig, folder: Path) -> list[str]:
    """The command, its hostfile replaced where hosts do not answer. While none does, it waits: that is a fault of the
    network, or of this node."""
    found = hostfile_of(command)
    if found is None:
        return list(command)
    place, hostfile = found
    hosts, wait = read_hosts(hostfile), FIRST_WAIT_SECONDS
    while len(silent := silences(hosts)) == len(hosts):
        print(f"[supervise] no host answers ({silent[hosts[0]]}); asking again in {wait:g} s", flush=True)
        time.sleep(wait)
        wait = min(2 * wait, LONGEST_WAIT_SECONDS)
    if not silent:
        return list(command)
    kept = most_that_divide([host for host in hosts if host not in silent], config)
    names = [", ".join(host.name for host in some) for some in (silent, kept)]
    print(f"[supervise] {names[0]} does not answer; going on with {names[1]}", flush=True)
    file = folder / "hosts"
    write_hosts(file, kept)
    option = "--hostfile=" if "=" in command[place] else ""
    gone = {host.name for host in silent}
    words = [
        kept[0].name if word in gone and command[n - 1] == "--master_addr" else word for n, word in enumerate(command)
    ]
    return [*words[:place], f"{option}{file}", *words[place + 1 :]]


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
