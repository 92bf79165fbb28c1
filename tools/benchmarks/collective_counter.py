"""Counts the collectives of everything that runs inside a block, forward and backward, ours and the libraries'.

    with CollectiveCounter() as forward:
        loss = model(tokens, positions, None, labels=labels).mean()
    with CollectiveCounter() as backward:
        loss.backward()
    forward.total("all_reduce", "tensor").bytes

Every collective of torch.distributed, whoever calls it, is an operator of the dispatcher (`torch.ops.c10d`), in place
or not, so a dispatch mode sees it together with its process group. Autograd's threads on CUDA inherit the mode. What it
sees is what was asked for: how a backend moves it is the backend's own (`Collective.sent_bytes` says how a ring does).
"""

from collections.abc import Iterable
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from model.costs.communication import Collective, Group, Kind, Total, total
from model.process_groups import data_group, tensor_group

_KINDS: dict[str, Kind] = {
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce",
    "allgather_": "all_gather",
    "_allgather_base_": "all_gather",
    "allgather_coalesced_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "reduce_scatter_": "reduce_scatter",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "alltoall_": "all_to_all",
    "alltoall_base_": "all_to_all",
    "broadcast_": "broadcast",
    "reduce_": "reduce",
    "gather_": "gather",
    "scatter_": "scatter",
    "barrier": "barrier",
}
"""Operators of torch 2.13 by what they do; an operator that is not here is an error, not a silent zero."""


class CollectiveCounter(TorchDispatchMode):
    """`collectives`: what was asked for inside the block, in order, by this process. Groups of one process are left
    out: nothing moves in them."""

    def __init__(self) -> None:
        super().__init__()
        self.collectives: list[Collective] = []

    def __torch_dispatch__(
        self, operator: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if operator.namespace == "c10d":
            self._count(operator, args)
        return operator(*args, **(kwargs or {}))

    def total(self, kind: Kind | None = None, group: Group | None = None) -> Total:
        """Number and bytes of what was counted, of one kind or all, in one group or all."""
        return total(self.collectives, kind, group)

    def _count(self, operator: Any, args: tuple[Any, ...]) -> None:
        name = operator.overloadpacket.__name__
        places = [argument.name for argument in operator._schema.arguments]
        group = dist.ProcessGroup.unbox(args[places.index("process_group")])
        if group.size() == 1:
            return
        kind = _KINDS[name]
        # An all-gather's output, a reduce-scatter's input: the larger of a collective's sides is its whole message.
        sides = [] if kind == "barrier" else [list(_tensors(argument)) for argument in args]
        size_bytes = max((sum(tensor.nbytes for tensor in side) for side in sides), default=0)
        self.collectives.append(Collective(kind, _group_name(group), size_bytes))


def _tensors(argument: object) -> Iterable[Tensor]:
    """The tensors of an operator's argument: one, a list, or a list of lists."""
    if isinstance(argument, Tensor):
        yield argument
    elif isinstance(argument, (list, tuple)):
        for item in argument:
            yield from _tensors(item)


def _group_name(group: dist.ProcessGroup) -> Group:
    if group.group_name == tensor_group().group_name:
        return "tensor"
    return "data" if group.group_name == data_group().group_name else "other"
