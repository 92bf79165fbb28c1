"""Says what a run would take on so many nodes, before it is started: memory, messages, seconds, how far it scales.

    python tools/plan_run.py --config quickstart --nodes 1 --gpus-per-node 2 --device cpu model.vocabulary=4096
    python tools/plan_run.py --config FILE --nodes 64 --gpus-per-node 8 --json plan.json parallel.tensor=8

Needs neither GPU nor corpus; the vocabulary comes from model.vocabulary, or from data.tokenizer where that exists. A
layout that does not divide or does not fit is refused, with the numbers and the nearest one that does. Bytes are held
to measured ones by tests; seconds follow from assumptions, all of which are printed and can be set.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from pretrain.config.run import RunConfig, load_config
from pretrain.devices import DEVICES
from pretrain.errors import ConfigError, run_command
from pretrain.monitor.run_folder import replace_text
from pretrain.planning.communication import Links
from pretrain.planning.compute import Arithmetic
from pretrain.planning.fitting import fits, fitting_setup
from pretrain.planning.memory import Setup
from pretrain.planning.rank_outlook import Outlook, outlooks
from pretrain.planning.step import Assumptions, Machine, ScalingRow, StepPlan, plan_step, scaling
from pretrain.tokenizer.base import open_tokenizer
from tools.arguments import above_zero, output_file, parse_bytes, positive

EFFICIENCY, PRODUCT_SHARE, USABLE, OVERLAP = 0.4, 0.6, 0.92, 0.0
NODE_LATENCY_SECONDS, NETWORK_LATENCY_SECONDS = 5e-6, 15e-6
HOST_MEMORY_BYTES = 2**40
HOST_MEMORY_BYTES_PER_SECOND = 200e9


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


def _print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    for row in (head, *rows):
        print(
            "  ".join(
                cell.ljust(w) if not place else cell.rjust(w)
                for place, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
        )


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
        _print_table(["ranks", "what", "group", "count", "GB", "sent", "ms"], cells)
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Say what a run would take, without starting it.")
    parser.add_argument(
        "--config", required=True, metavar="FILE", help="a run's config, or the name of an installed one"
    )
    parser.add_argument("--nodes", type=positive, required=True)
    parser.add_argument("--gpus-per-node", type=positive, required=True, help="processes on each node")
    parser.add_argument("--device", choices=sorted(DEVICES), default="h100")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write the same rows there")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    group = parser.add_argument_group("assumptions (without a default here: those of the device)")
    group.add_argument("--memory", metavar="SIZE", help="of one device, such as 80GiB")
    group.add_argument("--host-memory", metavar="SIZE", help="of one node; 1024GiB")
    group.add_argument("--peak-flops", type=above_zero, metavar="FLOP/S", help="of a device in the run's precision")
    group.add_argument("--efficiency", type=float, default=EFFICIENCY, help="share of it that a dense step reaches")
    group.add_argument(
        "--product-share", type=float, default=PRODUCT_SHARE, help="share of a dense step in products and attention"
    )
    group.add_argument("--memory-bandwidth", type=above_zero, metavar="BYTES/S", help="of a device to its own memory")
    group.add_argument("--usable", type=float, default=USABLE, help="share of the memory that tensors may have")
    group.add_argument("--overlap", type=float, default=OVERLAP, help="share of data-parallel messages that is hidden")
    group.add_argument("--node-bandwidth", type=above_zero, metavar="BYTES/S", help="of a device to others of its node")
    group.add_argument("--network-bandwidth", type=above_zero, metavar="BYTES/S", help="of a device to other nodes")
    group.add_argument("--host-bandwidth", type=above_zero, metavar="BYTES/S", help="of a device to its node's memory")
    group.add_argument(
        "--host-memory-bandwidth",
        type=above_zero,
        default=HOST_MEMORY_BYTES_PER_SECOND,
        metavar="BYTES/S",
        help="of a node's memory, where offloaded optimizers step",
    )
    group.add_argument("--node-latency", type=float, default=NODE_LATENCY_SECONDS, metavar="SECONDS")
    group.add_argument("--network-latency", type=float, default=NETWORK_LATENCY_SECONDS, metavar="SECONDS")
    return parser


def _surroundings(arguments: argparse.Namespace, precision: str) -> tuple[Machine, Assumptions]:
    facts = DEVICES[arguments.device]
    peak = facts.peak_fp32_flops if precision == "fp32" else facts.peak_flops
    machine = Machine(
        arguments.nodes,
        arguments.gpus_per_node,
        parse_bytes(arguments.memory) if arguments.memory else facts.memory_bytes,
        parse_bytes(arguments.host_memory) if arguments.host_memory else HOST_MEMORY_BYTES,
        gpu=arguments.device != "cpu",
    )
    links = Links(
        arguments.node_bandwidth or facts.node_bytes_per_second,
        arguments.network_bandwidth or facts.network_bytes_per_second,
        arguments.host_bandwidth or facts.host_bytes_per_second,
        arguments.node_latency,
        arguments.network_latency,
    )
    for name, lowest in (("efficiency", 1e-9), ("product_share", 0.0), ("usable", 1e-9), ("overlap", 0.0)):
        share = getattr(arguments, name)
        if not lowest <= share <= 1.0:
            raise ConfigError(f"--{name.replace('_', '-')} is {share:g}, and it is a share: give a number from 0 to 1")
    for name in ("node_latency", "network_latency"):
        if getattr(arguments, name) < 0.0:
            flag = name.replace("_", "-")
            raise ConfigError(f"--{flag} is {getattr(arguments, name):g}: give seconds from 0 upwards")
    arithmetic = Arithmetic(
        arguments.peak_flops or peak,
        arguments.efficiency,
        arguments.memory_bandwidth or facts.memory_bytes_per_second,
        arguments.product_share,
    )
    assumed = Assumptions(
        arithmetic,
        arguments.usable,
        arguments.overlap,
        links,
        arguments.host_memory_bandwidth,
    )
    return machine, assumed


def surroundings(config: RunConfig, nodes: int, gpus_per_node: int) -> tuple[Machine, Assumptions]:
    """The machine and what is assumed of it, where no option says otherwise."""
    options = ["--config", "", "--nodes", str(nodes), "--gpus-per-node", str(gpus_per_node)]
    return _surroundings(_parser().parse_args(options), config.train.precision)


def main() -> None:
    arguments = _parser().parse_intermixed_args()
    config = with_known_vocabulary(load_config(arguments.config, arguments.overrides))
    machine, assumed = _surroundings(arguments, config.train.precision)
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
        f"assumed: {arguments.device}, {arithmetic.peak_flops:.3g} FLOP/s at {arithmetic.efficiency:.0%} in a dense "
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
