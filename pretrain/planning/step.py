"""What a run would take on a number of devices: memory, messages, seconds, and where it stops scaling.

    step = computation + tensor-parallel messages + (1 - overlap) · data-parallel messages + host

`pretrain/planning/compute.py` prices the computation, of which a dense step is FLOPs / (efficiency · peak),
recomputation included. The peak, the efficiency and the links are assumptions, since a run that does not exist
yet cannot be measured: `Assumptions` holds them all.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from model.config import ModelConfig, projections
from model.costs.arithmetic import total_parameters, trained_parameters, training_flops_per_token
from pretrain.config.parallel import lay_out
from pretrain.config.run import RunConfig
from pretrain.engine.deepspeed_config import BUCKET_ELEMENTS, deepspeed_dict, given_settings
from pretrain.errors import ConfigError
from pretrain.planning.communication import CommunicationPlan, Links, plan_communication
from pretrain.planning.compute import Arithmetic, compute_seconds
from pretrain.planning.memory import MemoryPlan, Setup, ZeroBuffers, plan_memory
from pretrain.planning.rank_outlook import Outlook, dense_twin

MOST_PROCESSES = 8192
"""Processes at which a scaling table ends."""
_ADAM_BYTES = 28
"""Bytes that Adam moves for each number: gradient, master and both moments are read, the last three written, in
fp32."""


@dataclass(frozen=True)
class Machine:
    """Nodes of equal devices."""

    nodes: int
    devices_per_node: int
    memory_bytes: float
    """Memory of one device."""
    host_memory_bytes: float
    """Host memory of one node."""
    gpu: bool
    """Whether its devices are GPUs."""

    @property
    def processes(self) -> int:
        return self.nodes * self.devices_per_node


@dataclass(frozen=True)
class Assumptions:
    """What is assumed about devices and links, and cannot be computed from the config."""

    arithmetic: Arithmetic
    usable: float
    """Share of a device's memory that tensors may have; the rest is for context, libraries and fragmentation."""
    overlap: float
    """Share of the data-parallel messages that hides behind the backward pass."""
    links: Links
    host_memory_bytes_per_second: float
    """Speed of the host memory of one node, which all processes of the node share."""


@dataclass(frozen=True)
class StepPlan:
    """One step with given ranks on a given parallel layout."""

    parameters: int
    trained_parameters: int
    flops_per_token: int
    """FLOPs of training on one token, without recomputation."""
    flops: float
    """FLOPs of one step, all processes together, with recomputation."""
    memory: MemoryPlan
    communication: CommunicationPlan
    compute_seconds: float
    tensor_seconds: float
    data_seconds: float
    """Seconds of data-parallel messages that the backward pass does not hide."""
    host_seconds: float
    """Seconds for gradients to the host, Adam's step there and weights back; 0 unless the optimizer is offloaded."""

    @property
    def communication_seconds(self) -> float:
        return self.tensor_seconds + self.data_seconds + self.host_seconds

    @property
    def seconds(self) -> float:
        return self.compute_seconds + self.communication_seconds


@dataclass(frozen=True)
class ScalingRow:
    """The same global batch on another number of processes."""

    processes: int
    accumulation: int
    step: StepPlan
    efficiency: float
    """Speed per process, as a share of the first row's."""


def setup_of(config: RunConfig, processes: int, gpu: bool) -> Setup:
    """The setup that the config itself asks for on `processes` processes; `gpu`: whether they compute on GPUs.

    Raises ConfigError if the run does not divide evenly.
    """
    layout = config.parallel_layout(processes)
    deepspeed_dict(config, layout)  # refuses what the run would refuse
    return Setup(
        layout,
        config.train.micro_batch,
        config.train.precision,
        config.deepspeed.stage,
        offload=config.deepspeed.offload_optimizer,
        recompute=config.train.recompute,
        zero=zero_buffers(config),
        within_documents=config.data.within_documents,
        gpu=gpu,
    )


def zero_buffers(config: RunConfig) -> ZeroBuffers:
    """The sizes that the run's DeepSpeed file sets, or ours."""
    given, _ = given_settings(config)
    return ZeroBuffers.of({"reduce_bucket_size": BUCKET_ELEMENTS} | given.get("zero_optimization", {}))


def recomputed_flops_per_token(model: ModelConfig, ranks: Mapping[str, int], recompute: str) -> int:
    """FLOPs per token of computing the layers once more, or (`factors`) all of them but the products by A."""
    if recompute == "none":
        return 0
    flops = 4 * model.sequence_length * model.hidden * model.layers
    for linear in projections(model):
        rank = ranks.get(linear.name)
        inside, whole = linear.in_features, linear.in_features * linear.out_features
        if rank is None:
            flops += 2 * whole
        else:
            inside = 0 if recompute == "factors" else inside
            flops += 2 * rank * (inside + linear.out_features) + (2 * whole if linear.additive else 0)
    return flops


def plan_step(outlook: Outlook, setup: Setup, machine: Machine, assumed: Assumptions) -> StepPlan:
    """One step at `outlook`. `pretrain/planning/fitting.py` says whether it fits.

    A dense model has no factors to recompute from, so with `recompute` "factors" it keeps all its activations.
    """
    model, ranks, layout = outlook.model, outlook.ranks, setup.layout
    if setup.recompute == "factors" and not ranks:
        setup = replace(setup, recompute="none")
    per_token = training_flops_per_token(model, ranks)
    executed = per_token + recomputed_flops_per_token(model, ranks, setup.recompute)
    tokens = setup.micro_batch * layout.data * layout.accumulation * model.sequence_length
    flops = float(executed) * tokens
    messages = plan_communication(model, ranks, setup, assumed.links, machine.devices_per_node)
    trained = trained_parameters(model, ranks)
    stepped = trained / (layout.tensor * layout.data)
    dense, again = dense_twin(model), "none" if setup.recompute == "none" else "layers"
    dense_flops = training_flops_per_token(dense, {}) + recomputed_flops_per_token(dense, {}, again)
    host_seconds = 0.0
    if setup.offload:
        host_seconds = 2 * setup.element_bytes * stepped / assumed.links.host_bytes_per_second
        host_seconds += _ADAM_BYTES * stepped * machine.devices_per_node / assumed.host_memory_bytes_per_second
    return StepPlan(
        total_parameters(model, ranks),
        trained,
        per_token,
        flops,
        plan_memory(model, ranks, setup),
        messages,
        compute_seconds=compute_seconds(model, ranks, setup, assumed.arithmetic, dense_flops),
        tensor_seconds=messages.seconds("tensor"),
        data_seconds=messages.seconds("data") * (1.0 - assumed.overlap),
        host_seconds=host_seconds,
    )


def scaling(
    config: RunConfig, outlook: Outlook, setup: Setup, machine: Machine, assumed: Assumptions
) -> list[ScalingRow]:
    """Rows for 1, 2, 4, ... times the processes of a tensor-parallel group, as long as the global batch divides."""
    rows: list[ScalingRow] = []
    processes, train = setup.layout.tensor, config.train
    while processes <= MOST_PROCESSES:
        try:
            layout = lay_out(
                outlook.model, processes, setup.layout.tensor, setup.micro_batch, train.global_batch, train.batch_ramp
            )
        except ConfigError:  # the batch no longer divides
            break
        step = plan_step(outlook, replace(setup, layout=layout), machine, assumed)
        first = rows[0] if rows else None
        speed = 1.0 if first is None else first.step.seconds * first.processes / (step.seconds * processes)
        rows.append(ScalingRow(processes, layout.accumulation, step, speed))
        processes *= 2
    return rows
