"""What is known about the device of this process: how fast it could be, and how much of its memory is taken."""

import psutil
import torch

PEAK_FLOPS = {
    "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H20": 148e12, "B200": 2250e12,
    "A100": 312e12, "A800": 312e12, "H800": 989e12, "L40S": 362e12, "V100": 125e12,
}  # fmt: skip
"""Dense 16-bit tensor FLOP/s by what the device's name contains; the first match counts."""


def peak_flops(device_name: str) -> float | None:
    """16-bit FLOP/s the device could do at best; None for a device we do not know."""
    return next((peak for name, peak in PEAK_FLOPS.items() if name in device_name), None)


def memory_scalars() -> dict[str, float]:
    """Bytes this process holds now, on the host and on its device, by TensorBoard tag."""
    scalars: dict[str, float] = {"memory/resident_bytes": psutil.Process().memory_info().rss}
    if torch.cuda.is_available():
        scalars["memory/device_allocated_bytes"] = torch.cuda.memory_allocated()
        scalars["memory/device_peak_bytes"] = torch.cuda.max_memory_allocated()
    return scalars
