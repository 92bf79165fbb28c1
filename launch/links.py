"""How fast nodes exchange numbers: a short all-reduce inside every node, and between neighbours in a ring of nodes.

    python launch/links.py 8            bytes a second between 8 processes of this node

    bytes a second = 2 (n - 1) / n · bytes / seconds

which is what a link carries in a ring of n processes (the "bus bandwidth" of NCCL's tests).
"""

import os
import subprocess
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing

CPU_BYTES, GPU_BYTES = 2**24, 2**28
_REPEATS = 3
SLOW_SHARE = 0.5
"""Share of the fastest link's speed below which a link is called slow."""


def within(processes: int) -> float:
    """Bytes a second between so many processes of this node, in interpreters that import torch alone."""
    command = [sys.executable, __file__, str(processes)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _main() -> None:
    processes = int(sys.argv[1])
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    torch.multiprocessing.spawn(_process_of_a_node, args=(processes, store.port), nprocs=processes)
    print(store.get("speed").decode())


def _process_of_a_node(process: int, processes: int, port: int) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.TCPStore("127.0.0.1", port, wait_for_workers=False)
    device = _device(process)
    dist.init_process_group(_backend(), store=store, rank=process, world_size=processes)
    speed = _speed(None, processes, device)
    dist.destroy_process_group()
    if process == 0:
        store.set("speed", repr(speed))


def between(store: dist.Store, node: int, nodes: int, timeout: timedelta) -> dict[str, float]:
    """Bytes a second of every pair of neighbours, `0-1` for the first; all nodes call it together."""
    device = _device(0)
    dist.init_process_group(_backend(), store=store, rank=node, world_size=nodes, timeout=timeout)
    try:
        found = {}
        for first, second in ring(nodes):
            group = dist.new_group([first, second], timeout=timeout)
            if node in (first, second):
                found[f"{first}-{second}"] = _speed(group, 2, device)
            dist.barrier()
        everywhere: list[dict[str, float]] = [{} for _ in range(nodes)]
        dist.all_gather_object(everywhere, found)
    finally:
        dist.destroy_process_group()
    return {pair: speed for one in everywhere for pair, speed in one.items()}


def ring(nodes: int) -> list[tuple[int, int]]:
    """Pairs of neighbouring nodes, each pair once."""
    pairs = {tuple(sorted((node, (node + 1) % nodes))) for node in range(nodes) if nodes > 1}
    return sorted((first, second) for first, second in pairs)


def _backend() -> str:
    return "nccl" if torch.cuda.is_available() else "gloo"


def _device(process: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(process)
    return torch.device("cuda", process)


def _speed(group: dist.ProcessGroup | None, processes: int, device: torch.device) -> float:
    """Bytes a second of the fastest of a few all-reduces."""
    size = GPU_BYTES if device.type == "cuda" else CPU_BYTES
    values, best = torch.ones(size // 4, device=device), 0.0
    for _ in range(_REPEATS + 1):  # the first one connects
        start = time.perf_counter()
        dist.all_reduce(values, group=group)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2 * (processes - 1) / processes * size / (time.perf_counter() - start))
    return best


if __name__ == "__main__":
    _main()
