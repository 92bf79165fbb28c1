"""Looks at all nodes of a run before it starts: one table, one verdict, and the line to change.

    python launch/preflight.py --config FILE section.key=value ...                       (this machine alone)
    python launch/preflight.py --nodes 2 --node 0 --master node1 --slots 8 --config FILE     (on every node, with its
                                                                                             number)

The launch scripts start it on every node, in the way in which they start the run. Node 0 serves a small store, to which
every node tells its facts (`launch/node_facts.py`); node 0 judges, and all of them leave with the verdict: 0, or 2 when
something must be changed. Then the links are measured (`launch/links.py`).
"""

import argparse
import json
import socket
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from launch.links import SLOW_SHARE, between, within
from launch.node_facts import NodeFacts, checkpoints_bytes, gather, nearest_folder, tokenizer_file
from pretrain.config.run import RunConfig, load_config
from pretrain.errors import ConfigError, EspalierError, run_command
from pretrain.tokenizer.load import open_tokenizer

MOST_SKEW_SECONDS = 2.0
TRAINING_PORT = 29500
"""Port that `deepspeed` takes by itself."""


class Meeting:
    """The nodes around the store of node 0."""

    def __init__(self, node: int, nodes: int, names: Sequence[str], address: str, port: int, seconds: float) -> None:
        self.node, self.nodes, self.names, self.seconds = node, nodes, names, seconds
        self.timeout = timedelta(seconds=seconds)
        place = f"{address}:{port}"
        if node == 0 and port_is_taken(port):
            raise ConfigError(f"port {port} of this node is in use: give another --preflight-port")
        try:
            self.store = dist.TCPStore(address, port, None, node == 0, self.timeout, wait_for_workers=False)
        except RuntimeError as error:  # torch's DistError family
            raise ConfigError(
                f"{socket.gethostname()} (node {node}) does not reach node 0 at {place} in {seconds:g} s: open the "
                "port, or give another --master"
            ) from error

    def name(self, node: int) -> str:
        return f"node {node} ({self.names[node]})" if self.names else f"node {node}"

    def clock_seconds(self) -> float:
        """How far this node's clock is ahead of node 0's."""
        if self.node == 0:
            for other in range(1, self.nodes):
                self._wait(f"asks {other}", other)
                self.store.set(f"time for {other}", repr(time.time()))
            return 0.0
        before = time.time()
        self.store.set(f"asks {self.node}", "")
        reported = float(self.store.get(f"time for {self.node}"))
        return (before + time.time()) / 2 - reported

    def exchange(self, facts: NodeFacts) -> list[NodeFacts]:
        """Collects the facts of all nodes at node 0; an empty list at the others."""
        self.store.set(f"facts {self.node}", json.dumps(asdict(facts)))
        if self.node:
            return []
        found = []
        for other in range(self.nodes):
            self._wait(f"facts {other}", other)
            found.append(NodeFacts(**json.loads(self.store.get(f"facts {other}"))))
        return found

    def tell(self, key: str, value: str | None) -> str:
        """Sends a text from node 0 to all nodes; every node returns it."""
        if self.node == 0:
            self.store.set(key, value or "")
        return self.store.get(key).decode()

    def leave(self) -> None:
        """Ends the meeting. Node 0 goes last, since the store goes with it."""
        self.store.set(f"left {self.node}", "")
        for other in range(self.nodes if self.node == 0 else 0):
            self._wait(f"left {other}", other)

    def _wait(self, key: str, other: int) -> None:
        try:
            self.store.wait([key], self.timeout)
        except RuntimeError as error:
            raise ConfigError(
                f"{self.name(other)} has not answered in {self.seconds:g} s: see whether it is up, reaches this node, "
                "and has this checkout and its environment at the same path"
            ) from error


def port_is_taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return True
    return False


def judge(nodes: Sequence[NodeFacts], config: RunConfig, needed_bytes: int) -> tuple[list[str], list[str]]:
    """What forbids a start, and what is worth a warning: a sentence each, with the line to change."""
    errors = [f"{node.host}: {node.error}" for node in nodes if node.error]
    nodes = [node for node in nodes if not node.error]
    if errors or not nodes:
        return errors, []
    first, warnings = nodes[0], list[str]()
    for node in nodes[1:]:
        for what, theirs, ours, cure in _comparisons(node, first):
            if theirs != ours:
                errors.append(f"{node.host} has {what} {theirs}, and {first.host} {ours}: {cure}")
        if (node.gpus, node.visible) != (first.gpus, first.visible):
            warnings.append(f"{node.host} has other GPUs than {first.host}, or takes them in another order")
        if not node.sees_folder:
            errors.append(
                f"{node.host} does not see what {first.host} writes to {nearest_folder(Path(config.run.folder))}: set "
                "run.folder to a file system that all nodes share"
            )
        if abs(node.clock_seconds) > MOST_SKEW_SECONDS:
            warnings.append(
                f"the clock of {node.host} is {node.clock_seconds:+.1f} s off that of {first.host}: let NTP set both"
            )
    for node in nodes:
        if node.device_error:
            errors.append(f"{node.host}: {node.device_error}")
        if node.gpus and node.slots > len(node.gpus):
            errors.append(
                f"{node.host} has {len(node.gpus)} GPUs, and its line in the hostfile {node.slots} slots: lower slots"
            )
        if not node.gpus and node.slots > node.cores:
            warnings.append(f"{node.host} has no GPU, and {node.slots} processes share {node.cores} cores")
        errors += [
            f"{node.host} does not find {name}: copy it there, or set {name.split()[0]} to a shared file"
            for name, size in node.files.items()
            if size == "missing"
        ]
    if first.free_bytes < needed_bytes:
        errors.append(
            f"{first.host} has {first.free_bytes / 1e9:,.1f} GB free for checkpoints, and {config.checkpoint.keep} of "
            f"them beside a new one take {needed_bytes / 1e9:,.1f} GB: free space, lower checkpoint.keep, or set "
            "run.folder to a larger disk"
        )
    processes = sum(node.slots for node in nodes)
    try:
        config.parallel_layout(processes)
    except EspalierError as error:
        errors.append(str(error))
    if first.revision == "unknown" or first.revision.endswith("-dirty"):
        warnings.append(f"the revision is {first.revision}: files may differ between nodes without being noticed")
    return errors, warnings


def _comparisons(node: NodeFacts, first: NodeFacts) -> list[tuple[str, str, str, str]]:
    """Facts that must be equal on all nodes: name, value there, value at the first node, what to do."""
    found = [
        ("Python", node.python, first.python, "install the same one"),
        ("revision", node.revision, first.revision, "bring both checkouts to the same one"),
        ("settings", node.config, first.config, "copy the config, and all it extends, to both"),
    ]
    for package in sorted(node.versions.keys() | first.versions.keys()):
        theirs, ours = (one.versions.get(package, "missing") for one in (node, first))
        found.append((package, theirs, ours, "install the same one (constraints.txt)"))
    for name, size in first.files.items():
        theirs = node.files[name]
        if "missing" not in (size, theirs):
            found.append((name, theirs, size, "copy one to both"))
    return found


def slow_links(speeds: Mapping[str, float]) -> list[str]:
    """Warnings about links that are much slower than the fastest."""
    fastest = max(speeds.values(), default=0.0)
    return [
        f"{link} exchanges {speed / 1e9:.2f} GB/s, and the fastest link {fastest / 1e9:.2f}: see its cable, adapter "
        "and NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME"
        for link, speed in speeds.items()
        if speed < SLOW_SHARE * fastest
    ]


def table(nodes: Sequence[NodeFacts]) -> Table:
    """The facts of all nodes, one row for each."""
    shown = Table(title="Preflight")
    for column in ("node", "host", "slots", "GPUs", "memory", "Python", "torch", "revision", "disk free", "clock"):
        shown.add_column(column)
    for number, node in enumerate(nodes):
        gpus = f"{len(node.gpus)} x {node.gpus[0][0]}" if node.gpus else f"none, {node.cores} cores"
        memory = sum(size for _, size in node.gpus) or node.memory_bytes
        shown.add_row(
            *(str(number), node.host, str(node.slots), gpus, f"{memory / 1e9:,.0f} GB", node.python),
            *(node.versions.get("torch", ""), node.revision[:10], f"{node.free_bytes / 1e9:,.0f} GB"),
            f"{node.clock_seconds:+.2f} s",
        )
    return shown


def _own_facts(arguments: argparse.Namespace, token: Path, clock_seconds: float) -> tuple[NodeFacts, RunConfig | None]:
    try:
        config = load_config(arguments.config, arguments.overrides)
    except EspalierError as error:
        return NodeFacts(socket.gethostname(), arguments.slots, str(error)), None
    return gather(config, arguments.slots, token=token, clock_seconds=clock_seconds), config


def preflight(arguments: argparse.Namespace, console: Console) -> None:
    """Looks at all nodes together. Raises ConfigError on every node when the run must not start."""
    node, nodes = arguments.node, arguments.nodes
    names = arguments.names.split(",") if arguments.names else []
    meeting = Meeting(node, nodes, names, arguments.master, arguments.preflight_port, arguments.seconds)
    clock_seconds, token = meeting.clock_seconds(), None
    if node == 0:
        config = load_config(arguments.config, arguments.overrides)
        token = nearest_folder(Path(config.run.folder)) / f".preflight_{uuid.uuid4().hex}"
        token.touch()
    try:
        shared = Path(meeting.tell("token", str(token) if token else None))
        facts, found = _own_facts(arguments, shared, clock_seconds)
        everybody = meeting.exchange(facts)
        verdict, warnings = "", list[str]()
        if node == 0 and found is not None:
            console.print(table(everybody))
            errors, warnings = judge(everybody, found, _needed_bytes(found))
            if port_is_taken(arguments.master_port):
                errors.insert(0, f"port {arguments.master_port} of {facts.host} is in use: give another --master-port")
            verdict = "; ".join(errors)
        verdict = meeting.tell("verdict", verdict)
    finally:
        if token is not None:
            token.unlink()
    if not verdict:
        speeds = _speeds(meeting, arguments)
        if node == 0:
            for link, speed in speeds.items():
                console.print(f"link {link}: {speed / 1e9:.2f} GB/s", highlight=False)
            for warning in [*warnings, *slow_links({k: v for k, v in speeds.items() if "-" in k})]:
                print(f"warning: {warning}", file=sys.stderr)
            console.print("preflight: the run may start", highlight=False)
    meeting.leave()
    if verdict:
        raise ConfigError(f"preflight: {verdict}" if node == 0 else f"preflight: {verdict.split('; ')[0]}")


def _needed_bytes(config: RunConfig) -> int:
    if not tokenizer_file(config).is_file():
        return 0  # said as a missing file
    return checkpoints_bytes(config.with_vocabulary(open_tokenizer(config.data.tokenizer).vocabulary))


def _speeds(meeting: Meeting, arguments: argparse.Namespace) -> dict[str, float]:
    """Bytes a second inside every node and between neighbours, by the name of the link; empty but at node 0."""
    inside = within(arguments.slots) if arguments.slots > 1 else 0.0
    meeting.store.set(f"inside {meeting.node}", repr(inside))
    speeds = between(dist.PrefixStore("links", meeting.store), meeting.node, meeting.nodes, meeting.timeout)
    if meeting.node:
        return {}
    for other in range(meeting.nodes):
        if speed := float(meeting.store.get(f"inside {other}")):
            speeds[f"in node {other}"] = speed
    return speeds


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Look at all nodes of a run before it starts.")
    parser.add_argument("--nodes", type=int, default=1, help="of the run (1)")
    parser.add_argument("--node", type=int, default=0, help="number of this one, from 0 on (0)")
    parser.add_argument("--names", default="", help="of all nodes, separated by commas, for messages")
    parser.add_argument("--slots", type=int, default=1, help="processes of this node (1)")
    parser.add_argument("--master", default="127.0.0.1", help="address of node 0")
    parser.add_argument("--master-port", type=int, default=TRAINING_PORT, help="that training will use (29500)")
    parser.add_argument("--preflight-port", type=int, default=TRAINING_PORT + 1, help="of this meeting (29501)")
    parser.add_argument("--seconds", type=float, default=60.0, help="to wait for a node (60)")
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file, or the name of an installed config")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings laid over the file")
    return parser.parse_intermixed_args()


def main() -> None:
    preflight(parse_arguments(), Console(width=140))


if __name__ == "__main__":
    run_command(main)
