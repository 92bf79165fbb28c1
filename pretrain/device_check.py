"""Refuses a device that a run cannot train on, in one sentence, before processes meet.

`check_device` checks this process's own devices; `meet` is the first message between devices.
"""

import os
from pathlib import Path

import torch
import torch.distributed as dist

from pretrain.errors import ConfigError, EspalierError, HangError

FIRST_CAPABILITY_WITH_BF16 = (8, 0)
FIRST_CAPABILITY_WITH_FP16 = (7, 0)
_DEVICE_FILES = Path("/dev")


def check_device(precision: str, processes_here: int) -> None:
    """ConfigError if this node's devices do not suffice for its `processes_here` processes that train in
    `precision`."""
    check_driver()
    if not torch.cuda.is_available():
        return
    devices = torch.cuda.device_count()
    if processes_here > devices:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "not set")
        raise ConfigError(
            f"{processes_here} processes of this node would share {devices} GPU{'s' if devices > 1 else ''} "
            f"(CUDA_VISIBLE_DEVICES is {visible}), and NCCL takes one process a GPU: start {devices} (--num_gpus, "
            "slots), or let more GPUs be seen"
        )
    if not dist.is_nccl_available():
        raise ConfigError(
            f"torch {torch.__version__} was built without NCCL, over which GPUs exchange gradients: install a torch "
            "that has it (torch.distributed.is_nccl_available()), or set CUDA_VISIBLE_DEVICES= to train on the CPU"
        )
    for device in range(processes_here):
        _check_precision(precision, device)


def _check_precision(precision: str, device: int) -> None:
    needed = {"bf16": FIRST_CAPABILITY_WITH_BF16, "fp16": FIRST_CAPABILITY_WITH_FP16}.get(precision, (0, 0))
    found = torch.cuda.get_device_capability(device)
    if found < needed:
        raise ConfigError(
            f"{torch.cuda.get_device_name(device)} has compute capability {found[0]}.{found[1]}, and {precision} needs "
            f"{needed[0]}.{needed[1]}: set train.precision to "
            + ("fp16 or fp32" if precision == "bf16" and found >= FIRST_CAPABILITY_WITH_FP16 else "fp32")
        )


def check_driver() -> None:
    """ConfigError if the machine has a GPU that torch cannot use: a run would silently train on the CPU."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [name.strip() for name in (visible or "").split(",")]
    if len(set(names)) < len(names):
        raise ConfigError(f"CUDA_VISIBLE_DEVICES is {visible}, which names a GPU twice: name each once")
    if torch.cuda.is_available() or visible in ("", "-1") or not _gpus_of_the_machine():
        return
    raise ConfigError(
        f"this machine has an NVIDIA GPU, and torch {torch.__version__} cannot use it ({_reason()}): mend that, or set "
        "CUDA_VISIBLE_DEVICES= to train on the CPU"
    )


def _gpus_of_the_machine() -> list[Path]:
    """The driver's device files; a container that was given no GPU has none."""
    return sorted(_DEVICE_FILES.glob("nvidia[0-9]*"))


def _reason() -> str:
    if torch.version.cuda is None:
        return "it is built for the CPU alone"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).strip().splitlines()[0].rstrip(".:")
    return f"it finds no device, CUDA_VISIBLE_DEVICES is {os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')}"


def meet(device: torch.device) -> None:
    """Runs the first collective, in which NCCL connects the devices; if it cannot, an `EspalierError` says why."""
    try:
        dist.all_reduce(torch.zeros(1, device=device))
    except dist.DistBackendError as error:
        raise refused_meeting(str(error)) from error


def refused_meeting(complaint: str) -> EspalierError:
    """The error for torch's `complaint` that NCCL could not start, as one sentence."""
    last = complaint.strip().splitlines()[-1].strip()
    if "Duplicate GPU" in complaint:
        return ConfigError(
            f"two processes were given the same GPU ({last}): give every process of a node another LOCAL_RANK, and a "
            "CUDA_VISIBLE_DEVICES that names each GPU once"
        )
    return HangError(
        f"NCCL could not connect the processes ({last}): see what the others say, and set NCCL_SOCKET_IFNAME to the "
        "interface between the nodes; NCCL_DEBUG=INFO says more"
    )
