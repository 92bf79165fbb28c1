"""A wall clock that jumps in mid-run: only the stamps of events show it."""

import os
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest

from pretrain.distributed import free_port
from tests.support.fault_runs import assert_same_end, events_of

pytestmark = [pytest.mark.faults, pytest.mark.slow]

LIBRARIES = [*Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), *Path("/usr/lib").glob("faketime/libfaketime.so.1")]
JUMP_SECONDS = 86_400


@pytest.mark.skipif(not LIBRARIES, reason="libfaketime (a Debian package of that name) is not installed")
@pytest.mark.parametrize("sign", ["-", "+"])
def test_a_jump_of_the_wall_clock_changes_nothing(config: Path, undisturbed: Path, tmp_path: Path, sign: str) -> None:
    """The clock jumps by a day, while a save writes beside the training."""
    offset, run = tmp_path / "offset", tmp_path / "run"
    offset.write_text("+0s")
    environment = os.environ | {
        "LD_PRELOAD": str(LIBRARIES[0]),
        "FAKETIME_TIMESTAMP_FILE": str(offset),
        "FAKETIME_NO_CACHE": "1",
        "DONT_FAKE_MONOTONIC": "1",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "ESPALIER_FAULT": "slow@save.shard:1:6",
    }
    command = [sys.executable, "pretrain/train.py", "--config", str(config), "checkpoint.background=true"]
    processes = [
        subprocess.Popen(command, env=environment | {"RANK": number, "LOCAL_RANK": number}) for number in ("0", "1")
    ]
    while not (run / "checkpoints" / "step_000000003").exists():
        assert all(process.poll() is None for process in processes)
        time.sleep(0.02)
    offset.write_text(f"{sign}{JUMP_SECONDS}s")
    assert [process.wait(120) for process in processes] == [0, 0]
    assert_same_end(run, undisturbed)
    moments = [datetime.fromisoformat(event["time"]) for event in events_of(run, "checkpoint")]
    assert abs((moments[-1] - datetime.now(UTC)).total_seconds()) > JUMP_SECONDS / 2
    assert all(event["stall_seconds"] < JUMP_SECONDS / 2 for event in events_of(run, "checkpoint"))
