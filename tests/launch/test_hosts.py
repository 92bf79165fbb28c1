"""Hostfiles, the environment that goes along, and what the launchers would start."""

import os
import shlex
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from launch import multinode, node
from launch.exports import exported, refuse_stale_files, write_exports
from launch.follower import Follower
from launch.hosts import Host, most_that_divide, read_hosts
from launch.links import ring
from launch.node_facts import NodeFacts, checkpoints_bytes, gather, nearest_folder
from launch.preflight import judge, slow_links
from pretrain.config.run import RunConfig, load_config
from pretrain.errors import ConfigError
from tests.support.huggingface_files import byte_level
from tests.support.training_runs import write_config

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def config(corpus: Path, tmp_path: Path) -> Path:
    return write_config(tmp_path / "run.yaml", corpus, tmp_path / "runs" / "x")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "names no host"),
        ("# nobody\n\n", "names no host"),
        ("node1 slots=8\nnode1 slots=8\n", "line 2: node1 is there a second time"),
        ("node1 slots=0\n", "line 1: node1 has 0 slots"),
        ("node1 slots=8\r\nnode2 slots=8\r\n", "the line ends of Windows"),
        ("-oProxyCommand=x slots=1\n", "is not `HOST slots=NUMBER`"),
        ("node1\n", "is not `HOST slots=NUMBER`"),
        ("a;touch x slots=1\n", "is not `HOST slots=NUMBER`"),
        ("$(touch x) slots=2\n", "is not `HOST slots=NUMBER`"),
        ("node1 slots=-2\n", "is not `HOST slots=NUMBER`"),
    ],
)
def test_a_hostfile_is_read_strictly(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "hosts").write_bytes(content.encode())
    with pytest.raises(ConfigError, match=words.replace("$", r"\$")):
        read_hosts(tmp_path / "hosts")


def test_a_missing_hostfile_is_no_run_of_one_node(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_hosts(tmp_path / "hosts")


def test_hosts_over_which_nothing_divides_are_refused(config: Path) -> None:
    with pytest.raises(ConfigError, match="the run divides over none of their numbers"):
        most_that_divide([Host("node1", 1)], load_config(str(config), ["parallel.tensor=2"]))


def test_what_matters_goes_along_and_nothing_else() -> None:
    here = {"NCCL_DEBUG": "INFO", "GLOO_SOCKET_IFNAME": "eth0", "SECRET": "x", "OMP_NUM_THREADS": "4", "MINE": "a b"}
    assert exported(here, []) == {"NCCL_DEBUG": "INFO", "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "4"}
    assert exported(here, ["MINE"])["MINE"] == "a b"


@pytest.mark.parametrize("value", ["$(touch x)", "`touch x`", "a;b", "a\nNAME=b", '"', "a&b"])
@pytest.mark.parametrize("name", ["NCCL_DEBUG", "PYTHONPATH"])
def test_a_value_that_a_shell_would_take_apart_is_refused(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"the variable {name} would go to all nodes"):
        exported({name: value}, [])


@pytest.mark.parametrize("name", ["NOT_SET", "a b", "X=1"])
def test_a_variable_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="--export"):
        exported({}, [name])


def test_a_stale_environment_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    refuse_stale_files()
    (tmp_path / ".deepspeed_env").write_text("NCCL_DEBUG=INFO\n")
    with pytest.raises(ConfigError, match="is left from another launch"):
        refuse_stale_files()


def test_the_written_environment_is_what_deepspeed_reads(tmp_path: Path) -> None:
    """DeepSpeed's own code, in a process of its own, since it takes the file's name when it is imported."""
    write_exports(tmp_path / "environment", {"NCCL_DEBUG": "INFO", "MINE": "a b"})
    script = (
        "import os; from deepspeed.launcher import runner\n"
        "path = os.path.join(runner.DEEPSPEED_ENVIRONMENT_PATHS[1], runner.DEEPSPEED_ENVIRONMENT_NAME)\n"
        "print([line.split('=', maxsplit=1) for line in open(path)])"
    )
    environment = os.environ | {"DS_ENV_FILE": str(tmp_path / "environment")}
    shown = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert "[['NCCL_DEBUG', 'INFO\\n'], ['MINE', 'a b\\n']]" in shown.stdout


def _dry_run(monkeypatch: pytest.MonkeyPatch, module: object, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["launch", *arguments, "--dry-run"])
    module.main()  # type: ignore[attr-defined]


@pytest.mark.parametrize("script", ["multinode.sh", pytest.param("supervise.sh", marks=pytest.mark.slow)])
def test_a_script_hands_its_arguments_on(script: str) -> None:
    environment = os.environ | {"ESPALIER_USE_CURRENT_PYTHON": "1", "ESPALIER_PYTHON": sys.executable}
    command = ["bash", f"launch/{script}", "--no-such-option"]
    shown = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert shown.returncode == 2
    assert f"usage: {script.replace('.sh', '.py')}" in shown.stderr


@pytest.mark.parametrize("launcher", ["pdsh", "openmpi"])
def test_a_dry_run_shows_every_command(
    launcher: str, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("node1 slots=1\nnode2 slots=1\n")
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    options = ["--hostfile", str(hosts), "--launcher", launcher, "--supervise", "--config", str(config)]
    _dry_run(monkeypatch, multinode, *options, "train.steps=30")
    first, second, third, *rest = capsys.readouterr().out.splitlines()
    for number, line in enumerate((first, second)):
        assert f" node{number + 1} " in line
        assert f"--node {number} --names node1,node2" in line
        assert "NCCL_DEBUG=WARN" in line
    words = shlex.split(third)
    assert words[1:4] == ["launch/supervise.py", sys.executable, "-m"]
    assert f"--launcher {launcher}" in third
    assert words[-1] == "train.steps=30"
    assert ("MASTER_ADDR=node1" in rest) == (launcher == "openmpi")
    assert not (tmp_path / "runs").exists()


def test_a_layout_that_does_not_divide_is_refused_at_once(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("node1 slots=4\n")
    with pytest.raises(ConfigError, match=r"parallel\.tensor"):
        _dry_run(monkeypatch, multinode, "--hostfile", str(hosts), "--config", str(config), "parallel.tensor=8")


def test_a_node_starts_its_own_processes(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = ["--nodes", "2", "--node", "1", "--master", "node1", "--slots", "1"]
    _dry_run(monkeypatch, node, *place, "--config", str(config))
    first, second = capsys.readouterr().out.splitlines()
    assert "launch/preflight.py --nodes 2 --node 1 --slots 1 --master node1" in first
    assert "--no_ssh" in second
    assert "--node_rank 1 --master_addr node1" in second
    with pytest.raises(ConfigError, match="--node is 2"):
        _dry_run(monkeypatch, node, *place[:3], "2", *place[4:], "--config", str(config))


@pytest.mark.slow
def test_the_slurm_script_shows_a_task(config: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    environment |= {"ESPALIER_USE_CURRENT_PYTHON": "1", "ESPALIER_PYTHON": sys.executable, "ESPALIER_SLOTS": "2"}
    command = ["bash", "launch/slurm.sbatch", "--dry-run", "--config", str(config), "parallel.tensor=2"]
    shown = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stderr
    assert "--no_ssh" in shown.stdout
    assert "parallel.tensor=2" in shown.stdout


def test_the_kubernetes_job_agrees_with_itself() -> None:
    service, job = yaml.safe_load_all((ROOT / "launch" / "kubernetes.yaml").read_text())
    spec = job["spec"]
    container = spec["template"]["spec"]["containers"][0]
    arguments = dict(word.removeprefix("--").split("=", 1) for word in container["args"])
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"] == int(arguments["nodes"])
    assert arguments["master"] == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert spec["template"]["spec"]["subdomain"] == service["metadata"]["name"]
    assert int(arguments["slots"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    assert "launch/node.py" in container["command"][2]


def facts(config: RunConfig, tmp_path: Path) -> NodeFacts:
    """Facts of this machine."""
    token = tmp_path / "token"
    token.touch()
    return gather(config, 1, token=token, clock_seconds=0.0)


def test_equal_nodes_may_start(config: Path, tmp_path: Path) -> None:
    run = load_config(str(config))
    here = facts(run, tmp_path)
    errors, _ = judge([here, replace(here, host="other")], run, 1)
    assert errors == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"python": "3.9.1"}, "other has Python 3.9.1"),
        ({"versions": {"torch": "2.0"}}, "other has torch 2.0"),
        ({"revision": "abc"}, "other has revision abc"),
        ({"config": "abc"}, "other has settings abc"),
        ({"sees_folder": False}, "set run.folder to a file system that all nodes share"),
        ({"gpus": [("H100", 10)], "slots": 4}, "other has 1 GPUs, and its line in the hostfile 4 slots"),
        ({"files": {"data.tokenizer": "missing"}}, "other does not find data.tokenizer"),
        ({"device_error": "H100 has no bf16"}, "other: H100 has no bf16"),
        ({"error": "there is no config"}, "other: there is no config"),
    ],
)
def test_a_node_that_differs_is_named(config: Path, tmp_path: Path, change: dict[str, object], words: str) -> None:
    run = load_config(str(config))
    here = facts(run, tmp_path)
    if "files" in change:
        change = {"files": here.files | {"data.tokenizer": "missing"}}
    errors, _ = judge([here, replace(here, host="other", **change)], run, 1)  # type: ignore[arg-type]
    assert any(words in error for error in errors), errors


def test_all_corpora_and_a_tokenizers_folder_are_looked_for(config: Path, tmp_path: Path) -> None:
    byte_level(tmp_path / "gpt2")
    prefix = load_config(str(config)).data.prefix
    run = load_config(
        str(config),
        [
            "data.prefix=null",
            f"data.blend={{{prefix}: 1, {tmp_path}/other: 2}}",
            "data.split=null",
            f"data.validation={{books: {tmp_path}/books}}",
            f"data.tokenizer={tmp_path}/gpt2",
        ],
    )
    here = facts(run, tmp_path)
    errors, _ = judge([here], run, 1)
    missing = [error.partition(": copy it there")[0].partition("does not find ")[2] for error in errors]
    assert missing == [
        *(f"data.blend {tmp_path}/other{suffix}" for suffix in (".bin", ".idx", ".json")),
        *(f"data.validation {tmp_path}/books{suffix}" for suffix in (".bin", ".idx", ".json")),
    ]
    assert "or set data.blend to a shared file" in errors[0]


def test_a_clock_that_is_off_and_a_slow_link_are_warned_about(config: Path, tmp_path: Path) -> None:
    run = load_config(str(config))
    here = facts(run, tmp_path)
    _, warnings = judge([here, replace(here, host="other", clock_seconds=-90.0)], run, 1)
    assert any("the clock of other is -90.0 s off" in warning for warning in warnings)
    assert slow_links({"0-1": 10e9, "1-2": 9e9, "0-2": 1e9})[0].startswith("0-2 exchanges 1.00 GB/s")
    assert slow_links({}) == []
    assert ring(1) == []
    assert ring(2) == [(0, 1)]
    assert ring(3) == [(0, 1), (0, 2), (1, 2)]


def test_room_for_the_retained_checkpoints_is_asked_for(config: Path, tmp_path: Path) -> None:
    run = load_config(str(config), ["model.vocabulary=500", "checkpoint.keep=2"])
    needed = checkpoints_bytes(run)
    assert checkpoints_bytes(load_config(str(config), ["model.vocabulary=500", "checkpoint.keep=5"])) == 2 * needed
    errors, _ = judge([replace(facts(run, tmp_path), free_bytes=needed - 1)], run, needed)
    assert "lower checkpoint.keep" in errors[0]
    assert nearest_folder(tmp_path / "a" / "b") == tmp_path


def test_logs_are_followed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, first = tmp_path / "1_rank0.log", tmp_path / "2_rank0.log"
    old.write_text("of an earlier life\n")
    follower = Follower(tmp_path)
    follower.start()
    first.write_text("step 1/2\nhalf a li")
    (tmp_path / "2_rank1.log").write_text("nothing to say\nerror: lost\n")
    second = tmp_path / "1" / "rank.0" / "stdout"
    second.parent.mkdir(parents=True)
    second.write_text("of mpirun\n")
    follower.end()
    shown = capsys.readouterr()
    assert sorted(shown.out.splitlines()) == ["of mpirun", "step 1/2"]
    assert shown.err == "error: lost\n"


def test_an_ssh_that_is_refused_is_told(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`ssh` here is a script that refuses."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("ssh", "echo Permission denied >&2; exit 255"), ("pdsh", "exit 1")):
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    hosts = tmp_path / "hosts"
    hosts.write_text("node1 slots=1\n")
    monkeypatch.setattr(sys, "argv", ["launch", "--hostfile", str(hosts), "--config", str(config)])
    with pytest.raises(ConfigError, match=r"node1 does not answer to ssh \(Permission denied\)"):
        multinode.main()
