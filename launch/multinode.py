"""Trains on the hosts of a hostfile: checks them, sends the environment along, starts `deepspeed`, follows its logs.

    python launch/multinode.py --hostfile hosts --config FILE [--launcher openmpi] [--supervise] [--dry-run] \\
        run.folder=/shared/runs/x

In order: the hostfile and the settings are read; all hosts must answer to ssh; `launch/preflight.py` runs on each; then
`deepspeed` starts the run, with a log a process in `run.folder/logs`. What process 0 says is shown, and of the others
what begins with `error:`. The exit code is that of the run (docs/reliability.md).
"""

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from launch.exports import exported, refuse_stale_files, with_exports, write_exports
from launch.follower import Follower
from launch.hosts import SSH, Host, read_hosts, silences
from launch.preflight import TRAINING_PORT
from pretrain.config.run import RunConfig, load_config
from pretrain.errors import ConfigError, HangError, run_command
from pretrain.monitor.run_folder import LOGS_FOLDER

ROOT = Path(__file__).resolve().parent.parent
LAUNCHERS = {"pdsh": "pdsh", "openmpi": "ompi_info"}
"""By name, the program without which `deepspeed` cannot use it."""
KEEP_ALIVE = "-o ServerAliveInterval=10 -o ServerAliveCountMax=3"
"""Without it pdsh waits for ever for a host whose link is down."""
_POLL_SECONDS = 0.2
SSH_LOST = 255
"""ssh's own exit code, which pdsh hands on because it is the largest."""


def preflight_commands(
    arguments: argparse.Namespace, hosts: Sequence[Host], master: str, variables: dict[str, str]
) -> list[list[str]]:
    """The commands that look at the hosts, one for each."""
    names = ",".join(host.name for host in hosts)
    commands = []
    for number, host in enumerate(hosts):
        own = [sys.executable, "launch/preflight.py", "--nodes", str(len(hosts)), "--node", str(number)]
        own += ["--names", names, "--slots", str(host.slots), "--master", master]
        own += ["--master-port", str(arguments.master_port), "--preflight-port", str(arguments.master_port + 1)]
        own += ["--config", arguments.config, *arguments.overrides]
        if host.is_local:
            commands.append(own)
            continue
        there = [f"cd {shlex.quote(str(ROOT))} &&", "env", f"PYTHONPATH={ROOT}"]
        there += [shlex.quote(f"{name}={value}") for name, value in variables.items()]
        commands.append([*SSH, "--", host.name, " ".join([*there, shlex.join(own)])])
    return commands


def run_preflight(hosts: Sequence[Host], commands: Sequence[Sequence[str]]) -> None:
    """ConfigError, once, when a node or what they have in common forbids the start."""
    running = [
        subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for command in commands
    ]
    said: dict[Host, list[str]] = {}

    def listen(host: Host, stream: IO[str]) -> None:
        said[host] = [line.strip() for line in stream]

    threads = [
        threading.Thread(target=listen, args=(host, process.stderr))
        for host, process in zip(hosts, running, strict=True)
    ]
    for thread in threads:
        thread.start()
    codes = [process.wait() for process in running]
    for thread in threads:
        thread.join()
    for line in said[hosts[0]]:
        if line.startswith("warning: "):
            print(line, file=sys.stderr)
    for host, code in zip(hosts, codes, strict=True):
        if code:
            words = [line for line in said[host] if line.startswith("error: ")] or said[host] or ["nothing"]
            raise ConfigError(f"{words[-1].removeprefix('error: ')} ({host.name}, exit code {code})")


def deepspeed_command(arguments: argparse.Namespace, master: str, hosts: Sequence[Host], logs: Path) -> list[str]:
    """The command that starts the run on all hosts."""
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(arguments.hostfile.absolute())]
    command += ["--master_addr", master, "--master_port", str(arguments.master_port), "--launcher", arguments.launcher]
    extra = arguments.launcher_args
    if arguments.launcher == "openmpi":
        extra = f"--output-filename {logs} {extra}"
    else:
        command += ["--enable_each_rank_log", str(logs)]
    if extra.strip():
        command += [f"--launcher_args={extra.strip()}"]
    if len(hosts) == 1:
        command += ["--force_multi"]
    return [*command, "pretrain/train.py", "--config", arguments.config, *arguments.overrides]


def run(command: Sequence[str], exports: Path, logs: Path) -> int:
    """Runs the command and returns its exit code; signals are passed on to it."""
    follower = Follower(logs)
    follower.start()
    environment = {"PDSH_SSH_ARGS_APPEND": KEEP_ALIVE} | with_exports(exports)
    running = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda number, _frame: running.send_signal(number))
    while running.poll() is None:
        time.sleep(_POLL_SECONDS)
    follower.end()
    if running.returncode == SSH_LOST:
        print("error: ssh lost a host of the run; the logs say what the others saw", file=sys.stderr)
        return HangError.exit_code
    return running.returncode if running.returncode >= 0 else 128 - running.returncode


def check_tools(launcher: str) -> None:
    for program, package in (("ssh", "openssh-client"), (LAUNCHERS[launcher], f"{launcher}, openmpi-bin for MPI")):
        if shutil.which(program) is None:
            raise ConfigError(f"{program} is not installed here, and --launcher {launcher} needs it ({package})")


def main() -> None:
    arguments = _arguments()
    config: RunConfig = load_config(arguments.config, arguments.overrides)
    hosts = read_hosts(arguments.hostfile)
    config.parallel_layout(sum(host.slots for host in hosts))
    refuse_stale_files()
    variables = exported(os.environ, arguments.export)
    master = arguments.master or ("127.0.0.1" if hosts[0].is_local else hosts[0].name)
    logs = Path(config.run.folder).absolute() / LOGS_FOLDER
    if arguments.launcher == "openmpi":
        variables |= {"MASTER_ADDR": master, "MASTER_PORT": str(arguments.master_port)}
    preflight = preflight_commands(arguments, hosts, master, variables)
    command = deepspeed_command(arguments, master, hosts, logs)
    if arguments.supervise:
        command = [sys.executable, "launch/supervise.py", *command]
    if arguments.dry_run:
        for line in (*preflight, command):
            print(shlex.join(line))
        print("\n".join(["", "DS_ENV_FILE:", *(f"{name}={value}" for name, value in variables.items())]))
        return
    check_tools(arguments.launcher)
    for host, why in silences(hosts).items():
        raise ConfigError(
            f"{host.name} does not answer to ssh ({why}): bring it up, let this host's key in, or take it out of "
            f"{arguments.hostfile}"
        )
    run_preflight(hosts, preflight)
    logs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        exports = Path(folder) / "environment"
        write_exports(exports, variables)
        code = run(command, exports, logs)
    print(f"logs of all processes: {logs}", flush=True)
    sys.exit(code)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train on the hosts of a hostfile.")
    parser.add_argument("--hostfile", type=Path, required=True, help="a line `HOST slots=NUMBER` for each host")
    parser.add_argument("--launcher", choices=LAUNCHERS, default="pdsh", help="what starts the processes (pdsh)")
    parser.add_argument("--launcher-args", default="", help="more words for pdsh or mpirun, in one argument")
    parser.add_argument("--master", default="", help="address of the first host for all others (its name)")
    parser.add_argument("--master-port", type=int, default=TRAINING_PORT, help="and the one above it are used (29500)")
    parser.add_argument("--export", action="append", default=[], metavar="NAME", help="a variable to send along")
    parser.add_argument("--supervise", action="store_true", help="start again after faults (launch/supervise.py)")
    parser.add_argument("--dry-run", action="store_true", help="show the commands, and start nothing")
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file, or the name of an installed config")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings laid over the file")
    return parser.parse_intermixed_args()


if __name__ == "__main__":
    run_command(main)
