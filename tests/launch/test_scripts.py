"""The shell scripts, as far as seconds go: help, refusals, what a set-up environment skips, what setup.py packs."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pretrain.config.run import load_config

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ("launch/environment.sh", "launch/offline_wheels.sh", "launch/quickstart.sh", "tests/run.sh")
CHECK = ("launch/installed_packages.py", "pretrain/errors.py")
"""What launch/environment.sh calls."""


def run_script(script: Path, *arguments: str, folder: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    variables = {key: value for key, value in os.environ.items() if not key.startswith("ESPALIER_")}
    return subprocess.run(
        ["bash", str(script), *arguments],
        cwd=folder,
        env=variables | environment,
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
    )


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with the scripts and nothing installed; its path has a space."""
    copy = tmp_path / "fresh checkout"
    for script in (*SCRIPTS, *CHECK, "setup.py", "constraints.txt"):
        (copy / script).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / script, copy / script)
    return copy


@pytest.fixture
def tools_folder(tmp_path: Path) -> Path:
    """A PATH with the shell's tools and a compiler, but no Python."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("bash", "cat", "cksum", "dirname", "g++", "grep", "head", "ls", "mkdir", "rm", "sed", "uname"):
        found = shutil.which(name)
        assert found, f"this machine has no {name}"
        (folder / name).symlink_to(found)
    return folder


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_describes_the_script_and_does_nothing(script: str, checkout: Path):
    shown = run_script(checkout / script, "--help")
    assert shown.returncode == 0
    assert f"bash {script}" in shown.stdout
    assert "set -" not in shown.stdout
    assert not (checkout / ".venv").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--stepz", "3"], "--stepz is not an option of launch/quickstart.sh"),
        (["--steps"], "--steps needs a value"),
        (["--steps", "0"], "--steps is 0: give a number from 1 on"),
        (["--steps", "ten"], "--steps is ten: give a number from 1 on"),
        (["--family", "bert"], "--family is bert: give llama or gpt2"),
        (["--processes", "3"], "--processes is 3: give 1, 2, 4, 8 or 16"),
    ],
)
def test_quickstart_refuses_wrong_options(arguments: list[str], sentence: str, checkout: Path):
    answer = run_script(checkout / "launch/quickstart.sh", *arguments)
    assert answer.returncode == 2
    assert answer.stdout == ""
    assert answer.stderr.startswith(f"error: {sentence}")
    assert answer.stderr.count("\n") == 1
    assert not (checkout / ".venv").exists()


def test_quickstart_leaves_foreign_folders_alone(checkout: Path, tmp_path: Path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter 1").write_text("call me")
    (tmp_path / "file").write_text("")
    for out, sentence in (("thesis", "is not empty and holds no run of Espalier"), ("file", "is a file")):
        answer = run_script(checkout / "launch/quickstart.sh", "--out", out, folder=tmp_path)
        assert answer.returncode == 2
        assert f"{tmp_path}/{out} {sentence}" in answer.stderr
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["chapter 1"]


def test_quickstart_takes_an_empty_folder_and_its_own(checkout: Path, tmp_path: Path, tools_folder: Path):
    """Past the checks of its options it stops at the missing Python."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "config.yaml").write_text("# Espalier run; resolved config\n")
    for out in ("empty", "own"):
        answer = run_script(checkout / "launch/quickstart.sh", "--out", out, folder=tmp_path, PATH=str(tools_folder))
        assert answer.returncode == 1
        assert "no Python of 3.11 or newer is found" in answer.stderr


def test_environment_says_what_is_missing(checkout: Path, tools_folder: Path):
    script = checkout / "launch/environment.sh"
    answer = run_script(script, "--fast")
    assert (answer.returncode, answer.stderr.startswith("error: --fast is not an option")) == (2, True)
    answer = run_script(script, PATH=str(tools_folder), ESPALIER_PYTHON="/bin/false")
    assert answer.returncode == 1
    assert "ESPALIER_PYTHON=/bin/false is not a Python of 3.11 or newer" in answer.stderr
    (tools_folder / "g++").unlink()
    answer = run_script(script, PATH=str(tools_folder))
    assert answer.returncode == 1
    assert "no C++ compiler is found" in answer.stderr


def test_environment_uses_the_current_python_when_asked(checkout: Path):
    command = (
        'script="$1"; shift; source "$script" && echo "$espalier_python" && python3 -c "import sys; print(sys.path)"'
    )
    answer = subprocess.run(
        ["bash", "-c", command, "bash", str(checkout / "launch/environment.sh")],
        env=os.environ | {"ESPALIER_USE_CURRENT_PYTHON": "1", "ESPALIER_PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.splitlines()[0] == sys.executable
    assert str(checkout) in answer.stdout.splitlines()[1]
    assert not (checkout / ".venv").exists()


def test_a_stamp_of_the_same_requirements_skips_the_installation(checkout: Path, tools_folder: Path):
    """It holds for this folder, these versions and the extras it names; else the set-up begins (and fails here)."""
    script = checkout / "launch/environment.sh"
    python = checkout / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    requirements = (checkout / "constraints.txt").read_bytes() + (checkout / "setup.py").read_bytes()
    checksum = subprocess.run(["cksum"], input=requirements + f"{checkout}\n".encode(), capture_output=True).stdout
    stamp = checkout / ".venv/espalier_installed"

    stamp.write_bytes(checksum + b"base\n")
    assert run_script(script, PATH=str(tools_folder)).returncode == 0
    assert "no Python" in run_script(script, "--test", PATH=str(tools_folder)).stderr

    stamp.write_bytes(checksum + b"test\n")
    assert run_script(script, "--test", PATH=str(tools_folder)).returncode == 0
    assert run_script(script, PATH=str(tools_folder)).returncode == 0

    with (checkout / "constraints.txt").open("a") as constraints:
        constraints.write("another==1\n")
    assert "no Python" in run_script(script, PATH=str(tools_folder)).stderr


@pytest.mark.parametrize("name", ["quickstart", "quickstart_gpt2"])
def test_quickstart_configs_are_valid_and_grow(name: str):
    config = load_config(str(ROOT / "configs" / f"{name}.yaml"))
    assert config.parallel_layout(2).data == 2
    assert config.rank.policy != "fixed"
    assert (
        yaml.safe_load((ROOT / "launch/quickstart.sh").read_text().split("last_step=")[1].split()[0])
        == config.train.steps
    )


def test_installed_packages_carry_configs_and_scripts(tmp_path: Path):
    packed = subprocess.run(
        [
            sys.executable,
            "setup.py",
            "-q",
            "egg_info",
            "--egg-base",
            tmp_path,
            "build",
            "--build-base",
            tmp_path / "build",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert packed.returncode == 0, packed.stderr
    library = tmp_path / "build" / "lib"
    for file in ("configs/quickstart.yaml", "launch/quickstart.sh", "pretrain/train.py", "pretrain/policies/fixed.py"):
        assert (library / file).is_file()
    assert sorted(path.name for path in library.iterdir()) == ["configs", "launch", "model", "pretrain", "tools"]


@pytest.mark.slow
def test_offline_wheels_fit_another_python(tmp_path: Path):
    done = run_script(
        ROOT / "launch/offline_wheels.sh",
        "--out",
        str(tmp_path),
        "--python",
        "3.12",
        ESPALIER_PYTHON=sys.executable,
    )
    assert done.returncode == 0, done.stderr
    wheels = sorted(path.name for path in tmp_path.iterdir())
    assert [name for name in wheels if "cp3" in name and "cp312" not in name] == []
    packages = {name.partition("-")[0] for name in wheels}
    assert {"deepspeed", "megatron_core", "pydantic", "pydantic_core", "hjson", "zstandard"} <= packages
    assert {"typing_extensions", "liger_kernel", "filelock", "rich"} <= packages
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 32 * 2**20
    assert "torch" not in packages
    assert next(name for name in wheels if name.startswith("deepspeed")).endswith("-py3-none-any.whl")
