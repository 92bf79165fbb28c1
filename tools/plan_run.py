"""Says what a run would take on so many nodes, before it is started: memory, messages, seconds, how far it scales.

    python tools/plan_run.py --config quickstart --nodes 1 --gpus-per-node 2 --device cpu model.vocabulary=4096
    python tools/plan_run.py --config FILE --nodes 64 --gpus-per-node 8 --json plan.json parallel.tensor=8

Needs neither GPU nor corpus; the vocabulary comes from model.vocabulary, or from data.tokenizer where that exists. A
parallel layout that does not divide or does not fit is refused, with the numbers and the nearest one that does. Bytes
are held to measured ones by tests; seconds follow from assumptions, all of which are printed and can be set.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import fmean
from typing import Any

from pretrain.config.run import RunConfig, load_config
from pretrain.devices import DEVICES
from pretrain.disk import replace_text
from pretrain.errors import ConfigError, run_command
from pretrain.planning.communication import Links
from pretrain.planning.compute import Arithmetic
from pretrain.planning.fitting import fits, fitting_setup
from pretrain.planning.memory import Setup
from pretrain.planning.rank_outlook import Outlook, outlooks
from pretrain.planning.step import Assumptions, Machine, ScalingRow, StepPlan, plan_step, scaling
from pretrain.tokenizer.load import open_tokenizer
from tools.arguments import above_zero, output_file, parse_bytes, positive
from tools.console import table_lines


@dataclass(frozen=True)
class Surroundings:
    """Where a run is to be planned, and what the command line can set; None: what is known of the device."""

    nodes: int
    gpus_per_node: int
    device: str = "h100"
    """A key of `DEVICES`."""
    memory: float | None = None
    """Bytes of one device."""
    host_memory: float = 2**40
    """Bytes of one node."""
    peak_flops: float | None = None
    efficiency: float = 0.4
    product_share: float = 0.6
    memory_bandwidth: float | None = None
    usable: float = 0.92
    overlap: float = 0.0
    node_bandwidth: float | None = None
    network_bandwidth: float | None = None
    host_bandwidth: float | None = None
    host_memory_bandwidth: float = 200e9
    node_latency: float = 5e-6
    network_latency: float = 15e-6

    def __post_init__(self) -> None:
        for name, lowest in (("efficiency", 1e-9), ("product_share", 0.0), ("usable", 1e-9), ("overlap", 0.0)):
            share = getattr(self, name)
            if not lowest <= share <= 1.0:
                flag = name.replace("_", "-")
                raise ConfigError(f"--{flag} is {share:g}, and it is a share: give a number from 0 to 1")
        for name in ("node_latency", "network_latency"):
            seconds = getattr(self, name)
            if seconds < 0.0:
                flag = name.replace("_", "-")
                raise ConfigError(f"--{flag} is {seconds:g}: give seconds from 0 upwards")

    def machine(self) -> Machine:
        memory = self.memory or DEVICES[self.device].memory_bytes
        return Machine(self.nodes, self.gpus_per_node, memory, self.host_memory, gpu=self.device != "cpu")

    def assumptions(self, precision: str) -> Assumptions:
        """What is taken for granted of a run in this `train.precision`."""
        facts = DEVICES[self.device]
        arithmetic = Arithmetic(
            self.peak_flops or (facts.peak_fp32_flops if precision == "fp32" else facts.peak_flops),
            self.efficiency,
            self.memory_bandwidth or facts.memory_bytes_per_second,
            self.product_share,
        )
        links = Links(
            self.node_bandwidth or facts.node_bytes_per_second,
            self.network_bandwidth or facts.network_bytes_per_second,
            self.host_bandwidth or facts.host_bytes_per_second,
            self.node_latency,
            self.network_latency,
        )
        return Assumptions(arithmetic, self.usable, self.overlap, links, self.host_memory_bandwidth)


def with_known_vocabulary(config: RunConfig) -> RunConfig:
    """The config with its vocabulary, from itself or from its tokenizer."""
    if Path(config.data.tokenizer).exists():
        return config.with_vocabulary(open_tokenizer(config.data.tokenizer).vocabulary)
    if config.model.vocabulary == 0:
        raise ConfigError(
            f"the vocabulary is not known: model.vocabulary is 0, and there is no tokenizer {config.data.tokenizer}: "
            "give model.vocabulary=SIZE"
        )
    return config


def outlook_row(outlook: Outlook, step: StepPlan) -> dict[str, Any]:
    """One row of the first tables, with everything in it."""
    memory = asdict(step.memory) | {"total": step.memory.total}
    return {
        "outlook": outlook.name,
        "mean_rank": fmean(outlook.ranks.values()) if outlook.ranks else None,
        "parameters": step.parameters,
        "trained_parameters": step.trained_parameters,
        "flops_per_token": step.flops_per_token,
        "step_flops": step.flops,
        "memory_bytes": memory,
        "traffic": [asdict(row) for row in step.communication.traffic],
        **_seconds(step),
    }


def scaling_row(row: ScalingRow, dense: ScalingRow, machine: Machine, assumed: Assumptions) -> dict[str, Any]:
    """One row of the last table; `dense`: the dense model on as many processes."""
    return {
        "processes": row.processes,
        "accumulation": row.accumulation,
        "memory_bytes": row.step.memory.total,
        "fits": fits(row.step.memory, machine, assumed),
        **_seconds(row.step),
        "communication_share": row.step.communication_seconds / row.step.seconds,
        "efficiency": row.efficiency,
        "dense_step_seconds": dense.step.seconds,
        "dense_fits": fits(dense.step.memory, machine, assumed),
    }


def _seconds(step: StepPlan) -> dict[str, float]:
    return {
        "compute_seconds": step.compute_seconds,
        "tensor_seconds": step.tensor_seconds,
        "data_seconds": step.data_seconds,
        "host_seconds": step.host_seconds,
        "step_seconds": step.seconds,
    }


def stopping_points(config: RunConfig, setup: Setup, rows: Sequence[dict[str, Any]]) -> list[str]:
    """In words: where communication takes over, and how far the batch divides."""
    lines = []
    over = next((row for row in rows if row["communication_share"] > 0.5), None)
    if over:
        lines.append(f"communication takes longer than computation from {over['processes']:,} processes on")
    largest = rows[-1]["processes"] if rows else 0
    sequences = f"train.global_batch {config.train.global_batch:,} / train.micro_batch {setup.micro_batch}"
    lines.append(
        f"{sequences} divides up to {largest:,} processes of the table"
        + ("" if rows and rows[-1]["accumulation"] > 1 else ": for more, raise the former or lower the latter")
    )
    return lines


def _print_table(head: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> None:
    print("\n".join(table_lines(head, rows, left=left)))


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:,.2f}"


def print_outlooks(rows: Sequence[dict[str, Any]], machine: Machine, assumed: Assumptions) -> None:
    """Parameters, arithmetic and memory, then messages, then seconds, a line for each outlook."""
    cells = []
    for row in rows:
        rank = "–" if row["mean_rank"] is None else f"{row['mean_rank']:.0f}"
        counts = [f"{row['parameters']:,}", f"{row['flops_per_token']:.3e}", f"{row['step_flops']:.3e}"]
        cells.append([row["outlook"], rank, *counts])
    _print_table(["ranks", "mean", "parameters", "FLOPs/token", "FLOPs/step"], cells)
    parts = ["weights", "gradients", "optimizer", "activations", "buffers", "total", "host"]
    usable = assumed.usable * machine.memory_bytes
    print(f"\nGB of one process, at its fullest ({_gigabytes(usable)} usable)")
    _print_table(
        ["ranks", *parts],
        [[row["outlook"], *(_gigabytes(row["memory_bytes"][part]) for part in parts)] for row in rows],
    )
    print("\nmessages of one process in a step: how many, GB asked for, GB sent, ms")
    cells = [
        [row["outlook"], t["what"], t["group"], f"{t['collectives']:,}", *_sizes(t)]
        for row in rows
        for t in row["traffic"]
    ]
    if cells:
        _print_table(["ranks", "what", "group", "count", "GB", "sent", "ms"], cells, left=3)
    else:
        print("none")
    print("\nms of a step")
    parts = ["compute", "tensor", "data", "host", "step"]
    _print_table(
        ["ranks", *parts],
        [[row["outlook"], *(f"{row[f'{part}_seconds'] * 1e3:,.1f}" for part in parts)] for row in rows],
    )


def _sizes(traffic: dict[str, Any]) -> list[str]:
    sizes = [f"{traffic[key] / 1e9:,.3f}" for key in ("bytes", "sent_bytes")]
    return [*sizes, f"{traffic['seconds'] * 1e3:,.1f}"]


def print_scaling(rows: Sequence[dict[str, Any]]) -> None:
    _print_table(
        ["processes", "accumulation", "GB", "fits", "ms", "communication", "efficiency", "dense ms", "fits"],
        [
            [
                f"{row['processes']:,}",
                f"{row['accumulation']:,}",
                _gigabytes(row["memory_bytes"]),
                "yes" if row["fits"] else "no",
                f"{row['step_seconds'] * 1e3:,.1f}",
                f"{row['communication_share']:.1%}",
                f"{row['efficiency']:.1%}",
                f"{row['dense_step_seconds'] * 1e3:,.1f}",
                "yes" if row["dense_fits"] else "no",
            ]
            for row in rows
        ],
    )


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Say what a run would take, without starting it.")
    parser.add_argument(
        "--config", required=True, metavar="FILE", help="a run's config, or the name of an installed one"
    )
    parser.add_argument("--nodes", type=positive, required=True)
    parser.add_argument("--gpus-per-node", type=positive, required=True, help="processes on each node")
    parser.add_argument("--device", choices=sorted(DEVICES), help=f"kind of device ({Surroundings.device})")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write the same rows there")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    add = parser.add_argument_group("assumptions (without a default here: those of the device)").add_argument
    add("--memory", type=parse_bytes, metavar="SIZE", help="of one device, such as 80GiB")
    add("--host-memory", type=parse_bytes, metavar="SIZE", help="of one node (1024GiB)")
    add("--peak-flops", type=above_zero, metavar="FLOP/S", help="of a device in the run's precision")
    add("--efficiency", type=float, help=f"share of it that a dense step reaches ({Surroundings.efficiency})")
    add(
        "--product-share",
        type=float,
        help=f"share of a dense step in products and attention ({Surroundings.product_share})",
    )
    add("--memory-bandwidth", type=above_zero, metavar="BYTES/S", help="of a device to its own memory")
    add("--usable", type=float, help=f"share of the memory that tensors may have ({Surroundings.usable})")
    add("--overlap", type=float, help=f"share of data-parallel messages that is hidden ({Surroundings.overlap})")
    add("--node-bandwidth", type=above_zero, metavar="BYTES/S", help="of a device to others of its node")
    add("--network-bandwidth", type=above_zero, metavar="BYTES/S", help="of a device to other nodes")
    add("--host-bandwidth", type=above_zero, metavar="BYTES/S", help="of a device to its node's memory")
    add(
        "--host-memory-bandwidth",
        type=above_zero,
        metavar="BYTES/S",
        help=f"of a node's memory, where offloaded optimizers step ({Surroundings.host_memory_bandwidth:g})",
    )
    add("--node-latency", type=float, metavar="SECONDS", help=f"of a message in a node ({Surroundings.node_latency:g})")
    add(
        "--network-latency",
        type=float,
        metavar="SECONDS",
        help=f"of a message between nodes ({Surroundings.network_latency:g})",
    )
    return parser.parse_intermixed_args()


def _surroundings(arguments: argparse.Namespace) -> Surroundings:
    """What the command line says; an option that is left out keeps its default."""
    given = {field.name: getattr(arguments, field.name) for field in fields(Surroundings)}
    return Surroundings(**{name: value for name, value in given.items() if value is not None})


def main() -> None:
    arguments = _parse_arguments()
    config = with_known_vocabulary(load_config(arguments.config, arguments.overrides))
    surroundings = _surroundings(arguments)
    machine, assumed = surroundings.machine(), surroundings.assumptions(config.train.precision)
    found = outlooks(config)
    largest = found[-2] if len(found) > 1 else found[-1]
    setup = fitting_setup(config, largest, machine, assumed)

    layout = setup.layout
    print(
        f"{machine.processes:,} processes: tensor parallel {layout.tensor}, data parallel {layout.data:,}, "
        f"accumulation {layout.accumulation}, micro-batch {setup.micro_batch}, {setup.precision}, ZeRO {setup.stage}"
        f"{', optimizer offloaded' if setup.offload else ''}, recomputation {setup.recompute}"
    )
    links, arithmetic = assumed.links, assumed.arithmetic
    print(
        f"assumed: {surroundings.device}, {arithmetic.peak_flops:.3g} FLOP/s at {arithmetic.efficiency:.0%} in a dense "
        f"step, of which {arithmetic.product_share:.0%} are products; thin products wait for memory below "
        f"{arithmetic.balance:.0f} FLOPs a byte ({arithmetic.memory_bytes_per_second:.3g} bytes/s); bytes/s "
        f"{links.node_bytes_per_second:.3g} in a node, {links.network_bytes_per_second:.3g} between nodes, "
        f"{links.host_bytes_per_second:.3g} to the host, "
        f"{assumed.host_memory_bytes_per_second:.3g} in its memory; latencies {links.node_latency_seconds:g} and "
        f"{links.network_latency_seconds:g} s; {assumed.overlap:.0%} of data-parallel messages hidden; "
        f"{assumed.usable:.0%} of {_gigabytes(machine.memory_bytes)} GB usable\n"
    )
    if layout.tensor > machine.devices_per_node:
        print(
            f"warning: parallel.tensor {layout.tensor} reaches over nodes of {machine.devices_per_node} devices, and "
            "its messages wait for the network in every layer\n"
        )
    rows = [outlook_row(outlook, plan_step(outlook, setup, machine, assumed)) for outlook in found]
    print_outlooks(rows, machine, assumed)

    ours, dense = (scaling(config, outlook, setup, machine, assumed) for outlook in (largest, found[-1]))
    scaled = [scaling_row(*pair, machine, assumed) for pair in zip(ours, dense, strict=True)]
    print(f"\nthe same global batch on more processes, ranks as in {largest.name}")
    print_scaling(scaled)
    stops = stopping_points(config, setup, scaled)
    print("\n".join(stops))
    if arguments.json is not None:
        content = {
            "layout": asdict(setup),
            "machine": asdict(machine),
            "assumptions": asdict(assumed),
            "outlooks": rows,
            "scaling": scaled,
            "stops": stops,
        }
        replace_text(arguments.json, json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    run_command(main)
