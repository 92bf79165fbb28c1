"""Triton's kernels: their numbers in Triton's interpreter, and that they compile for a GPU."""

import json
import os
import subprocess
import sys

import pytest


@pytest.fixture(scope="module")
def differences() -> dict[str, dict[str, float]]:
    """Relative differences from torch's operators, by case and tensor."""
    interpreted = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "tests.support.interpreted_kernels"]
    finished = subprocess.run(command, env=interpreted, capture_output=True, text=True, check=True, timeout=300)
    return json.loads(finished.stdout.splitlines()[-1])


@pytest.mark.parametrize("kernel", ["statistics", "scale", "swiglu", "rotary"])
def test_kernels_compute_what_torch_computes(differences: dict[str, dict[str, float]], kernel: str) -> None:
    """Forward and backward; in bf16 to one rounding, which the interpreter cuts off where torch rounds."""
    cases = {case: found for case, found in differences.items() if case.startswith(kernel)}
    assert len(cases) >= 2
    for case, found in cases.items():
        tolerance = 2**-7 if "bfloat16" in case else 1e-6
        assert found, case
        assert all(difference <= tolerance for difference in found.values()), (case, found)


def test_one_kernel_each_compiles_for_a_gpu_that_is_not_there() -> None:
    compile_all = "from tests.support.interpreted_kernels import compile_for_gpus; compile_for_gpus()"
    plain = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    finished = subprocess.run(
        [sys.executable, "-c", compile_all], env=plain, capture_output=True, text=True, check=False, timeout=300
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
