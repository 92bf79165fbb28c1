"""The most memory that some code has on a CPU at one time, from torch's own record of every block it gets and frees."""

import gc
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor


def living() -> dict[int, int]:
    """Bytes of all tensors that Python can reach, by address, each storage once."""
    gc.collect()
    storages = [thing.untyped_storage() for thing in gc.get_objects() if isinstance(thing, Tensor)]
    return {storage.data_ptr(): storage.nbytes() for storage in storages if storage.nbytes()}


def peak_bytes(work: Callable[[], object], before: dict[int, int]) -> int:
    """The most bytes at one time in `work`, those of `before` that are alive when it begins included.

    What other threads free is not on the record: buffers of collectives count as if they lived to the end.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    alive = dict(before)
    now = most = sum(alive.values())
    for address, size in _blocks(profiler):
        now += max(size, 0) - alive.pop(address, 0)
        if size > 0:
            alive[address] = size
        most = max(most, now)
    return most


def _blocks(profiler: torch.profiler.profile) -> list[tuple[int, int]]:
    """Address and bytes, negative where a block is freed, in the order of time."""
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    memory = sorted((e for e in events if e.get("name") == "[memory]"), key=lambda event: event["ts"])
    return [(event["args"]["Addr"], event["args"]["Bytes"]) for event in memory]
