"""A supervised run: started again after faults, given up in a crash loop, continued on the hosts that are left."""

import fcntl
import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.supervise import config_of, newest_step, with_hosts_that_answer
from pretrain.errors import ConfigError
from tests.support.training_runs import write_config

pytestmark = pytest.mark.faults


@pytest.fixture
def config(corpus: Path, tmp_path: Path) -> Path:
    return write_config(tmp_path / "run.yaml", corpus, tmp_path / "run", checkpoint={"every": 3})


ALONE = (sys.executable,)
BY_DEEPSPEED = (str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2")


def _supervise(config: Path, faults: str, *options: str, launcher: tuple[str, ...] = ALONE) -> "subprocess.Popen[str]":
    command = [sys.executable, "launch/supervise.py", "--wait", "0", *options, *launcher, "pretrain/train.py"]
    environment = os.environ | {"ESPALIER_FAULT": faults, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [*command, "--config", str(config)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "code"),
    [pytest.param(ALONE, 137, id="alone"), pytest.param(BY_DEEPSPEED, 247, id="deepspeed")],
)
def test_a_run_goes_on_after_a_kill(config: Path, launcher: tuple[str, ...], code: int) -> None:
    running = _supervise(config, "kill@step.forward:0:7", launcher=launcher)
    stdout, _ = running.communicate(timeout=240)
    assert running.returncode == 0
    assert f"[supervise] exit code {code}; starting again from step 6 in 0 s" in stdout
    assert newest_step(config.parent / "run" / "checkpoints") == 12
    events = [json.loads(line) for line in (config.parent / "run" / "events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "resume"] == [6]


@pytest.mark.slow
def test_a_fault_that_comes_back_ends_with_a_diagnosis(config: Path) -> None:
    running = _supervise(config, "raise@step.forward:0:7!", "--attempts", "2")
    _, stderr = running.communicate(timeout=240)
    assert running.returncode == 1
    last = stderr.splitlines()[-1]
    assert last.startswith("error: 2 starts in a row ended before the checkpoint after step 6, with exit codes 1, 1")
    assert last.endswith("RuntimeError: a fault on purpose")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [ALONE, BY_DEEPSPEED], ids=["alone", "deepspeed"])
def test_a_signal_is_passed_on_and_ends_it(config: Path, launcher: tuple[str, ...]) -> None:
    running = _supervise(config, "slow@step.forward:0:7", launcher=launcher)
    checkpoints = config.parent / "run" / "checkpoints"
    while newest_step(checkpoints) < 6 and running.poll() is None:
        time.sleep(0.05)
    running.send_signal(signal.SIGTERM)
    _, stderr = running.communicate(timeout=60)
    assert running.returncode == 143
    assert "error: SIGTERM: saved at step" in stderr


@pytest.mark.slow
def test_processes_end_with_what_started_them(config: Path) -> None:
    """The launcher is killed; its process saves, ends, and lets go of the folder."""
    running = _supervise(config, "slow@step.forward:0:7")
    checkpoints = config.parent / "run" / "checkpoints"
    while newest_step(checkpoints) < 6 and running.poll() is None:
        time.sleep(0.05)
    running.kill()
    running.communicate(timeout=60)
    with (config.parent / "run" / ".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # waits until the process is gone
    assert 6 < newest_step(checkpoints) < 12


@pytest.mark.slow
def test_a_mistake_is_not_tried_again(config: Path) -> None:
    running = _supervise(config, "no fault at all")
    stdout, stderr = running.communicate(timeout=60)
    assert running.returncode == 2
    assert "[supervise]" not in stdout
    assert stderr.count("error: ESPALIER_FAULT") == 1


@pytest.mark.parametrize("command", [["deepspeed"], ["true", "other.py"]])
def test_a_command_without_a_run_is_refused(command: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"there is no pretrain/train\.py"):
        config_of(command)


def test_hosts_that_do_not_answer_are_left_out(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`ssh` here is a script that knows who is gone. The global batch of 8 in micro-batches of 4 allows 1 or 2."""
    ssh = tmp_path / "bin" / "ssh"
    ssh.parent.mkdir()
    ssh.write_text('#!/bin/sh\ncase "$*" in *node2*) exit 255;; esac\n')
    ssh.chmod(ssh.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{ssh.parent}:{os.environ['PATH']}")
    hosts = tmp_path / "hosts"
    hosts.write_text("# ours\nnode1 slots=1\nnode2 slots=1\nnode3 slots=1\nnode4 slots=1\n")
    tail = ["--master_addr", "node2", "pretrain/train.py", "--config", str(config)]
    for command in (["deepspeed", "--hostfile", str(hosts), *tail], ["deepspeed", f"--hostfile={hosts}", *tail]):
        changed = with_hosts_that_answer(command, config_of(command), ssh.parent)
        place = len(command) - len(tail)
        assert Path(changed[place - 1].removeprefix("--hostfile=")).read_text() == "node1 slots=1\nnode3 slots=1\n"
        assert changed[place : place + 2] == ["--master_addr", "node1"]  # the old one is gone
        assert changed[place + 2 :] == tail[2:]
        assert "node2 does not answer; going on with node1, node3" in capsys.readouterr().out
