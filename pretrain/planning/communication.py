"""What one process sends in a step, and how long that takes, from config, ranks and parallel layout alone.

Between tensor-parallel processes: `model/costs/communication.py`. Over d data-parallel processes, with N trained
numbers on a tensor-parallel process and e bytes a number, DeepSpeed 0.19.8 asks for

| stage | gradients                          | parameters                                                              |
|-------|------------------------------------|-------------------------------------------------------------------------|
| 0, 1  | all-reduce N·e, once a step        | stage 1: all-gather N·e, once a step                                    |
| 2     | all-reduce N·e, every micro-step   | all-gather N·e, once a step                                             |
| 3     | reduce-scatter N·e, the same       | all-gather N·e twice a micro-step, less what stays gathered in between  |

A ring of n processes sends 2·(n-1)/n of an all-reduce's message through each of them and (n-1)/n of the others'. A
group inside a node sends over one device's link within the node. A group over several nodes sends over the network
links of all its members in a node together, but no faster than one device's link within the node. Each collective costs
a latency as well.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from model.config import ModelConfig
from model.costs.communication import Collective, Group, StepCollectives, TensorTraffic, gradient_and_parameter_bytes
from model.costs.parameter_shards import ParameterShard, parameter_shards
from pretrain.planning.memory import Setup, gathered_numbers, optimizer_groups, total_numbers


@dataclass(frozen=True)
class Links:
    """What connects devices; bytes per second are what one process can send."""

    node_bytes_per_second: float
    network_bytes_per_second: float
    """Speed of one device's share of its node's links to other nodes."""
    host_bytes_per_second: float
    """Speed between a device and its node's memory."""
    node_latency_seconds: float
    network_latency_seconds: float


@dataclass(frozen=True)
class Traffic:
    """One kind of message in a step, of one process."""

    what: str
    group: Group
    collectives: int
    bytes: int
    """Bytes of whole messages: the buffer of an all-reduce, the result of an all-gather, the input of a
    reduce-scatter."""
    sent_bytes: float
    """Bytes that this process sends, in a ring."""
    seconds: float


@dataclass(frozen=True)
class CommunicationPlan:
    """All messages of a step."""

    traffic: tuple[Traffic, ...]

    def seconds(self, group: Group) -> float:
        return sum(row.seconds for row in self.traffic if row.group == group)

    def bytes(self, group: Group) -> int:
        return sum(row.bytes for row in self.traffic if row.group == group)


def plan_communication(
    model: ModelConfig, ranks: Mapping[str, int], setup: Setup, links: Links, devices_per_node: int
) -> CommunicationPlan:
    """All messages of one process in one step, with all its micro-steps; without scalars such as norms and overflow
    flags."""
    tensor, data = setup.layout.tensor, setup.layout.data
    tensor_speed = _Speed(tensor, min(tensor, devices_per_node), links)
    data_speed = _Speed(data, max(min(data, devices_per_node // tensor), 1), links)
    rows = [tensor_speed.row(what, collectives) for what, collectives in _tensor_messages(model, ranks, setup).items()]
    rows += [data_speed.row(what, collectives) for what, collectives in _data_messages(model, ranks, setup).items()]
    return CommunicationPlan(tuple(rows))


@dataclass(frozen=True)
class _Speed:
    """How fast groups of `processes` processes, `in_a_node` of them on each node, move messages."""

    processes: int
    in_a_node: int
    links: Links

    def row(self, what: str, collectives: Sequence[Collective]) -> Traffic:
        sent = sum(message.sent_bytes(self.processes) for message in collectives)
        seconds = sent / self._bytes_per_second() + len(collectives) * self._latency_seconds()
        size = sum(message.bytes for message in collectives)
        return Traffic(what, collectives[0].group, len(collectives), size, sent, seconds)

    def _bytes_per_second(self) -> float:
        if self.processes == self.in_a_node:
            return self.links.node_bytes_per_second
        return min(self.links.node_bytes_per_second, self.in_a_node * self.links.network_bytes_per_second)

    def _latency_seconds(self) -> float:
        """Latency of one tree inside a node and one over the nodes; libraries prefer trees to rings where latency
        counts."""
        nodes = math.ceil(self.processes / self.in_a_node)
        inside = math.log2(self.in_a_node) * self.links.node_latency_seconds
        return inside + math.log2(nodes) * self.links.network_latency_seconds


def _tensor_messages(model: ModelConfig, ranks: Mapping[str, int], setup: Setup) -> dict[str, list[Collective]]:
    """Tensor-parallel collectives of all micro-steps of a step, by what they are for."""
    if setup.layout.tensor == 1:
        return {}
    tokens = setup.micro_batch * model.sequence_length
    traffic = TensorTraffic(model, setup.layout.tensor, tokens, setup.element_bytes)
    step = traffic.step(ranks)
    forward, backward = step.forward, step.backward
    if model.parametrization == "factored":
        layers = StepCollectives(forward[1:-5], backward[1:-2])
        named = {
            "embedding": [forward[0], backward[0]],
            "bottlenecks": layers.forward + layers.backward,
            "last norm": [forward[-5], backward[-2]],
            "output layer": [forward[-4], backward[-1]],
        }
    else:
        layers = StepCollectives(forward[1:-3], backward[:-1])
        named = {
            "embedding": [forward[0]],
            "linear layers": layers.forward + layers.backward,
            "output layer": [backward[-1]],
        }
    named["loss"] = forward[-3:]
    if setup.recompute != "none":
        # `factors` keeps what the bottlenecks' sums brought.
        kinds = {"all_gather"} if setup.recompute == "factors" else {message.kind for message in layers.forward}
        again = [message for message in layers.forward if message.kind in kinds]
        named |= {"recomputation": again} if again else {}
    return {what: messages * setup.layout.accumulation for what, messages in named.items()}


def _data_messages(model: ModelConfig, ranks: Mapping[str, int], setup: Setup) -> dict[str, list[Collective]]:
    layout, e = setup.layout, setup.element_bytes
    if layout.data == 1:
        return {}
    shards = parameter_shards(model, ranks, layout.tensor)
    if setup.stage == 3:
        return _partitioned_messages(shards, setup)
    sizes = [total_numbers(group) for group in optimizer_groups(shards)]
    by_kind = gradient_and_parameter_bytes(setup.stage, sizes, layout.data, layout.accumulation, e)
    names = {"all_reduce": "gradients", "all_gather": "parameters"}
    return {names[kind]: _bucketed(Collective(kind, "data", size), setup) for kind, size in by_kind.items()}


def _bucketed(message: Collective, setup: Setup) -> list[Collective]:
    """Messages in which it is sent: an all-reduce in buckets; anything else is counted as one, which changes little."""
    bucket = setup.zero.reduce_bucket_size * setup.element_bytes
    count = math.ceil(message.bytes / bucket) if message.kind == "all_reduce" else 1
    whole, rest = divmod(message.bytes, count)
    return [Collective(message.kind, message.group, whole + (place < rest)) for place in range(count)]


def _partitioned_messages(shards: Iterable[ParameterShard], setup: Setup) -> dict[str, list[Collective]]:
    shards, data, e = list(shards), setup.layout.data, setup.element_bytes
    small, kept = gathered_numbers(shards, setup.zero)
    padded = sum(-(-s.numbers // data) * data for s in shards if s.trained)
    rest = total_numbers(shards) - small
    large = sum(s.numbers > setup.zero.stage3_param_persistence_threshold for s in shards)
    gathers = [Collective("all_gather", "data", rest * e // max(large, 1))] * large
    gathers += [Collective("all_gather", "data", (rest - kept) * e // max(large, 1))] * (large if rest > kept else 0)
    step = [Collective("all_gather", "data", small * e)]
    reductions = _bucketed(Collective("reduce_scatter", "data", padded * e), setup)
    return {
        "gradients": reductions * setup.layout.accumulation,
        "parameters": gathers * setup.layout.accumulation + step,
    }
