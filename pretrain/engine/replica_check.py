"""Finds copies of one parameter that are no longer the same, before a checkpoint takes one of them for all.

Copies exist under data parallelism (weights at ZeRO 0 to 2) and under tensor parallelism (what is not split). They
start alike and get the same updates, so a difference of one bit is a fault of memory, of a link or of the code.
Compared is the sum of a parameter's bits, taken as integers, which one flipped bit always changes.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from model.gpt import EspalierModel, tensor_layouts
from model.process_groups import data_group, tensor_group
from pretrain.engine.zero3 import held, is_partitioned
from pretrain.errors import agreed

_INTEGERS = {2: torch.int16, 4: torch.int32}


@torch.no_grad()
def check_replicas(model: EspalierModel) -> None:
    """NumericalError, on all processes, if a copy differs; a collective of a few numbers a parameter."""
    parameters, layouts = dict(model.named_parameters()), tensor_layouts(model)
    sums = torch.stack([_bit_sum(held(parameter)[1]) for parameter in parameters.values()])
    whole = [not is_partitioned(parameter) for parameter in parameters.values()]
    replicated = [layouts[name].dim is None for name in parameters]
    drifted = _differ(sums, data_group(), whole) | _differ(sums, tensor_group(), replicated)
    dist.all_reduce(drifted, op=dist.ReduceOp.MAX)
    for name, found in zip(parameters, drifted.tolist(), strict=True):
        if found:
            raise agreed(
                f"the copies of {name} differ between processes, and should be the same to the last bit: a fault of "
                "memory or of a link; start the run again to go on from its newest checkpoint"
            )


def _bit_sum(values: Tensor) -> Tensor:
    return values.view(_INTEGERS[values.element_size()]).sum(dtype=torch.int64)


def _differ(sums: Tensor, group: dist.ProcessGroup, compared: list[bool]) -> Tensor:
    """1 for every parameter that is `compared` and does not have the same sum in all of `group`, else 0."""
    low, high = sums.clone(), sums.clone()
    dist.all_reduce(low, op=dist.ReduceOp.MIN, group=group)
    dist.all_reduce(high, op=dist.ReduceOp.MAX, group=group)
    return ((low != high) & torch.tensor(compared, device=sums.device)).int()
