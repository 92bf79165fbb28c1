"""Starts the processes of `tools/benchmarks/tensor_parallel.py` on one machine, with or without a link between them.

The link joins two network namespaces of Linux and is held to a rate:

    with joined_namespaces("10gbit") as ends:
        subprocess.run([*ends[0].prefix, "python", ...])

A veth pair is the link; a token bucket (`tc ... tbf`) at both ends holds each direction to the rate. The bucket is
small beside any message that is worth measuring: what fits into it would travel at memory speed. Needs root, and the
tools `ip` and `tc`.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from pretrain.disk import json_text, replace_text
from pretrain.distributed import free_port
from pretrain.errors import ConfigError, EspalierError

LINK_PORT = 29500
"""Port of process 0 in a namespace, where no other program runs."""
_POLL_SECONDS = 0.2


def launch(arguments: argparse.Namespace, script: Path) -> None:
    """Runs the script on all its networks, one after the other, and joins their rows in `--json`."""
    signal.signal(signal.SIGTERM, _leave)  # so that namespaces and processes go when this one is told to
    with tempfile.TemporaryDirectory() as folder:
        files = []
        if arguments.namespaces:
            check_namespaces()
            for rate in arguments.rate:
                parse_rate(rate)
            for rate in arguments.rate:
                files.append(Path(folder) / f"{rate}.json")
                with joined_namespaces(rate) as ends:
                    places = [(end.prefix, end.interface) for end in ends]
                    _run(script, arguments, rate, files[-1], places, ends[0].address, LINK_PORT)
        else:
            files.append(Path(folder) / "local.json")
            places = [([], "lo")] * arguments.processes
            _run(script, arguments, "local", files[0], places, "127.0.0.1", free_port())
        if arguments.json is not None:
            facts = _joined([json.loads(file.read_text(encoding="utf-8")) for file in files])
            replace_text(arguments.json, json_text(facts, indent=2) + "\n")


def _joined(every: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The facts of the first, with the rows of all."""
    facts = dict(every[0])
    for section in ("network", "collectives", "times"):
        facts[section] = [row for one in every for row in one[section]]
    return facts


def _run(
    script: Path,
    arguments: argparse.Namespace,
    network: str,
    rows: Path,
    places: Sequence[tuple[list[str], str]],
    address: str,
    port: int,
) -> None:
    """One process for each of `places` (what to write in front of its command, its interface)."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(script.parent.parent), os.environ.get("PYTHONPATH", "")])),
        "OMP_NUM_THREADS": str(arguments.threads),
        "WORLD_SIZE": str(len(places)),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # what megatron-core wants for an all-reduce under a GEMM
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # addresses of a namespace have no names, and torch warns of each
    }
    command = [sys.executable, str(script), *sys.argv[1:], "--network", network, "--json", str(rows)]
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for place, (prefix, interface) in enumerate(places):
            own = {"RANK": str(place), "LOCAL_RANK": str(place), "GLOO_SOCKET_IFNAME": interface}
            processes.append(subprocess.Popen([*prefix, *command], env=environment | own))
        _wait(processes)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Waits until all processes have ended well. The first that fails ends the wait, since the others wait for it."""
    while True:
        codes = [process.poll() for process in processes]
        for place, code in enumerate(codes):
            if code and code > 0:
                sys.exit(code)  # it has said why
            if code:
                raise EspalierError(f"process {place} of {len(processes)} was killed by {signal.Signals(-code).name}")
        if all(code == 0 for code in codes):
            return
        time.sleep(_POLL_SECONDS)


def _leave(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


_UNITS = {"kbit": 10**3, "mbit": 10**6, "gbit": 10**9}
_SMALLEST_BUCKET_BYTES = 128 * 1024
"""Two of the largest segments that Linux hands to a link in one piece."""
_BUCKET_SECONDS = 0.00025
_QUEUE_SECONDS = 0.05


@dataclass(frozen=True)
class End:
    """One of the two namespaces."""

    namespace: str
    interface: str
    address: str

    @property
    def prefix(self) -> list[str]:
        """What to write in front of a command that is to run in it."""
        return ["ip", "netns", "exec", self.namespace]


@contextmanager
def joined_namespaces(rate: str) -> Iterator[tuple[End, End]]:
    """Makes the namespaces and the link, and removes them whatever happens."""
    bits_per_second = parse_rate(rate)
    check_namespaces()
    first, second = (End(f"espalier_{os.getpid()}_{n}", f"link{n}", f"192.0.2.{n}") for n in (1, 2))
    try:
        for end in (first, second):
            _command("ip", "netns", "add", end.namespace)
        pair = ["ip", "link", "add", first.interface, "netns", first.namespace, "type", "veth"]
        _command(*pair, "peer", "name", second.interface, "netns", second.namespace)
        for end in (first, second):
            _command("ip", "-n", end.namespace, "address", "add", f"{end.address}/24", "dev", end.interface)
            for interface in ("lo", end.interface):
                _command("ip", "-n", end.namespace, "link", "set", interface, "up")
            _hold(end, bits_per_second)
        yield first, second
    finally:
        for end in (first, second):  # the link goes with its namespace
            subprocess.run(["ip", "netns", "delete", end.namespace], capture_output=True, check=False)


def parse_rate(text: str) -> int:
    """Bits a second of `10gbit`, `1gbit` or `100mbit`; ConfigError for anything else."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)(kbit|mbit|gbit)", text.strip().lower())
    rate = float(match[1]) * _UNITS[match[2]] if match else 0.0
    if rate <= 0.0:
        raise ConfigError(f"{text!r} is not the rate of a link: give --rate as 10gbit, 1gbit or 100mbit")
    return round(rate)


def check_namespaces() -> None:
    """ConfigError if this machine or user cannot make namespaces."""
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        raise ConfigError(
            f"--namespaces needs {' and '.join(missing)}, which this machine lacks: install the Debian package iproute2"
        )
    if os.geteuid() != 0:
        raise ConfigError("--namespaces makes network namespaces, which only root may: run it as root, or leave it out")


def transmitted_bytes(interface: str) -> int:
    """What has left an interface of this process's namespace so far, headers included."""
    return int(Path(f"/sys/class/net/{interface}/statistics/tx_bytes").read_text(encoding="ascii"))


def _hold(end: End, bits_per_second: int) -> None:
    bucket = max(_SMALLEST_BUCKET_BYTES, round(bits_per_second / 8 * _BUCKET_SECONDS))
    limit = ["rate", f"{bits_per_second}bit", "burst", f"{bucket}b", "latency", f"{1000 * _QUEUE_SECONDS:g}ms"]
    _command("tc", "-n", end.namespace, "qdisc", "add", "dev", end.interface, "root", "tbf", *limit)


def _command(*words: str) -> None:
    answer = subprocess.run(words, capture_output=True, text=True, check=False)
    if answer.returncode:
        hint = " (does this kernel have the module sch_tbf?)" if words[0] == "tc" else ""
        raise EspalierError(f"`{' '.join(words)}` failed: {answer.stderr.strip()}{hint}")
