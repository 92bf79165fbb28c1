"""Whether a run fits on a machine, and if not, the numbers and the nearest parallel layout that does.

The nearest parallel layout is the one at the smallest distance. Doubling the tensor-parallel size, halving the
micro-batch and moving by one ZeRO stage count 1 each; recomputation from factors 1.5, of layers 2; another global
batch and moving the optimizer to the host 3 each. What costs time counts more.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import get_args

import psutil
import torch

from model.config import ModelConfig, Recompute
from pretrain.config.parallel import lay_out
from pretrain.config.run import RunConfig
from pretrain.devices import processes_of_machine
from pretrain.errors import ConfigError
from pretrain.planning.memory import MemoryPlan, Setup, plan_memory
from pretrain.planning.rank_outlook import Outlook
from pretrain.planning.step import Assumptions, Machine, setup_of, zero_buffers

_FAR = 3.0


@dataclass(frozen=True)
class Candidate:
    """Another way to split the run, and its distance from the config's own."""

    setup: Setup
    global_batch: int
    distance: float


def check_memory(config: RunConfig, processes: int) -> None:
    """ConfigError with the numbers if weights, gradients and optimizer alone do not fit into memory.

    It runs before anything is built. It checks only what is certain to be needed: `tools/plan_run.py` plans the rest.
    """
    plan = plan_memory(config.model, config.initial_ranks(), setup_of(config, processes, torch.cuda.is_available()))
    neighbours = processes_of_machine(processes)
    host = psutil.virtual_memory().total / neighbours
    copy = plan.optimizer if config.checkpoint.background else 0
    states = plan.weights + plan.gradients + plan.optimizer
    if torch.cuda.is_available():
        free, whole = torch.cuda.mem_get_info()
        places = [
            (f"of the GPU are free (it has {whole / 1e9:,.1f} GB)", states, free),
            ("here are there", plan.host + copy, host),
        ]
    else:
        places = [
            (f"of the machine's memory, shared by {neighbours} processes, are there", states + plan.host + copy, host)
        ]
    for place, needed, available in places:
        if needed > available:
            raise ConfigError(
                f"weights, gradients and optimizer of the first step take {needed / 1e9:,.1f} GB a process, and "
                f"{available / 1e9:,.1f} GB {place}: raise parallel.tensor, deepspeed.stage or the number of "
                "processes, or lower the model's sizes (tools/plan_run.py shows what fits)"
            )


def fitting_setup(config: RunConfig, outlook: Outlook, machine: Machine, assumed: Assumptions) -> Setup:
    """The config's own setup; if it does not fit, ConfigError with the numbers and the nearest setup that fits."""
    try:
        config.parallel_layout(machine.processes)
    except ConfigError as error:
        raise ConfigError(f"{error}; {_proposal(config, outlook, machine, assumed)}") from error
    setup = setup_of(config, machine.processes, machine.gpu)
    memory = plan_memory(outlook.model, outlook.ranks, setup)
    if not fits(memory, machine, assumed):
        raise ConfigError(
            f"{_excess(memory, machine, assumed)} at {outlook.name}; {_proposal(config, outlook, machine, assumed)}"
        )
    return setup


def fits(memory: MemoryPlan, machine: Machine, assumed: Assumptions) -> bool:
    on_host = max(memory.host, memory.aside) * machine.devices_per_node
    return memory.total <= assumed.usable * machine.memory_bytes and on_host <= machine.host_memory_bytes


def _excess(memory: MemoryPlan, machine: Machine, assumed: Assumptions) -> str:
    usable = assumed.usable * machine.memory_bytes
    if memory.total <= usable:
        what = "offloaded optimizers need" if memory.host >= memory.aside else "models being built and grown need"
        needed = max(memory.host, memory.aside) * machine.devices_per_node / 1e9
        return f"{what} {needed:,.1f} GB of a node's memory, {machine.host_memory_bytes / 1e9:,.1f} GB,"
    sizes = {key: size / 1e9 for key, size in asdict(memory).items()}
    return (
        f"a process needs {memory.total / 1e9:,.1f} GB (weights {sizes['weights']:,.1f}, optimizer "
        f"{sizes['optimizer']:,.1f}, and where it is fullest {sizes['fullest']:,.1f} of activations "
        f"{sizes['activations']:,.1f}, gradients {sizes['gradients']:,.1f}, buffers {sizes['buffers']:,.1f}), and "
        f"{usable / 1e9:,.1f} GB of the device's {machine.memory_bytes / 1e9:,.1f} GB are usable,"
    )


def _proposal(config: RunConfig, outlook: Outlook, machine: Machine, assumed: Assumptions) -> str:
    """The settings to change for the nearest parallel layout that fits, or the message that none does."""
    candidates = sorted(_candidates(config, outlook, machine), key=lambda candidate: candidate.distance)
    needs: list[tuple[int, str]] = []
    for candidate in candidates:
        memory, changes = plan_memory(outlook.model, outlook.ranks, candidate.setup), _changes(config, candidate)
        if fits(memory, machine, assumed):
            return f"the nearest that fits: {changes} ({memory.total / 1e9:,.1f} GB a process)"
        needs.append((memory.total, changes))
    if not needs:
        return f"no parallel layout divides over {machine.processes} processes: change the number of nodes"
    smallest, changes = min(needs)
    return (
        f"no parallel layout on {machine.processes} devices fits, the smallest needs {smallest / 1e9:,.1f} GB a "
        f"process "
        f"({changes}): take more nodes, or a smaller model or rank"
    )


def _changes(config: RunConfig, candidate: Candidate) -> str:
    setup = candidate.setup
    settings = {
        "parallel.tensor": (config.parallel.tensor, setup.layout.tensor),
        "train.micro_batch": (config.train.micro_batch, setup.micro_batch),
        "train.global_batch": (config.train.global_batch, candidate.global_batch),
        "deepspeed.stage": (config.deepspeed.stage, setup.stage),
        "train.recompute": (config.train.recompute, setup.recompute),
        "deepspeed.offload_optimizer": (config.deepspeed.offload_optimizer, setup.offload),
    }
    changed = [f"{name}={str(to).lower()}" for name, (was, to) in settings.items() if was != to]
    return " ".join(changed) or "the settings as they are"


def _candidates(config: RunConfig, outlook: Outlook, machine: Machine) -> Iterator[Candidate]:
    """Every combination of settings that divides evenly; tensor parallelism stays within a node, or as it is set."""
    train, model = config.train, outlook.model
    for tensor in _divisors(machine.devices_per_node) | {config.parallel.tensor}:
        for micro_batch in sorted({train.micro_batch} | {2**power for power in range(train.micro_batch.bit_length())}):
            quantum = micro_batch * machine.processes // tensor
            if quantum == 0:  # a tensor-parallel group of more processes than there are
                continue
            below = train.global_batch // quantum * quantum
            for global_batch in sorted({train.global_batch, below, below + quantum} - {0}):
                try:
                    ramp = train.batch_ramp
                    layout = lay_out(model, machine.processes, tensor, micro_batch, global_batch, ramp)
                except ConfigError:
                    continue
                moved = abs(math.log2(tensor / config.parallel.tensor)) + math.log2(train.micro_batch / micro_batch)
                moved += 0.0 if global_batch == train.global_batch else _FAR
                plain = Setup(
                    layout,
                    micro_batch,
                    train.precision,
                    config.deepspeed.stage,
                    within_documents=config.data.within_documents,
                    gpu=machine.gpu,
                )
                for setup, distance in _variants(config, model, plain):
                    yield Candidate(setup, global_batch, moved + distance)


def _variants(config: RunConfig, model: ModelConfig, plain: Setup) -> Iterator[tuple[Setup, float]]:
    """The same parallel layout with every ZeRO stage, recomputation and place of the optimizer. What the run's
    DeepSpeed file sets stays."""
    zero = zero_buffers(config)
    in_bottlenecks = model.parametrization == "factored" and model.factored_layers == "all"
    modes = [mode for mode in get_args(Recompute) if mode != "factors" or in_bottlenecks]
    recompute = config.train.recompute
    offloaded = config.deepspeed.offload_optimizer
    settled = config.deepspeed.config is not None
    stages = [config.deepspeed.stage] if settled else [0, 1, 2, 3]
    places = [offloaded] if settled else [False, True]
    for stage in stages:
        if stage == 0 and plain.precision != "fp32":
            continue
        for mode in modes:
            for offload in places if stage else [False]:
                away = float(abs(stage - config.deepspeed.stage))
                away += 0.0 if mode == recompute else 1.0 + 0.5 * modes.index(mode)
                away += 0.0 if offload == offloaded else _FAR
                yield replace(plain, stage=stage, recompute=mode, offload=offload, zero=zero), away


def _divisors(number: int) -> set[int]:
    return {divisor for divisor in range(1, number + 1) if number % divisor == 0}
