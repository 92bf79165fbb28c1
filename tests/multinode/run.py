"""Trains over hosts of one machine (tests/multinode/hosts.py) as over those of a cluster, and cuts one off.

    bash tests/multinode/run.sh            (as root; installs what is missing)
    bash tests/multinode/run.sh --openmpi
    bash tests/multinode/run.sh --pods

Three hosts of two processes: tensor parallel inside, data parallel across. Ranks grow, checkpoints are written; the
third host's link goes down, and the run ends with a sentence; with the two hosts that are left it goes on. Prints what
it saw, with seconds, and ends with 1 where something is not as it should be.
"""

import argparse
import json
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import yaml

from pretrain.checkpoint.reader import CheckpointReader, find_checkpoint, step_folders
from tests.multinode.hosts import Host, network
from tests.support.training_runs import make_corpus, write_config

ROOT = Path(__file__).resolve().parents[2]
SLOTS, STEPS, CUT_AFTER, GROWTH = 2, 40, 12, 8
HANG_SECONDS = 30
MOST_SECONDS = 600.0


class Launch:
    """A command that was started on a host."""

    def __init__(self, host: Host, command: Sequence[str], output: Path, **environment: str) -> None:
        self.output, self.began = output, time.perf_counter()
        self.process = host.start(command, output, environment)

    @property
    def said(self) -> str:
        return self.output.read_text(errors="replace")

    def wait_for(self, text: str) -> float:
        """Seconds from the start until `text` was said."""
        while text not in self.said:
            self._check(self.process.poll() is None, f"the run never said {text!r}")
            self._check(time.perf_counter() - self.began < MOST_SECONDS, f"no {text!r} in {MOST_SECONDS:g} s")
            time.sleep(0.05)
        return time.perf_counter() - self.began

    def ends_with(self, code: int, *texts: str) -> float:
        """Seconds until it had ended, in this way."""
        start = time.perf_counter()
        found = self.process.wait(MOST_SECONDS)
        seconds = time.perf_counter() - start
        self._check(found == code, f"the exit code is {found} and should be {code}")
        for text in texts:
            self._check(text in self.said, f"{text!r} was not said")
        return seconds

    def _check(self, fine: bool, complaint: str) -> None:
        if not fine:
            self.process.kill()
            raise SystemExit(f"{complaint}; what was said:\n{self.said[-6000:]}")


def multinode(host: Host, hostfile: Path, config: Path, output: Path, *more: str) -> Launch:
    """`launch/multinode.sh`, started on a host."""
    command = ["bash", "launch/multinode.sh", "--hostfile", str(hostfile), "--config", str(config), *more]
    return Launch(host, command, output)


def hostfile(path: Path, hosts: Sequence[Host]) -> Path:
    path.write_text("".join(f"{host.name} slots={SLOTS}\n" for host in hosts))
    return path


def refusals(hosts: Sequence[Host], config: Path, folder: Path) -> None:
    """What is seen before anything starts."""
    everybody = hostfile(folder / "hosts", hosts)
    unknown = folder / "unknown"
    unknown.write_text(f"{hosts[0].name} slots=2\nnobody slots=2\n")
    launch = multinode(hosts[0], unknown, config, folder / "unknown.out")
    report("refused: unknown host", launch.ends_with(2, "error: nobody does not answer to ssh"))
    hosts[1].cut()
    launch = multinode(hosts[0], everybody, config, folder / "unreachable.out")
    report("refused: unreachable host", launch.ends_with(2, f"error: {hosts[1].name} does not answer to ssh"))
    hosts[1].cut(down=False)
    port = 29500
    server = hosts[0].start([sys.executable, "-m", "http.server", str(port)], folder / "server.out", {})
    launch = multinode(hosts[0], everybody, config, folder / "port.out")
    report("refused: a port in use", launch.ends_with(2, f"port {port} of {hosts[0].name} is in use"))
    server.kill()


def over_mpi(hosts: Sequence[Host], config: Path, folder: Path) -> None:
    """Trains on two hosts to the end, started by mpirun."""
    interfaces = "--allow-run-as-root --mca btl_tcp_if_include wire --mca oob_tcp_if_include wire"
    more = ["--launcher", "openmpi", f"--launcher-args={interfaces}", f"run.folder={folder / 'mpi'}"]
    launch = multinode(hosts[0], hostfile(folder / "hosts", hosts[:2]), config, folder / "mpi.out", *more)
    report("OpenMPI: launch to the end of the first step", launch.wait_for("step 1/"))
    launch.ends_with(0, f"step {STEPS}/{STEPS}")


def as_pods(hosts: Sequence[Host], config: Path, folder: Path) -> None:
    """Two hosts as pods, by the command of launch/kubernetes.yaml: one is evicted, and both are started anew."""
    _, job = yaml.safe_load_all((ROOT / "launch" / "kubernetes.yaml").read_text(encoding="utf-8"))
    container = job["spec"]["template"]["spec"]["containers"][0]
    ours = {"--slots": str(SLOTS), "--config": str(config), "run.folder": str(folder / "pods")}
    given = dict(argument.split("=", 1) for argument in container["args"])
    command = [*container["command"], *(f"{key}={value}" for key, value in (given | ours).items())]
    pods = hosts[: int(given["--nodes"])]

    def start(life: str) -> list[Launch]:
        return [
            Launch(pod, command, folder / f"{life}_{index}.out", JOB_COMPLETION_INDEX=str(index))
            for index, pod in enumerate(pods)
        ]

    first = start("first")
    report("pods: start to the end of the first step", first[0].wait_for("step 1/"))
    first[0].wait_for(f"step {CUT_AFTER}/")
    first[1].process.terminate()  # every command on the way to launch/node.py has become the next one
    report("eviction of a pod to the end of both", max(pod.ends_with(143) for pod in first))
    second = start("second")
    second[0].wait_for("[resume] step ")
    for pod in second:
        pod.ends_with(0)
    second[0].wait_for(f"step {STEPS}/{STEPS}")


def training(hosts: Sequence[Host], config: Path, folder: Path, run: Path) -> None:
    """Trains from the launch on all hosts to the end on those that are left."""
    launch = multinode(hosts[0], hostfile(folder / "hosts", hosts), config, folder / "first.out")
    report("preflight passed", launch.wait_for("preflight: the run may start"))
    report("launch to the end of the first step", launch.wait_for("step 1/"))
    launch.wait_for(f"step {CUT_AFTER}/")
    hosts[-1].cut()
    ended = launch.ends_with(5, f"on {hosts[-1].name} stopped answering")
    report("cut to the end of the run", ended)
    print(next(line for line in launch.said.splitlines() if line.startswith("error: ")))
    committed = len(step_folders(run / "checkpoints"))
    if not committed:
        raise SystemExit("there is no checkpoint")
    start = time.perf_counter()
    again = multinode(hosts[0], hostfile(folder / "left", hosts[:-1]), config, folder / "second.out")
    again.wait_for("[resume] step ")
    first = next(line for line in again.said.splitlines() if line.startswith("[resume] step "))
    again.wait_for(f"step {int(first.split()[2]) + 1}/")
    report("relaunch to the end of its first step", time.perf_counter() - start)
    print(first)
    again.ends_with(0, f"step {STEPS}/{STEPS}")
    newest = find_checkpoint(run / "checkpoints", verify=True)
    assert newest is not None
    reader = CheckpointReader(newest)
    grown = {record["step"] for record in reader.state["growth"]}
    logs = sorted(path.name for path in (run / "logs").iterdir())
    print(
        f"layout at the end {json.dumps(reader.state['layout'])}, growth after steps {sorted(grown)}, {len(logs)} logs"
    )
    if reader.step != STEPS or GROWTH not in grown or reader.state["layout"]["data"] != len(hosts) - 1:
        raise SystemExit("the run did not end as it should")
    if len(logs) < SLOTS * (2 * len(hosts) - 1):
        raise SystemExit(f"a log is missing: {logs}")


def show_logs(folder: Path) -> None:
    """The end of what each process said, since a launcher that is killed may keep the last lines to itself."""
    for log in sorted(folder.glob("*")):
        print(f"--- {log.name}\n{log.read_text(errors='replace')[-3000:]}", flush=True)


def report(what: str, seconds: float) -> None:
    print(f"{what}: {seconds:.1f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train over hosts of one machine.")
    parser.add_argument("--hosts", type=int, default=3, help="2 or 3")
    parser.add_argument("--pods", action="store_true", help="two of them as the pods of launch/kubernetes.yaml")
    parser.add_argument("--openmpi", action="store_true", help="by mpirun, on two of them, and nothing is cut")
    arguments = parser.parse_args()
    print(f"{arguments.hosts} hosts of {SLOTS} processes on {socket.gethostname()}", flush=True)
    with tempfile.TemporaryDirectory(prefix="espalier_multinode_") as name, network(arguments.hosts) as hosts:
        folder, run = Path(name), Path(name) / "run"
        make_corpus(folder / "corpus")
        settings: dict[str, dict[str, object]] = {
            "train": {"steps": STEPS, "micro_batch": 4, "global_batch": 24, "log_every": 1, "validate_every": 0},
            "parallel": {"tensor": SLOTS},
            "rank": {"schedule": [{"step": GROWTH, "rank": 6}]},
            "checkpoint": {"every": 5},
            "guard": {"hang_seconds": HANG_SECONDS},
        }
        config = write_config(folder / "run.yaml", folder / "corpus", run, **settings)
        if arguments.openmpi:
            over_mpi(hosts, config, folder)
        elif arguments.pods:
            as_pods(hosts, config, folder)
        else:
            refusals(hosts, config, folder)
            try:
                training(hosts, config, folder, run)
            except SystemExit:
                show_logs(run / "logs")
                raise
    print("multinode: all as it should be")


if __name__ == "__main__":
    main()
