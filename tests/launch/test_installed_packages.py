"""What a Python without an environment of ours lacks, or has for another Python."""

import os
import subprocess
import sys
from importlib.metadata import Distribution
from pathlib import Path

import pytest

from launch.installed_packages import NEEDED, check, foreign_tags
from pretrain.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


def unpacked(folder: Path, name: str, tag: str) -> Path:
    """What `pip install --target` leaves of a wheel's facts."""
    facts = folder / f"{name}-1.0.dist-info"
    facts.mkdir(parents=True)
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (facts / "WHEEL").write_text(f"Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: {tag}\n")
    return facts


@pytest.mark.parametrize(
    ("tag", "foreign"),
    [
        ("py3-none-any", ""),
        ("py2.py3-none-any", ""),
        ("cp311-cp311-manylinux_2_17_x86_64", ""),
        ("cp38-abi3-manylinux_2_17_x86_64", ""),
        ("cp39.cp310.cp311.cp312-abi3-manylinux_2_28_x86_64", ""),
        ("cp312-cp312-manylinux_2_17_x86_64", "cp312"),
        ("cp310-cp310-manylinux_2_17_x86_64", "cp310"),
        ("cp312-abi3-manylinux_2_17_x86_64", "cp312"),
    ],
)
def test_a_wheel_goes_with_the_pythons_of_its_tags(tmp_path: Path, tag: str, foreign: str) -> None:
    assert foreign_tags(Distribution.at(unpacked(tmp_path, "thing", tag)), (3, 11)) == foreign


def test_this_python_has_what_is_needed() -> None:
    check(NEEDED)
    with pytest.raises(ConfigError, match="has no no_such_thing, nor_this: install them, or unset ESPALIER_USE"):
        check([*NEEDED, "no_such_thing", "nor_this"])


def test_carried_wheels_of_another_python_are_named(tmp_path: Path) -> None:
    """As a user meets it: the script, a folder of unpacked wheels in front, one sentence, no traceback."""
    unpacked(tmp_path, "pydantic_core", "cp39-cp39-manylinux_2_17_x86_64")
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "ESPALIER_USE_CURRENT_PYTHON": "1"}
    command = ["bash", str(ROOT / "launch" / "environment.sh")]
    found = subprocess.run(
        command, env=environment | {"ESPALIER_PYTHON": sys.executable}, capture_output=True, text=True, check=False
    )
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    assert found.returncode == 2
    assert found.stderr == (
        f"error: {sys.executable} is Python {version} and finds wheels of another one, pydantic_core for cp39: collect "
        f"them with bash launch/offline_wheels.sh --out DIR --python {version}\n"
    )
