"""The hosts of a run: a hostfile read with care, and whether they answer.

A hostfile has a line `HOST slots=NUMBER` for each host, the number of its GPUs (without GPUs: of its processes).
Names go to ssh and pdsh, so that only those of plain hosts pass.
"""

import re
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from pretrain.config.run import RunConfig
from pretrain.errors import ConfigError

SSH_SECONDS = 5
SSH = ("ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={SSH_SECONDS}")
"""The ssh command: it never asks for a password and never waits for long."""
_LINE = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)\s+slots=([0-9]+)\s*(?:#.*)?")


@dataclass(frozen=True)
class Host:
    name: str
    slots: int

    @property
    def is_local(self) -> bool:
        return self.name in ("localhost", "127.0.0.1")


def read_hosts(path: Path) -> list[Host]:
    """The hosts of a hostfile, in order; ConfigError, with the line, for one that cannot be launched on."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}): give another --hostfile") from error
    if b"\r" in content:
        raise ConfigError(f"{path} has the line ends of Windows, which become a part of host names: run dos2unix on it")
    hosts: dict[str, Host] = {}
    for number, line in enumerate(content.decode(errors="replace").split("\n"), start=1):
        text, place = line.strip(), f"{path}, line {number}"
        if not text or text.startswith("#"):
            continue
        match = _LINE.fullmatch(text)
        if match is None:
            raise ConfigError(f"{place}: {text!r} is not `HOST slots=NUMBER`")
        name, slots = match[1], int(match[2])
        if slots == 0:
            raise ConfigError(f"{place}: {name} has 0 slots: give the number of its GPUs, or remove the line")
        if name in hosts:
            raise ConfigError(f"{place}: {name} is there a second time: keep one line, with all of its slots")
        hosts[name] = Host(name, slots)
    if not hosts:
        raise ConfigError(f"{path} names no host: list them as `HOST slots=NUMBER`")
    return list(hosts.values())


def write_hosts(path: Path, hosts: Sequence[Host]) -> None:
    """Writes a hostfile for `deepspeed`."""
    path.write_text("".join(f"{host.name} slots={host.slots}\n" for host in hosts), encoding="utf-8")


def silence(host: Host) -> str:
    """Why a host does not answer to ssh; empty if it does."""
    if host.is_local:
        return ""
    answer = subprocess.run([*SSH, "--", host.name, "true"], stdin=subprocess.DEVNULL, capture_output=True, check=False)
    if answer.returncode == 0:
        return ""
    said = answer.stderr.decode(errors="replace").strip().splitlines()
    return said[-1] if said else f"ssh ended with {answer.returncode}"


def silences(hosts: Sequence[Host]) -> dict[Host, str]:
    """Hosts that do not answer, and why; all are asked at once."""
    with ThreadPoolExecutor(max(len(hosts), 1)) as pool:
        return {host: why for host, why in zip(hosts, pool.map(silence, hosts), strict=True) if why}


def most_that_divide(hosts: Sequence[Host], config: RunConfig) -> list[Host]:
    """The most of the first hosts over which the run divides; ConfigError if there are none."""
    for count in range(len(hosts), 0, -1):
        try:
            config.parallel_layout(sum(host.slots for host in hosts[:count]))
        except ConfigError:
            continue
        return list(hosts[:count])
    raise ConfigError(
        f"{len(hosts)} hosts answer, and the run divides over none of their numbers: change train.global_batch, or "
        "bring the others back"
    )
