"""Measures what growing ranks costs: singular values, events, and memory, each with its table.

    python tools/benchmarks/growth.py --json growth.json
    deepspeed --num_gpus 2 tools/benchmarks/growth.py --only events memory    (without a GPU: two CPU processes)
    python tools/benchmarks/growth.py --only spectra --blocks 24              (every layer, nothing scaled)
    python tools/benchmarks/growth.py --only events --full                    (all 2,000 steps)
    python tools/benchmarks/growth.py --hidden 64 --layers 2 --width 128 --vocabulary 500 --events 2 --repeats 2

spectra  all layers of a GPT-2 (24 layers, hidden 1024, rank hidden/4): `measure_spectra` against
         `torch.linalg.svdvals` of every whole product, as InRank takes them. Both are timed on `--blocks` layers of the
         stack and scaled to 24, since all layers are alike.
events   `--events` events of a schedule in a run of 2,000 steps of the real trainer. All events happen; of the steps
         between two only `--steps` are taken, and their median stands for the others. What the first step after an
         event takes more than the median belongs to the event.
memory   weights, gradients, masters and moments just before and just after every optimizer step of a growing run,
         against what the ranks predict, at every ZeRO stage; all tensors of the process at the end of every phase of
         an event, and the peak in between, beside the steady state.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from model.process_groups import initialize_process_groups
from pretrain.device_settings import start_kernels_in_order
from pretrain.disk import json_text, replace_text
from pretrain.distributed import is_first_process, joined_processes
from pretrain.errors import ConfigError, run_command
from pretrain.provenance import git_revision, hardware, installed_versions
from tools.arguments import output_file, positive
from tools.benchmarks.growth_events import RUN_STEPS, events
from tools.benchmarks.growth_memory import memory
from tools.benchmarks.growth_spectra import spectra
from tools.benchmarks.resident_bytes import freed_memory_returned

SECTIONS = ("spectra", "events", "memory")

Row = dict[str, Any]


def main() -> None:
    arguments = parse_arguments()
    if arguments.tensor > 1:
        start_kernels_in_order()
    with joined_processes(), freed_memory_returned():
        measure(arguments)


def measure(arguments: argparse.Namespace) -> None:
    """All tables that were asked for, on the processes of the default group."""
    processes = dist.get_world_size()
    if processes % arguments.tensor:
        raise ConfigError(f"--tensor {arguments.tensor} does not divide {processes} processes: change one of them")
    initialize_process_groups(arguments.tensor)
    facts: dict[str, Any] = {
        "benchmark": "growth",
        "settings": {key: value for key, value in vars(arguments).items() if key not in ("json", "local_rank")},
        "processes": processes,
        "commit": git_revision(),
        "versions": installed_versions(),
        "hardware": {
            **hardware(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
    }
    _say([_machine_line(facts)])
    sections: dict[str, Callable[[argparse.Namespace], tuple[list[Row], Iterator[str]]]]
    sections = {"spectra": spectra, "events": events, "memory": memory}
    for name in arguments.only:
        facts[name], table = sections[name](arguments)
        _say([f"\n## {name}\n", *table])
    if arguments.json is not None and is_first_process():
        replace_text(arguments.json, json_text(facts, indent=2) + "\n")


def _say(lines: Sequence[str]) -> None:
    if is_first_process():
        print("\n".join(lines), flush=True)


def _machine_line(facts: Mapping[str, Any]) -> str:
    found = facts["hardware"]
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    return (
        f"{found['gpu'] or 'no GPU'}; {found['processor']}, {found['cores']} cores, {facts['processes']} process(es) "
        f"of {found['threads']} thread(s); {versions}; commit {facts['commit']}"
    )


def parse_arguments() -> argparse.Namespace:
    """The arguments of the command line; ConfigError for those that do not fit together."""
    parser = argparse.ArgumentParser(description="Measure what growing ranks costs.")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write the rows there")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="which tables (all)")
    parser.add_argument("--blocks", type=positive, default=1, help="layers whose spectra are timed, of 24 (1)")
    parser.add_argument("--hidden", type=positive, default=1024, help="hidden size for spectra (1024)")
    parser.add_argument("--repeats", type=positive, default=5, help="of each spectrum (5)")
    parser.add_argument("--events", type=positive, default=20, help="in the run (20)")
    parser.add_argument("--steps", type=positive, default=5, help="taken between two events (5)")
    parser.add_argument("--full", action="store_true", help=f"take all {RUN_STEPS} steps")
    parser.add_argument("--layers", type=positive, default=6, help="of the growing model (6)")
    parser.add_argument("--width", type=positive, default=512, help="its hidden size (512)")
    parser.add_argument("--sequence", type=positive, default=256, help="its sequence length (256)")
    parser.add_argument("--vocabulary", type=positive, default=16000, help="its tokens (16000)")
    parser.add_argument("--batch", type=positive, default=4, help="sequences a step and data-parallel process (4)")
    parser.add_argument("--first-rank", type=positive, default=16, help="grows by half of it in every event (16)")
    parser.add_argument("--stage", type=int, default=1, help="ZeRO stage of the timed events (1)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="above stage 0 (fp32)")
    parser.add_argument("--tensor", type=positive, default=1, help="tensor-parallel processes (1)")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    arguments = parser.parse_args()
    for flag in ("hidden", "width"):
        if getattr(arguments, flag) % 64:
            raise ConfigError(f"--{flag} is {getattr(arguments, flag)}: heads are 64 wide, give a multiple of 64")
    if arguments.steps < 2:
        raise ConfigError("--steps is 1, and the first step after an event is none to judge by: set it to 2 or more")
    return arguments


if __name__ == "__main__":
    run_command(main)
