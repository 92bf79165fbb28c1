"""What is known about devices: how fast one could be and what connects it to others, by name."""

import os
from dataclasses import dataclass

import torch

PEAK_FLOPS = {
    "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H20": 148e12, "B200": 2250e12,
    "A100": 312e12, "A800": 312e12, "H800": 989e12, "L40S": 362e12, "V100": 125e12,
}  # fmt: skip
"""Dense 16-bit tensor FLOP/s by what the device's name contains; the first match counts."""


def peak_flops(device_name: str) -> float | None:
    """16-bit FLOP/s the device could do at best; None for a device we do not know."""
    return next((peak for name, peak in PEAK_FLOPS.items() if name in device_name), None)


@dataclass(frozen=True)
class DeviceFacts:
    """A kind of device to plan with, by its maker's data sheet; GPUs are the SXM ones of an HGX node."""

    memory_bytes: float
    peak_flops: float
    """In 16 bits, on tensor cores."""
    peak_fp32_flops: float
    """Without them."""
    memory_bytes_per_second: float
    """To its own memory."""
    node_bytes_per_second: float
    """To other devices of the node, one way."""
    network_bytes_per_second: float
    """To other nodes: a device's share of the node's links."""
    host_bytes_per_second: float
    """To the node's memory."""


DEVICES = {
    "h100": DeviceFacts(80 * 2**30, PEAK_FLOPS["H100"], 67e12, 3.35e12, 450e9, 50e9, 50e9),
    "h200": DeviceFacts(141e9, PEAK_FLOPS["H200"], 67e12, 4.8e12, 450e9, 50e9, 50e9),
    "a100": DeviceFacts(80 * 2**30, PEAK_FLOPS["A100"], 19.5e12, 2.0e12, 300e9, 25e9, 25e9),
    "cpu": DeviceFacts(64 * 2**30, 1e12, 1e12, 20e9, 10e9, 1.25e9, 20e9),
}
"""Of the CPU, of which nothing is known, a round figure for one process of a few cores and 10 Gbit/s."""


def synchronize() -> None:
    """Waits until the device has done all that it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def processes_of_machine(processes: int) -> int:
    """How many of a run's processes share this machine, by what the launcher says (DeepSpeed's, torchrun's, OpenMPI's);
    `processes` where it says nothing."""
    for name in ("LOCAL_SIZE", "LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"):
        if os.environ.get(name):
            return int(os.environ[name])
    return processes
