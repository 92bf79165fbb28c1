"""Starts the processes of `tools/benchmarks/tensor_parallel.py` on one machine, with or without a link between them."""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from pretrain.disk import json_text, replace_text
from pretrain.distributed import free_port
from pretrain.errors import EspalierError
from tools.benchmarks.network_namespaces import check_namespaces, joined_namespaces, parse_rate

LINK_PORT = 29500
"""Free in a namespace that is new."""
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
    """Until all have ended well; the first that does not ends the wait, for the others wait for it."""
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
