"""Facts about devices by name: how fast one can be at best, and what connects it to others."""

import os
from dataclasses import dataclass

import torch

PEAK_FLOPS = {
    "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H20": 148e12, "B200": 2250e12,
    "A100": 312e12, "A800": 312e12, "H800": 989e12, "L40S": 362e12, "V100": 125e12,
}  # fmt: skip
"""Dense 16-bit tensor FLOP/s by what the device's name contains; the first match counts."""


def peak_flops(device_name: str) -> float | None:
    """16-bit FLOP/s that the device can do at best; None for an unknown device."""
    return next((peak for name, peak in PEAK_FLOPS.items() if name in device_name), None)


@dataclass(frozen=True)
class DeviceFacts:
    """A kind of device to plan with, by its maker's data sheet; GPUs are the SXM ones of an HGX node."""

    memory_bytes: float
    peak_flops: float
    """FLOP/s in 16 bits, on tensor cores."""
    peak_fp32_flops: float
    """FLOP/s in fp32, without tensor cores."""
    memory_bytes_per_second: float
    """Speed of its own memory."""
    node_bytes_per_second: float
    """Speed to other devices of the node, one way."""
    network_bytes_per_second: float
    """Speed to other nodes: one device's share of the node's links."""
    host_bytes_per_second: float
    """Speed to the node's host memory."""


DEVICES = {
    "h100": DeviceFacts(80 * 2**30, PEAK_FLOPS["H100"], 67e12, 3.35e12, 450e9, 50e9, 50e9),
    "h200": DeviceFacts(141e9, PEAK_FLOPS["H200"], 67e12, 4.8e12, 450e9, 50e9, 50e9),
    "a100": DeviceFacts(80 * 2**30, PEAK_FLOPS["A100"], 19.5e12, 2.0e12, 300e9, 25e9, 25e9),
    "cpu": DeviceFacts(64 * 2**30, 1e12, 1e12, 20e9, 10e9, 1.25e9, 20e9),
}
"""Kinds of devices by name. Nothing is known about the CPU: its figures are round ones for one process on a few cores
with 10 Gbit/s."""


def synchronize() -> None:
    """Waits until the device has finished all its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def processes_of_machine(processes: int) -> int:
    """Number of a run's processes on this machine, as the launcher says (DeepSpeed's, torchrun's, OpenMPI's);
    `processes` if it does not say."""
    for name in ("LOCAL_SIZE", "LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"):
        if os.environ.get(name):
            return int(os.environ[name])
    return processes
