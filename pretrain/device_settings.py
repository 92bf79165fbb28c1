"""Settings that must be made before a process first uses its device: variables that CUDA reads once, torch's switches.

    PYTORCH_ALLOC_CONF=expandable_segments:True     ranks grow, so blocks of a size are freed that nobody asks for again
    CUDA_DEVICE_MAX_CONNECTIONS=1                   tensor parallelism: kernels start in the order in which they are
                                                    issued, so an all-reduce issued first overlaps with what follows it
    CUBLAS_WORKSPACE_CONFIG=:4096:8                 train.deterministic: products in a fixed order

Variables that the user has set stay as they are. With `train.tf32`, products of fp32 matrices round their operands to
10 bits of mantissa, and add in fp32.
"""

import os
import sys
from datetime import timedelta

import torch

from pretrain.config.run import RunConfig
from pretrain.errors import ConfigError

ALLOCATOR_NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""Variables of torch's allocator. torch 2.10 to 2.13 read both; some versions warn that the second is deprecated."""
CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"
WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
DETERMINISTIC_WORKSPACES = (":4096:8", ":16:8")
"""What torch accepts under deterministic algorithms; the first is as large as the usual one of a Hopper card."""
TIMEOUT_MARGIN_SECONDS = 300.0
"""Margin for our watchdog, which looks every 10 s and observes the others for 30 s; the host may also be a step ahead
of its device."""
LONGEST_TIMEOUT = timedelta(days=20)
"""Timeout that stands for none: libraries below count milliseconds in 32 bits."""


def settle_device(config: RunConfig | None) -> None:
    """Makes all settings of this module; without a config, those that do not depend on one."""
    if not any(name in os.environ for name in ALLOCATOR_NAMES):
        os.environ[ALLOCATOR_NAMES[0]] = "expandable_segments:True"
    if "DEEPSPEED_TIMEOUT" in os.environ:
        _warn("DEEPSPEED_TIMEOUT is not read: how long processes wait for each other follows from guard.hang_seconds")
    if config is None:
        settle_arithmetic(deterministic=False, tf32=False)
        return
    if config.parallel.tensor > 1:
        start_kernels_in_order()
    settle_arithmetic(deterministic=config.train.deterministic, tf32=config.train.tf32)


def start_kernels_in_order() -> None:
    """Makes kernels start in the order in which they are issued, for tensor parallelism (`model/layers/bottleneck.py`
    and megatron-core rely on it)."""
    found = os.environ.setdefault(CONNECTIONS, "1")
    if found != "1":
        _warn(
            f"{CONNECTIONS} is {found}, and with parallel.tensor above 1 messages overlap with computation as meant "
            "only at 1: unset it"
        )


def _warn(sentence: str) -> None:
    """Prints a warning, on the first process alone."""
    if os.environ.get("RANK", "0") == "0":
        print(f"warning: {sentence}", file=sys.stderr)


def settle_arithmetic(*, deterministic: bool, tf32: bool) -> None:
    """Sets how this process computes from now on. ConfigError if an environment variable forbids it."""
    if deterministic:
        found = os.environ.setdefault(WORKSPACE, DETERMINISTIC_WORKSPACES[0])
        if found not in DETERMINISTIC_WORKSPACES:
            raise ConfigError(
                f"train.deterministic is true, and {WORKSPACE} is {found!r}: set it to "
                f"{' or '.join(DETERMINISTIC_WORKSPACES)}, or unset it"
            )
    torch.use_deterministic_algorithms(deterministic)
    # Filling every new tensor would take seconds, and is useless: nothing here reads memory that it has not written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    # cuDNN's backward pass adds in any order (torch 2.13); flash and memory-efficient attention obey the switch above.
    torch.backends.cuda.enable_cudnn_sdp(not deterministic)
    # Set in both cases: NVIDIA's images set TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1, which would switch tf32 on by itself.
    torch.set_float32_matmul_precision("high" if tf32 else "highest")


def collective_timeout(hang_seconds: float) -> timedelta:
    """How long a collective may take before torch ends the process; `hang_seconds` 0: for ever.

    It is longer than the watchdog waits, so that the watchdog, which can say who is to blame, comes first. It holds in
    all groups, those of megatron-core included; DeepSpeed uses these groups (`DeepSpeedProcessGroups`) and makes none.
    """
    if hang_seconds == 0.0:
        return LONGEST_TIMEOUT
    return min(LONGEST_TIMEOUT, timedelta(seconds=hang_seconds + TIMEOUT_MARGIN_SECONDS))
