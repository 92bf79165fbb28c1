"""Carries the runs of a race out: each through the ordinary commands, in a folder of its own.

A run that was interrupted goes on from its checkpoint. A folder is locked while its run is at work, also beyond the end
of the race that started it, so that two races in one work folder never train in the same place.
"""

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from pretrain.config.files import merge
from pretrain.distributed import free_port
from pretrain.errors import EspalierError, NumericalError
from tools.experiments.race_plan import RaceConfig, Run, run_config, run_settings
from tools.experiments.race_results import join_parts, locked, read_part
from tools.experiments.race_text import Text

ROOT = Path(__file__).resolve().parents[2]
_NOISE = "ignore:Transformer Engine and Apex are not,ignore:Apex is not installed,ignore:full scope is deprecated"
_GRACE_SECONDS = 20.0


class Interrupted(KeyboardInterrupt):
    """The race was told to stop."""


class Busy(EspalierError):
    """Another race is at work in this folder."""


class Runner:
    """Executes training runs; `stop` ends those that are at work."""

    def __init__(self, work: Path, text: Text) -> None:
        self._runs, self._text = work / "runs", text
        self._runs.mkdir(parents=True, exist_ok=True)
        self._extensions = work / "torch_extensions"
        self._presence = _enter(self._runs, self._extensions)
        self.stop = threading.Event()

    def folder(self, name: str) -> Path:
        """Where everything of one run lies: configs, logs, run folders of its parts."""
        return self._runs / name

    def execute(self, race: RaceConfig, run: Run) -> dict[str, Any]:
        """Trains and returns the record; Busy, Interrupted, or EspalierError when the training failed."""
        settings = run_settings(race, run)
        with self._claimed(self.folder(run.key)) as (folder, lock):
            parts = [self._train(settings[0], folder / "training", lock)]
            if len(settings) == 2 and not parts[0]["diverged"]:
                start = self._cut(folder, settings[1]["rank"]["initial"], lock)
                second = merge(settings[1], {"checkpoint": {"start_from": str(start)}})
                parts.append(self._train(second, folder / "training_factored", lock))
        what = {"method": run.method, "learning_rate": run.learning_rate, "seed": run.seed, "steps": run.steps}
        record = join_parts(parts)
        diverged = parts[-1]["diverged"]
        loss = None if diverged else record["validation"][-1]["loss"]
        return {**record, **what, "settings": settings, "diverged": diverged, "validation_loss": loss}

    def time(self, name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
        """A short run that only matters for its seconds."""
        with self._claimed(self.folder(name)) as (folder, lock):
            return self._train(settings, folder / "training", lock)

    @contextmanager
    def _claimed(self, folder: Path) -> Iterator[tuple[Path, int]]:
        """The folder, locked for this process and those that inherit the descriptor."""
        folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            try:
                lock = stack.enter_context(locked(folder, wait=False))
            except BlockingIOError as error:
                raise Busy(f"another race is at work in {folder}: wait for it, or name another --work") from error
            yield folder, lock

    def _train(self, settings: Mapping[str, Any], folder: Path, lock: int) -> dict[str, Any]:
        """The figures of one training, which may have diverged."""
        config = run_config(settings, self._text.settings, str(folder))
        file = folder.with_suffix(".yaml")
        # JSON is YAML without the aliases that a YAML writer makes of shared lists, and that configs must not have.
        file.write_text(json.dumps(config.model_dump(mode="json", exclude_unset=True), indent=1), encoding="utf-8")
        log = folder.with_suffix(".log")
        command = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", os.devnull, "--num_gpus", "1"]
        command += ["--master_port", str(free_port()), "--quiet", str(ROOT / "pretrain" / "train.py")]
        status = self._call([*command, "--config", str(file)], log, lock)
        if status not in (0, NumericalError.exit_code):
            raise EspalierError(f"a run ended with exit code {status}: see {log}")
        figures = read_part(folder)
        if status == 0 and figures["steps"] != config.train.steps:
            raise EspalierError(f"a run ended at step {figures['steps']} of {config.train.steps}: see {log}")
        return {**figures, "diverged": status != 0}

    def _cut(self, folder: Path, rank: int, lock: int) -> Path:
        """The dense part's model as factors of this rank, by truncated singular value decomposition."""
        merged, dense, factors = (folder / name for name in ("merged", "dense", "factors"))
        for tool, arguments in (
            ("consolidate_checkpoint", ["--checkpoint", folder / "training", "--output", merged, "--overwrite"]),
            ("densify_checkpoint", ["--input", merged, "--output", dense, "--overwrite"]),
            (
                "import_huggingface",
                ["--input", dense, "--output", factors, "--parametrization", "factored", "--rank", rank, "--overwrite"],
            ),
        ):
            command = [sys.executable, str(ROOT / "tools" / f"{tool}.py"), *map(str, arguments)]
            log = folder / f"{tool}.log"
            if status := self._call(command, log, lock):
                raise EspalierError(f"{tool} ended with exit code {status}: see {log}")
        return factors

    def _call(self, command: Sequence[str], log: Path, lock: int) -> int:
        """Exit code of a command, which runs in a process group of its own and holds the lock as well."""
        with log.open("ab") as output:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=_environment(self._extensions),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=(lock, self._presence),
            )
            try:
                while (status := process.poll()) is None:
                    if self.stop.is_set():
                        raise Interrupted
                    time.sleep(0.2)
            except BaseException:
                _end(process)
                raise
        return status


def _enter(runs: Path, extensions: Path) -> int:
    """A descriptor that shows this race, and the trainings it starts, to the other races in the same folder.

    Trainings compile an operator of DeepSpeed's in a folder of the race's own: one that is killed while it does leaves
    torch's lock behind, for which all later ones would wait without end. The first race to enter removes it.
    """
    presence = os.open(runs, os.O_RDONLY)
    try:
        fcntl.flock(presence, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        pass  # other races are at work
    else:
        for lock in extensions.glob("*/lock"):
            lock.unlink()
    fcntl.flock(presence, fcntl.LOCK_SH)
    return presence


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a whole process group: DeepSpeed's launcher does not pass signals on."""
    os.killpg(process.pid, signal.SIGTERM)
    deadline = time.monotonic() + _GRACE_SECONDS
    while _group_lives(process) and time.monotonic() < deadline:
        time.sleep(0.1)
    if _group_lives(process):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _group_lives(process: subprocess.Popen[bytes]) -> bool:
    process.poll()
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True


def _environment(extensions: Path) -> dict[str, str]:
    """Environment of a training process: this source tree before an installed one, one thread unless said otherwise."""
    environment = dict(os.environ)
    path = [str(ROOT), *filter(None, [environment.get("PYTHONPATH")])]
    environment.update(PYTHONPATH=os.pathsep.join(path), PYTHONWARNINGS=_NOISE, TORCH_EXTENSIONS_DIR=str(extensions))
    environment.setdefault("OMP_NUM_THREADS", "1")
    if not torch.cuda.is_available():
        environment["DS_ACCELERATOR"] = "cpu"
    return environment
