"""Starts one node's part of a run, where something else starts a task on every node: Slurm, Kubernetes, a script.

    python launch/node.py --nodes 2 --node 0 --master node1 --slots 8 --config FILE run.folder=/shared/runs/x

On every node, with its number; no ssh is needed. First `launch/preflight.py` looks at all nodes together, then
`deepspeed --no_ssh` starts the processes of this one, with a log each in `run.folder/logs`, which node 0 shows. SIGTERM
and SIGUSR1 go to the training processes, which save and end. The exit code is that of the run (docs/reliability.md).
"""

import argparse
import contextlib
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import psutil

from launch.follower import Follower
from launch.hosts import Host, write_hosts
from launch.preflight import TRAINING_PORT
from launch.supervise import training_processes
from pretrain.config.run import load_config
from pretrain.errors import ConfigError, run_command
from pretrain.monitor.run_folder import LOGS_FOLDER

ROOT = Path(__file__).resolve().parent.parent


def preflight_command(arguments: argparse.Namespace) -> list[str]:
    """The command that looks at all nodes."""
    command = [sys.executable, "launch/preflight.py", "--nodes", str(arguments.nodes), "--node", str(arguments.node)]
    command += ["--slots", str(arguments.slots), "--master", arguments.master, "--seconds", str(arguments.seconds)]
    command += ["--master-port", str(arguments.master_port), "--preflight-port", str(arguments.master_port + 1)]
    return [*command, "--config", arguments.config, *arguments.overrides]


def deepspeed_command(arguments: argparse.Namespace, hostfile: Path, logs: Path) -> list[str]:
    """The command that starts the processes of this node."""
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--no_ssh", "--hostfile", str(hostfile)]
    command += ["--node_rank", str(arguments.node), "--master_addr", arguments.master]
    command += ["--master_port", str(arguments.master_port), "--enable_each_rank_log", str(logs)]
    return [*command, "pretrain/train.py", "--config", arguments.config, *arguments.overrides]


def run(command: Sequence[str], logs: Path, *, shown: bool) -> int:
    """Runs the processes of this node and returns their exit code."""
    follower = Follower(logs) if shown else None
    if follower is not None:
        follower.start()
    # In a session of its own: the schedulers' signals to a whole process group would kill the launcher, too.
    running = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, start_new_session=True)

    def pass_on(number: int, _frame: object) -> None:
        for one in training_processes(running.pid) or {psutil.Process(running.pid)}:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, pass_on)
    code = running.wait()
    if follower is not None:
        follower.end()
    return code if code >= 0 else 128 - code


def main() -> None:
    arguments = _arguments()
    if not 0 <= arguments.node < arguments.nodes:
        raise ConfigError(f"--node is {arguments.node}, and the {arguments.nodes} nodes have the numbers from 0 on")
    config = load_config(arguments.config, arguments.overrides)
    config.parallel_layout(arguments.nodes * arguments.slots)
    logs = Path(config.run.folder).absolute() / LOGS_FOLDER
    with tempfile.TemporaryDirectory() as folder:
        hostfile = Path(folder) / "hosts"
        write_hosts(hostfile, [Host(f"node{number}", arguments.slots) for number in range(arguments.nodes)])
        first, second = preflight_command(arguments), deepspeed_command(arguments, hostfile, logs)
        if arguments.dry_run:
            print(shlex.join(first), shlex.join(second), sep="\n")
            return
        code = subprocess.run(first, cwd=ROOT, stdin=subprocess.DEVNULL, check=False).returncode
        if code == 0:
            logs.mkdir(parents=True, exist_ok=True)
            code = run(second, logs, shown=arguments.node == 0)
    sys.exit(code)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Start one node's part of a run.")
    parser.add_argument("--nodes", type=int, required=True, help="of the run")
    parser.add_argument("--node", type=int, required=True, help="number of this one, from 0 on")
    parser.add_argument("--master", required=True, help="address of node 0")
    parser.add_argument("--master-port", type=int, default=TRAINING_PORT, help="and the one above it are used (29500)")
    parser.add_argument("--slots", type=int, default=_slots(), help="processes of a node (its GPUs)")
    parser.add_argument("--seconds", type=float, default=300.0, help="that nodes may start apart (300)")
    parser.add_argument("--dry-run", action="store_true", help="show the commands, and start nothing")
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file, or the name of an installed config")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings laid over the file")
    return parser.parse_intermixed_args()


def _slots() -> int:
    import torch

    return max(torch.cuda.device_count(), 1)


if __name__ == "__main__":
    run_command(main)
