"""Whole transformer layers, forward and backward, over tensor-parallel processes: dense, vanilla low-rank and ours.

    python tools/benchmarks/tensor_parallel.py --json tensor_parallel.json
    python tools/benchmarks/tensor_parallel.py --namespaces --rate 10gbit --rate 1gbit --json tensor_parallel_link.json
    python tools/benchmarks/tensor_parallel.py --hidden 256 --layers 1 --micro-batch 1 --repetitions 3
    torchrun --nproc-per-node 8 tools/benchmarks/tensor_parallel.py --dtype bf16 --hidden 4096 --micro-batch 4

The contestants have the same shapes and stand in one process group; each repetition runs all of them, one after the
other, so that whatever else the machine does meets them alike, and ratios are of one repetition:

    dense           megatron-core's own layers
    vanilla         A and B split along the rank, as published: an A for each of q, k, v ...
    vanilla_shared  the same with our shared A: the very function of ours, with its parameters and FLOPs
    factored        ours

Without a launcher it starts its own processes (a GPU for each, or gloo where there is none); --namespaces puts two of
them behind a link of a given rate (root). A pass counts its collectives (`tools/benchmarks/collective_counter.py`), and
the table has them beside the formula. FLOPs are 6 a matrix entry and token, and 12·sequence·width a token for
attention, of what one process computes, repeated work included. Times are those of the slowest process.
"""

import argparse
import os
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from model.costs.communication import Collective, StepCollectives, total
from model.process_groups import device, initialize_process_groups, tensor_size
from pretrain.device_settings import start_kernels_in_order
from pretrain.disk import json_text, replace_text
from pretrain.errors import ConfigError, run_command
from pretrain.provenance import git_revision, hardware, installed_versions
from tools.arguments import output_file, positive
from tools.benchmarks.collective_counter import CollectiveCounter
from tools.benchmarks.network_namespaces import launch, transmitted_bytes
from tools.benchmarks.tensor_parallel_contestants import DTYPES, Contestant, build_contestants
from tools.console import table_lines

RAW_NUMBERS = 4 * 2**20
"""Numbers in the all-reduce that shows what the network gives: 16 MiB."""
RAW_REPETITIONS = 5


def main() -> None:
    arguments = _arguments()
    if "RANK" not in os.environ:
        launch(arguments, Path(__file__).resolve())
        return
    with _one_tensor_parallel_group():
        facts = _facts(arguments)
        for hidden in arguments.hidden:
            measured = measure(arguments, hidden)
            for section, rows in measured.items():
                facts[section] += rows
            if dist.get_rank() == 0:
                print(report(measured), flush=True)
        if dist.get_rank() == 0 and arguments.json is not None:
            replace_text(arguments.json, json_text(facts, indent=2) + "\n")


@contextmanager
def _one_tensor_parallel_group() -> Iterator[None]:
    """Joins the launcher's processes; without DeepSpeed, which has no part in the layers and compiles at its start."""
    start_kernels_in_order()
    if torch.cuda.is_available():
        local, devices = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= devices:
            raise ConfigError(
                f"this machine has {devices} GPU{'s' if devices != 1 else ''} for more processes: start fewer of them, "
                "or hide the GPUs with CUDA_VISIBLE_DEVICES= to compare on the CPU"
            )
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        initialize_process_groups(dist.get_world_size())
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def _facts(arguments: argparse.Namespace) -> dict[str, Any]:
    names = ("family", "layers", "sequence", "micro_batch", "rank_divisor", "dtype", "repetitions", "threads")
    accelerator = {"accelerator": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {
        "commit": git_revision(),
        "versions": installed_versions(),
        "hardware": hardware() | accelerator,
        "settings": {name: getattr(arguments, name) for name in names} | {"processes": dist.get_world_size()},
        "network": [],
        "collectives": [],
        "times": [],
    }


def measure(arguments: argparse.Namespace, hidden: int) -> dict[str, list[dict[str, Any]]]:
    """Rows of all tables at one hidden size, the same on all processes but for what the interface counted."""
    contestants = build_contestants(arguments, hidden)
    place = {"network": arguments.network, "hidden": hidden}
    counted = [_count(contestant) for contestant in contestants]  # this is the warm-up too
    times = torch.empty(arguments.repetitions, len(contestants), 2, dtype=torch.float64)
    sent = torch.zeros(arguments.repetitions, len(contestants), dtype=torch.float64)
    for repetition in range(arguments.repetitions):
        for number, contestant in enumerate(contestants):
            before = _interface_bytes()
            times[repetition, number] = torch.tensor(_timed(contestant.run()))
            sent[repetition, number] = _interface_bytes() - before
    slowest = times.to(device())
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    rows = {
        "network": [place | network_row()],
        "collectives": [
            place | row
            for contestant, found in zip(contestants, counted, strict=True)
            for row in collective_rows(contestant, found)
        ],
        "times": [place | row for row in time_rows(contestants, slowest.cpu(), sent)],
    }
    if arguments.profile is not None:
        for contestant in contestants:
            _profile(contestant, arguments.profile / f"{arguments.network}_{hidden}_{contestant.name}")
    return rows


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _timed(steps: Iterator[Tensor]) -> list[float]:
    """Seconds of each step, begun by all processes together."""
    dist.barrier()
    _synchronize()
    seconds, begin = [], time.perf_counter()
    for _ in steps:
        _synchronize()
        end = time.perf_counter()
        seconds.append(end - begin)
        begin = end
    return seconds


def _interface_bytes() -> int:
    """Bytes sent through the interface of a namespace; the loopback interface would show every process's."""
    interface = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
    return 0 if interface == "lo" else transmitted_bytes(interface)


def _count(contestant: Contestant) -> StepCollectives:
    steps = contestant.run()
    with CollectiveCounter() as forward:
        next(steps)
    with CollectiveCounter() as backward:
        next(steps)
    return StepCollectives(forward.collectives, backward.collectives)


def network_row() -> dict[str, Any]:
    """What the network gives to one large all-reduce, the median of a few."""
    message = torch.ones(RAW_NUMBERS, device=device())

    def once() -> Iterator[Tensor]:
        dist.all_reduce(message)
        yield message

    seconds = statistics.median([_timed(once())[0] for _ in range(RAW_REPETITIONS + 1)][1:])
    sent = Collective("all_reduce", "tensor", message.nbytes).sent_bytes(dist.get_world_size())
    return {"message_bytes": message.nbytes, "seconds": seconds, "gigabits_per_second": 8e-9 * sent / seconds}


def collective_rows(contestant: Contestant, counted: StepCollectives) -> list[dict[str, Any]]:
    """One row a direction, per layer: how many collectives, and their bytes beside the formula's."""
    rows = []
    for direction in ("forward", "backward"):
        found, formula = (total(getattr(source, direction)) for source in (counted, contestant.expected))
        layers = len(contestant.layers)
        rows.append(
            {
                "contestant": contestant.name,
                "direction": direction,
                "collectives": found.count / layers,
                "collectives_formula": formula.count / layers,
                "bytes": found.bytes / layers,
                "bytes_formula": formula.bytes / layers,
            }
        )
    return rows


def time_rows(contestants: Sequence[Contestant], times: Tensor, sent: Tensor) -> list[dict[str, Any]]:
    """From `times (repetitions, contestants, 2)` of forward and backward in seconds, and `sent (repetitions,
    contestants)` bytes of the interface. Ratios are to the last contestant, ours, of the same repetition."""
    totals = times.sum(dim=-1)
    rows = []
    for number, contestant in enumerate(contestants):
        ratios = totals[:, number] / totals[:, -1]
        collectives = contestant.expected.forward + contestant.expected.backward
        rows.append(
            {
                "contestant": contestant.name,
                "seconds": _quartiles(totals[:, number]),
                "forward_seconds": float(times[:, number, 0].median()),
                "backward_seconds": float(times[:, number, 1].median()),
                "ratio_to_ours": _quartiles(ratios),
                "flops": contestant.flops(),
                "flops_ratio_to_ours": contestant.flops() / contestants[-1].flops(),
                "sent_bytes_formula": sum(c.sent_bytes(tensor_size()) for c in collectives),
                "sent_bytes_interface": float(sent[:, number].median()),
            }
        )
    return rows


def _quartiles(values: Tensor) -> list[float]:
    """The median between the quartiles."""
    return [float(value) for value in values.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=values.dtype))]


def _profile(contestant: Contestant, stem: Path) -> None:
    """A table of operators and a trace of one pass; all processes run it, the first writes it."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        _timed(contestant.run())
    if dist.get_rank() == 0:
        stem.parent.mkdir(parents=True, exist_ok=True)
        key = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        stem.with_suffix(".txt").write_text(profiler.key_averages().table(sort_by=key, row_limit=40), encoding="utf-8")
        profiler.export_chrome_trace(str(stem.with_suffix(".json")))


def report(measured: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """The rows as text, sizes in MB of 10^6 bytes."""
    (network,) = measured["network"]
    counts = [
        [
            row["contestant"],
            row["direction"],
            *(f"{row[key]:g}" for key in ("collectives", "collectives_formula")),
            *(f"{row[key] / 1e6:.3f}" for key in ("bytes", "bytes_formula")),
        ]
        for row in measured["collectives"]
    ]
    times = []
    for row in measured["times"]:
        low, median, high = row["seconds"]
        ratio_low, ratio, ratio_high = row["ratio_to_ours"]
        interface = f"{row['sent_bytes_interface'] / 1e6:.1f}" if row["sent_bytes_interface"] else "-"
        times.append(
            [
                row["contestant"],
                *(f"{median:.4f}", f"{low:.4f}..{high:.4f}"),
                *(f"{row[key]:.4f}" for key in ("forward_seconds", "backward_seconds")),
                *(f"{ratio:.2f}", f"{ratio_low:.2f}..{ratio_high:.2f}", f"{row['flops_ratio_to_ours']:.2f}"),
                *(f"{row['sent_bytes_formula'] / 1e6:.1f}", interface),
            ]
        )
    lines = [
        f"\nhidden {network['hidden']}, network {network['network']}: an all-reduce of "
        f"{network['message_bytes'] / 1e6:.1f} MB takes {1e3 * network['seconds']:.1f} ms, "
        f"{network['gigabits_per_second']:.2f} Gbit/s in each direction\n",
        *table_lines(["per layer", "direction", "collectives", "formula", "MB", "formula"], counts, left=2),
        "",
        *table_lines(
            [
                *("all layers", "seconds", "quartiles", "forward", "backward", "/ ours", "quartiles"),
                *("FLOPs/ours", "sent MB", "interface"),
            ],
            times,
        ),
    ]
    return "\n".join(lines)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time tensor-parallel layers: dense, vanilla low-rank and factored.")
    add = parser.add_argument
    add("--processes", type=positive, default=2, help="that are started if there is no launcher (2)")
    add("--threads", type=positive, default=1, help="of each process that is started (1)")
    add("--family", choices=("llama", "gpt2"), default="llama", help="of the layers (llama)")
    add("--hidden", type=positive, nargs="+", default=[1024, 2048], help="sizes, one after the other (1024 2048)")
    add("--rank-divisor", type=positive, default=4, help="the rank is hidden divided by it (4)")
    add("--layers", type=positive, default=2, help="of each contestant (2)")
    add("--sequence", type=positive, default=512, help="tokens of a sequence (512)")
    add("--micro-batch", type=positive, default=4, help="sequences (4)")
    add("--dtype", choices=DTYPES, default="fp32", help="of parameters and stream (fp32)")
    add("--repetitions", type=positive, default=7, help="of all contestants, after one that warms up (7)")
    add("--namespaces", action="store_true", help="two processes in network namespaces of their own (root)")
    add("--rate", action="append", metavar="RATE", help="of the link between them, again for more (10gbit 1gbit)")
    add("--json", type=output_file, metavar="FILE", help="write all rows as JSON")
    add("--profile", type=Path, metavar="DIR", help="write a profile of one pass of each contestant")
    add("--network", default="local", help=argparse.SUPPRESS)  # how a started process's rows are named
    arguments = parser.parse_args()
    if arguments.namespaces and arguments.processes != 2:
        raise ConfigError(f"a link has two ends: --namespaces takes 2 processes, not {arguments.processes}")
    if arguments.rate and not arguments.namespaces:
        raise ConfigError("--rate is that of the link between namespaces: add --namespaces")
    arguments.rate = arguments.rate or ["10gbit", "1gbit"]
    return arguments


if __name__ == "__main__":
    run_command(main)
