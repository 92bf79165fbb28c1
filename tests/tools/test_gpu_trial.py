"""The ladder for a GPU, tried without one: what it refuses, its parts in tiny sizes, and the table of parity."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from model.process_groups import single_process
from tools.gpu_parity import Case, passes, relative, worst_gradient

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tools" / "gpu_trial.sh"


def trial(*arguments: object, folder: Path = ROOT, **variables: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "ESPALIER_PYTHON": sys.executable, "DRY": "1", **variables}
    command = ["bash", str(SCRIPT), *map(str, arguments)]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=1500, check=False
    )


# What it refuses ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no rung is named"),
        (["1", "6"], "6 is no rung"),
        (["--out"], "--out needs a value"),
        (["--before", "/nowhere", "3"], "--before /nowhere is no checkout"),
        (["--wheels", "/nowhere", "1"], "--wheels /nowhere holds no wheels"),
    ],
)
def test_mistakes_get_a_sentence(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = trial(*arguments, *([] if "--out" in arguments else ["--out", tmp_path]))
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_it_starts_in_the_root_alone(tmp_path: Path) -> None:
    done = trial("1", folder=tmp_path)
    assert done.returncode == 2
    assert "not the root of the checkout" in done.stderr


def test_wheels_of_another_python_are_refused(tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    (wheels / "megatron_core-0.16.1-cp39-cp39-manylinux_2_28_x86_64.whl").write_bytes(b"")
    done = trial("--out", tmp_path / "out", "--wheels", wheels, "1")
    assert done.returncode == 2
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert f"megatron_core-0.16.1-cp39-cp39-manylinux_2_28_x86_64.whl is not for this Python {version}" in done.stderr
    assert f"--python {version}" in done.stderr


def test_missing_packages_are_named(tmp_path: Path) -> None:
    bare = tmp_path / "python"  # this Python without its packages
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    bare.chmod(0o755)
    done = trial("--out", tmp_path / "out", "1", ESPALIER_PYTHON=str(bare), PYTHONPATH="")
    assert done.returncode == 2
    assert "has no torch, deepspeed, megatron.core" in done.stderr
    assert "--wheels" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_how_to_try_it(tmp_path: Path) -> None:
    done = trial("--out", tmp_path, "1", DRY="0")
    assert done.returncode == 2
    assert "torch finds no GPU: DRY=1" in done.stderr


# Its parts ------------------------------------------------------------------------------------------------------------


def test_a_failed_part_is_told_and_archived(tmp_path: Path) -> None:
    """Spectra need no engine and are the cheapest part; a folder in the way of its table makes it fail."""
    out, kept = tmp_path / "out", tmp_path / "kept"
    kept.mkdir()
    (out / "spectra.json").mkdir(parents=True)
    done = trial("--out", out, "--only", "spectra", "--", "2", OUT=str(kept))
    assert done.returncode == 1
    assert "spectra: exit 2 after" in done.stdout
    with tarfile.open(kept / "trial.tgz") as archive:
        names = archive.getnames()
    assert {"./summary.txt", "./spectra.log", "./machine.txt"} <= set(names)
    assert not any(name.startswith("./work") for name in names)


@pytest.mark.slow
def test_every_rung_runs_on_a_cpu(tmp_path: Path) -> None:
    done = trial("--out", tmp_path, "--before", ROOT, "1", "2", "3", "4", "5")
    assert done.returncode == 0, done.stdout + done.stderr
    summary = (tmp_path / "summary.txt").read_text()
    parts = [line.partition(":")[0] for line in summary.splitlines()]
    for name in ("parity", "steps", "quickstart", "text", "zero_2", "zero_3_resumed", "zero_3_same", "events",
                 "spectra", "memory", "gpt2_medium", "llama", "before_gpt2", "largest", "race_growing"):  # fmt: skip
        assert name in parts
    assert "exit 0" in summary
    rows = json.loads((tmp_path / "gpt2_medium.json").read_text())["rows"]
    assert [row["name"] for row in rows[:4]] == ["dense", "factored", "dense, blocks alone", "factored, blocks alone"]
    for kind in ("dense", "fixed", "growing"):
        assert (tmp_path / "runs" / f"race_{kind}.summary.json").is_file()
    assert shutil.which("tar")


# Parity ---------------------------------------------------------------------------------------------------------------


def test_worst_gradient_names_the_parameter() -> None:
    reference = {"a": torch.ones(4), "b": torch.tensor([1e-6])}
    name, error = worst_gradient({"a": torch.ones(4) * 1.01, "b": torch.tensor([2e-6])}, reference)
    assert name == "a"  # b is nothing beside all gradients
    assert error == pytest.approx(0.01, rel=1e-3)
    assert worst_gradient({"a": torch.ones(4), "b": torch.tensor([float("nan")])}, reference)[0] == "b"
    assert worst_gradient({"a": torch.ones(4)}, reference)[1] == float("inf")


def test_passes_find_a_wrong_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table is no tautology: a layer that scales its gradient differs in the rows of gradients, not of losses."""
    config = Case("gpt2", "factored").config(dry=True)
    with single_process():
        loss, gradients, _ = passes(config, "documents")
        real = torch.nn.functional.gelu

        def wrong(values: torch.Tensor, **settings: str) -> torch.Tensor:
            output = real(values, **settings)
            return output + 0.01 * (values - values.detach())

        monkeypatch.setattr(torch.nn.functional, "gelu", wrong)
        found, found_gradients, _ = passes(config, "documents")
    assert relative(found, loss) == 0.0
    name, error = worst_gradient(found_gradients, gradients)
    assert error > 5e-4
    assert name


@pytest.mark.slow
def test_parity_of_the_cpu_with_itself(tmp_path: Path) -> None:
    file = tmp_path / "parity.json"
    command = [sys.executable, str(ROOT / "tools" / "gpu_parity.py"), "--dry", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(file.read_text())["rows"]
    assert len(rows) > 60
    assert all(row["ok"] for row in rows)
    assert all(row["found"] == 0.0 for row in rows if "float32" in row["check"] and "dropout" not in row["check"])
