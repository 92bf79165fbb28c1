"""Faults on purpose: a chosen process fails at a chosen place of a chosen step, in a real run.

    ESPALIER_FAULT=kill@save.manifest:0:20 deepspeed --num_gpus 2 pretrain/train.py --config FILE
    ESPALIER_FAULT=nan@step.loss:1:7,full@save.shard:0:20 ...

`ACTION@PLACE:PROCESS:STEP`, several separated by commas; PROCESS is a number or `*`, STEP counts the optimizer steps
taken when the place is reached. A fault happens once in the life of a process, and only in the first life of a
supervised run (`launch/supervise.sh`); with `!` behind it in every life. Without the variable nothing ever happens
here.
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
    "step.loss",  # the loss is there; `nan` and `spike` multiply it
    "step.optimizer",  # between the last backward pass and the optimizer
    "save.begin",
    "save.staging",  # the staging folder is made
    "save.shard",  # in the middle of this process's file
    "save.waiting",  # for a write in the background
    "save.written",  # all files but the manifest are written
    "save.manifest",  # the manifest is written
    "save.aside",  # an older checkpoint of the same step is moved aside
    "save.renamed",  # the new checkpoint has its name, the pointer is still the old one
    "save.pointer",  # the pointer is moved
    "save.prune",  # a surplus checkpoint is renamed, and still to be removed
    "validation",
    "event.begin",  # the policy has decided to change ranks
    "event.stashed",  # masters and moments lie aside
    "event.changed",  # the old engine is gone, factors have their new ranks
    "event.rebuilt",  # the new engine is there, its states are not
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
    """One in which no other process takes part: all later ones meet the wrong partner."""
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
"""What a loss or gradient is multiplied by, at `step.loss` alone."""

_PATTERN = re.compile(r"([a-z0-9]+)@([a-z.]+):([0-9]+|\*):([0-9]+)(!?)")


@dataclass(frozen=True)
class Fault:
    action: str
    place: str
    process: int | None
    step: int


def parse_faults(text: str, life: int = 0) -> list[Fault]:
    """The faults of one life; ConfigError where the text says none."""
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
    """Those still to happen in this process."""

    def __init__(self, process: int) -> None:
        """From the environment."""
        text = os.environ.get(VARIABLE, "")
        self.process = process
        self.waiting = parse_faults(text, int(os.environ.get(LIFE, "0"))) if text else []

    def due(self, place: str, step: int, actions: Collection[str]) -> Iterator[str]:
        """The actions among `actions` to be taken now, each of which is then over."""
        for fault in list(self.waiting):
            here = (fault.place, fault.step) == (place, step) and fault.process in (None, self.process)
            if here and fault.action in actions:
                self.waiting.remove(fault)
                print(f"[fault] {fault.action} at {place} of step {step}", file=sys.stderr, flush=True)
                yield fault.action


_faults: Faults | None = None


def plan_faults(process: int) -> None:
    """From here on the faults that the environment asks for happen in this process, number `process`."""
    global _faults
    _faults = Faults(process)


def forget_faults() -> None:
    """No fault happens any more."""
    global _faults
    _faults = None


def inject_fault(place: str, step: int) -> None:
    """Lets happen what was asked for at `place` of `step`."""
    for action in () if _faults is None else _faults.due(place, step, ACTIONS):
        ACTIONS[action]()


def loss_factor(step: int) -> float:
    """What a fault multiplies the loss of `step` by; 1 without one."""
    return prod(FACTORS[action] for action in (() if _faults is None else _faults.due("step.loss", step, FACTORS)))
