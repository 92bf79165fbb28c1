"""Faults on purpose: a chosen process fails at a chosen place of a chosen step, in a real run.

    ESPALIER_FAULT=kill@save.manifest:0:20 deepspeed --num_gpus 2 pretrain/train.py --config FILE
    ESPALIER_FAULT=nan@step.loss:1:7,full@save.shard:0:20 ...

`ACTION@PLACE:PROCESS:STEP`, several separated by commas; PROCESS is a number or `*`, STEP counts the optimizer steps
taken when the place is reached. A fault happens once in a process, and only in the first start of a supervised run
(`launch/supervise.sh`); with `!` behind it, in every start. Without the variable nothing happens here.
"""

import errno
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from math import prod

import torch
import torch.distributed as dist

from model.process_groups import device
from pretrain.errors import ConfigError

VARIABLE, LIFE = "ESPALIER_FAULT", "ESPALIER_LIFE"

PLACES = (
    "step.forward",  # before every forward pass of a training step
    "step.loss",  # the loss is computed; `nan` and `spike` multiply it
    "step.optimizer",  # between the last backward pass and the optimizer
    "save.begin",
    "save.staging",  # the staging folder is made
    "save.shard",  # in the middle of this process's file
    "save.waiting",  # for a write in the background
    "save.written",  # all files but the manifest are written
    "save.manifest",  # the manifest is written
    "save.aside",  # an older checkpoint of the same step is moved aside
    "save.renamed",  # the new checkpoint has its name, the pointer still names the old one
    "save.pointer",  # the pointer is moved
    "save.prune",  # a surplus checkpoint is renamed, and still to be removed
    "validation",
    "event.begin",  # the policy has decided to change ranks
    "event.stashed",  # masters and moments are stashed
    "event.changed",  # the old engine is gone, factors have their new ranks
    "event.rebuilt",  # the new engine is built, without the optimizer's state
    "event.restored",
    "resume.opened",  # the checkpoint is verified
    "resume.built",  # the model is built, and holds initial values
    "resume.restored",
)
SLOW_SECONDS = 5.0
SPIKE_FACTOR = 10.0


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _signal(number: signal.Signals) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def _refuse(number: int) -> Callable[[], None]:
    def raise_it() -> None:
        raise OSError(number, os.strerror(number))

    return raise_it


def _collective() -> None:
    """Starts a collective in which no other process takes part, so all later ones are paired wrongly."""
    dist.all_reduce(torch.zeros(1, device=device()))


def _raise() -> None:
    raise RuntimeError("a fault on purpose")


ACTIONS: dict[str, Callable[[], object]] = {
    "kill": _kill,
    "stop": _signal(signal.SIGSTOP),
    "term": _signal(signal.SIGTERM),
    "usr1": _signal(signal.SIGUSR1),
    "full": _refuse(errno.ENOSPC),
    "readonly": _refuse(errno.EROFS),
    "raise": _raise,
    "exit": lambda: sys.exit(0),
    "slow": lambda: time.sleep(SLOW_SECONDS),
    "collective": _collective,
}
FACTORS = {"nan": float("nan"), "spike": SPIKE_FACTOR}
"""Factors for the loss, by action; only at `step.loss`."""

_PATTERN = re.compile(r"([a-z0-9]+)@([a-z.]+):([0-9]+|\*):([0-9]+)(!?)")


@dataclass(frozen=True)
class Fault:
    action: str
    place: str
    process: int | None
    step: int


def parse_faults(text: str, life: int = 0) -> list[Fault]:
    """The faults that `text` asks for in start number `life` of the run; ConfigError if it is malformed."""
    faults = []
    for part in text.split(","):
        match = _PATTERN.fullmatch(part.strip())
        if match is None:
            raise ConfigError(f"{VARIABLE}: {part!r} is not ACTION@PLACE:PROCESS:STEP, as in kill@save.shard:1:20")
        action, place, process, step, always = match.groups()
        known = ACTIONS.keys() | (FACTORS.keys() if place == "step.loss" else set())
        for what, name, names in (("place", place, PLACES), ("action there", action, known)):
            if name not in names:
                raise ConfigError(f"{VARIABLE}: there is no {what} {name!r}: use one of {', '.join(sorted(names))}")
        if always or life == 0:
            faults.append(Fault(action, place, None if process == "*" else int(process), int(step)))
    return faults


class Faults:
    """The faults that are still to happen in this process."""

    def __init__(self, process: int) -> None:
        """Reads the faults of process number `process` from the environment."""
        text = os.environ.get(VARIABLE, "")
        self.process = process
        self.waiting = parse_faults(text, int(os.environ.get(LIFE, "0"))) if text else []

    def due(self, place: str, step: int, actions: Collection[str]) -> Iterator[str]:
        """The actions among `actions` that are due at `place` of `step`; each is due once."""
        for fault in list(self.waiting):
            here = (fault.place, fault.step) == (place, step) and fault.process in (None, self.process)
            if here and fault.action in actions:
                self.waiting.remove(fault)
                print(f"[fault] {fault.action} at {place} of step {step}", file=sys.stderr, flush=True)
                yield fault.action


_faults: Faults | None = None


def plan_faults(process: int) -> None:
    """Makes the faults that the environment asks for happen in this process, number `process`, from now on."""
    global _faults
    _faults = Faults(process)


def forget_faults() -> None:
    """Makes no more faults happen."""
    global _faults
    _faults = None


def inject_fault(place: str, step: int) -> None:
    """Makes the faults happen that were asked for at `place` of `step`."""
    for action in () if _faults is None else _faults.due(place, step, ACTIONS):
        ACTIONS[action]()


def loss_factor(step: int) -> float:
    """Factor by which a fault multiplies the loss of `step`; 1 without a fault."""
    return prod(FACTORS[action] for action in (() if _faults is None else _faults.due("step.loss", step, FACTORS)))
