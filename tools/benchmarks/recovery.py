"""Measures what faults cost a run of two processes: seconds until it has ended, until it is under way again, and steps
taken once more.

    python tools/benchmarks/recovery.py --config quickstart --out /tmp/recovery --json recovery.json \\
        data.prefix=CORPUS data.tokenizer=MODEL

For every row a run of 12 steps is begun anew, saves every 3, grows its ranks after steps 4 and 8, and meets one fault
of `pretrain/resilience/fault_injection.py`:

end_seconds      from the fault to the end of the last process; empty where the run goes on by itself
again_seconds    from a new start of the same command to the end of its first step, launch and imports included; for a
                 run that goes on, from the fault to the end of the next step
steps_again      steps that were taken before the fault and had to be taken again
codes            exit codes of the processes
"""

import argparse
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from pretrain.disk import json_text, replace_text
from pretrain.distributed import free_port
from pretrain.errors import ConfigError, EspalierError, run_command
from pretrain.provenance import git_revision, hardware, installed_versions
from pretrain.resilience.fault_injection import VARIABLE
from tools.arguments import output_file

PROCESSES = 2
SETTINGS = (
    *("train.steps=12", "train.log_every=1", "train.validate_every=0", "schedule.warmup_steps=2"),
    *("rank.policy=schedule", "rank.initial=16", "rank.quantum=16", "checkpoint.every=3"),
    "rank.schedule=[{step: 4, rank: 32}, {step: 8, rank: 48}]",
)
HANG = "guard.hang_seconds=20"
ROWS: dict[str, tuple[str, ...]] = {
    "kill@step.forward:1:8": (),
    "kill@step.optimizer:0:8": (),
    "kill@save.shard:1:6": (),
    "kill@save.manifest:0:6": (),
    "kill@save.renamed:0:6": (),
    "kill@event.changed:1:8": (),
    "kill@event.restored:1:8": (),
    "raise@step.forward:1:8": (),
    "exit@step.forward:1:8": (),
    "term@step.forward:1:8": (),
    "usr1@event.changed:1:8": (),
    "term@save.shard:1:6": (),
    "stop@step.forward:1:8": (HANG,),
    "collective@step.forward:1:8": (HANG,),
    "full@save.shard:1:6": ("checkpoint.failures=1",),
    "full@save.shard:1:6 (tolerated)": (),
    "nan@step.loss:1:8": (),
    "nan@step.loss:1:8 (rollback)": ("guard.skips=1",),
    "spike@step.loss:*:10 (rollback)": ("guard.spike_window=5", "guard.spike_deviations=4", "guard.on_spike=rollback"),
}
"""Fault, and what its run sets besides."""
_STEP = re.compile(r"^step ([0-9]+)/")
_FAULT = re.compile(r"^\[fault\] ")
_MOST_SECONDS = 300.0


@dataclass
class Life:
    """The processes of one start, and when they said what."""

    processes: list[subprocess.Popen[str]]
    steps: list[tuple[float, int]] = field(default_factory=list)
    fault: float | None = None
    said: list[str] = field(default_factory=list)

    def listen(self, stream: IO[str]) -> None:
        for line in stream:
            if match := _STEP.match(line):
                self.steps.append((time.perf_counter(), int(match[1])))
            elif _FAULT.match(line):
                self.fault = self.fault or time.perf_counter()
            elif line.startswith("error: "):
                self.said.append(line.strip())


def start(config: str, settings: Sequence[str], fault: str) -> tuple[Life, float]:
    """All processes of a run, and the time of its start."""
    environment = os.environ | {
        **{"WORLD_SIZE": str(PROCESSES), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())},
        **{"OMP_NUM_THREADS": "1", VARIABLE: fault},
    }
    command, began = [sys.executable, "-u", "pretrain/train.py", "--config", config, *settings], time.perf_counter()
    life = Life(
        [
            subprocess.Popen(
                command,
                env=environment | {"RANK": str(number), "LOCAL_RANK": str(number)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for number in range(PROCESSES)
        ]
    )
    for process in life.processes:
        assert process.stdout is not None
        threading.Thread(target=life.listen, args=(process.stdout,), daemon=True).start()
    return life, began


def end(life: Life) -> tuple[list[int], float]:
    """Exit codes, and the time of the last one. A process that is stopped and left behind is killed."""
    last, ended = time.perf_counter() + _MOST_SECONDS, 0.0
    while any(process.poll() is None for process in life.processes) and time.perf_counter() < last:
        done = [process.poll() is not None for process in life.processes]
        ended = time.perf_counter()
        if any(done) and all(d or _stopped(p) for d, p in zip(done, life.processes, strict=True)):
            break
        time.sleep(0.005)
    for process in life.processes:
        if process.poll() is None:
            process.kill()
    return [process.wait() for process in life.processes], ended


def _stopped(process: subprocess.Popen[str]) -> bool:
    state = Path(f"/proc/{process.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    return state == "T"


def row(arguments: argparse.Namespace, what: str, more: Sequence[str], folder: Path) -> dict[str, Any]:
    """One fault, and what comes after it."""
    settings = [*arguments.overrides, *SETTINGS, *more, f"run.folder={folder}"]
    first, _ = start(arguments.config, settings, what.split()[0])
    codes, ended = end(first)
    if first.fault is None:
        raise EspalierError(f"{what} never happened; the run said: {'; '.join(first.said) or 'nothing'}")
    if set(codes) == {0}:
        after = [at for at, _ in first.steps if at > first.fault]
        taken = [step for _, step in first.steps]
        again = len(taken) - len(set(taken))
        return {"fault": what, "end_seconds": None, "again_seconds": after[0] - first.fault, "steps_again": again}
    before = max((step for _, step in first.steps), default=0)
    second, began = start(arguments.config, settings, "")
    found, _ = end(second)
    if set(found) != {0} or not second.steps:
        raise EspalierError(f"the run did not go on after {what}: {found}, {'; '.join(second.said)}")
    at, step = second.steps[0]
    seconds = {"end_seconds": ended - first.fault, "again_seconds": at - began}
    return {"fault": what, **seconds, "steps_again": before + 1 - step, "codes": codes, "said": first.said}


def rows(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for number, (what, more) in enumerate(ROWS.items()):
        yield row(arguments, what, more, arguments.out / str(number))


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what faults cost a run.")
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file, or the name of an installed config")
    parser.add_argument("--out", type=Path, required=True, help="a new folder for all runs")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write all rows as JSON")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings laid over the file")
    arguments = parser.parse_intermixed_args()
    if arguments.out.exists():
        raise ConfigError(f"{arguments.out} is there already: give a new folder for --out")
    found = []
    for one in rows(arguments):
        shown = {key: f"{value:.1f}" if isinstance(value, float) else value for key, value in one.items()}
        print("  ".join(f"{key} {value}" for key, value in shown.items() if value is not None), flush=True)
        found.append(one)
    if arguments.json is not None:
        facts = {"commit": git_revision(), "versions": installed_versions(), "hardware": hardware(), "rows": found}
        replace_text(arguments.json, json_text(facts, indent=2) + "\n")


if __name__ == "__main__":
    run_command(main)
