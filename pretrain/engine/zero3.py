"""Parameters as ZeRO 3 leaves them: every process holds a slice, and the whole only while a module computes.

DeepSpeed 0.19.8 turns parameters into partitioned ones when an engine is built: `data` is empty, `ds_tensor` is this
process's slice of the flat parameter (all of equal length, the last ones padded), `ds_shape` its shape. At other stages
a parameter is whole everywhere, and everything here says so.
"""

import inspect
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import deepspeed
import torch
from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from torch import Tensor, nn

from model.gpt import EspalierModel, LayerWithFactors
from model.layers.recomputation import RecomputedLayer
from model.process_groups import DeepSpeedProcessGroups, data_group, data_index, device

_LEFT_ON_MODULES = (
    "_external_params", "_original_parameters", "applied_pre_backward_ref_cnt", "post_bwd_fn", "pre_bwd_fn",
)  # fmt: skip
_RECOMPUTATION = -1
"""A user of parameters beside modules, which DeepSpeed numbers from 0."""


def is_partitioned(parameter: Tensor) -> bool:
    return hasattr(parameter, "ds_id")


def gathered(parameters: Iterable[Tensor]) -> AbstractContextManager:
    """Inside it the parameters are whole, to be read; a collective over the data-parallel group."""
    return deepspeed.zero.GatheredParameters(list(parameters))


def shape_of(parameter: Tensor) -> torch.Size:
    """Shape of this tensor-parallel process's shard."""
    return getattr(parameter, "ds_shape", parameter.shape)


def held(parameter: Tensor) -> tuple[int, Tensor]:
    """Where this process's slice of the flat parameter starts, and its values as a view: all of it, unless it is
    partitioned."""
    if not is_partitioned(parameter):
        return 0, parameter.detach().view(-1)
    start = data_index() * len(parameter.ds_tensor)  # type: ignore[attr-defined]
    length = min(len(parameter.ds_tensor), parameter.ds_numel - start)  # type: ignore[attr-defined]
    return start, parameter.ds_tensor[: max(length, 0)]  # type: ignore[attr-defined]


def hold(parameter: Tensor, shard: Tensor) -> None:
    """Gives this process its slice of `shard`, which has the parameter's shape."""
    start, slice_held = held(parameter)
    slice_held.copy_(shard.reshape(-1)[start : start + len(slice_held)])


def drop_gathered(parameters: Iterable[Tensor]) -> None:
    """Has parameters that are kept whole for their small size gathered anew, after their slices have changed."""
    small = [p for p in parameters if is_partitioned(p) and p.numel()]
    if small:
        small[0].partition(small)  # type: ignore[attr-defined]


def replace_factors(layer: LayerWithFactors, A: Tensor, B: Tensor) -> None:
    """Gives the layer new factors, partitioned at once if the old ones were; a collective."""
    old = layer.A
    layer.set_factors(A, B)
    if is_partitioned(old):
        old.convert_to_zero_parameters([layer.A, layer.B])  # type: ignore[attr-defined]


def partition(model: EspalierModel, dtype: torch.dtype) -> None:
    """Partitions a whole model parameter by parameter, in `dtype`, on its way from the host to the device, which need
    not have room for all of it; a collective. One that is partitioned stays as it is.

    Left to `deepspeed.initialize` (0.19.8), the whole model would go to the device first, and
    `torch.nn.functional.linear` would be replaced for the rest of the process.
    """
    parameters = list(model.parameters())
    if any(map(is_partitioned, parameters)):
        return
    for parameter in parameters:
        parameter.data = parameter.data.to(dtype)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device())
    deepspeed.zero.Init(
        module=model,
        data_parallel_group=data_group(),
        mem_efficient_linear=False,
        dtype=dtype,
        mpu=DeepSpeedProcessGroups(),
    )


def fetch_tied_weight(model: EspalierModel) -> None:
    """Has the tied embedding gathered for the output layer as well, which uses it as a plain tensor."""
    if model.model_config.tied_embeddings:
        weight = model.shared_embedding_or_output_weight()
        deepspeed.zero.register_external_parameter(model.output_layer, weight)


def hold_while_recomputing(model: EspalierModel) -> None:
    """Has the layers that recompute keep their parameters whole while they do, up to each one's own backward pass.

    DeepSpeed 0.19.8's hooks would release them after the second forward pass as after the first, and the gradients that
    are due would meet empty parameters. One layer's are whole at a time.
    """
    for module in model.modules():
        if isinstance(module, RecomputedLayer):
            module.recomputing = partial(_in_use, module)


@contextmanager
def _in_use(module: nn.Module) -> Iterator[None]:
    """Inside it no hook releases the module's parameters, which are released only where no module uses them."""
    for parameter in module.parameters():
        parameter.ds_active_sub_modules.add(_RECOMPUTATION)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for parameter in module.parameters():
            parameter.ds_active_sub_modules.discard(_RECOMPUTATION)  # type: ignore[attr-defined]


def forget_engine(model: EspalierModel) -> None:
    """Removes what an engine's ZeRO 3 leaves on the model, so that it dies and another can be built around it.

    DeepSpeed 0.19.8 leaves on every module the closures of its backward hooks, which the next engine would go on using,
    and the dictionary of the parameters it had; on every parameter its optimizer; the model on a stack of its own; and
    the coordinator of the parameters, with all of them, in a cache of one of its methods.
    """
    instrumented = PartitionedParameterCoordinator._PartitionedParameterCoordinator__params_to_release
    inspect.getclosurevars(instrumented).nonlocals["func"].cache_clear()
    for module in model.modules():
        module._parameters = dict(module._parameters)
        for name in [name for name in vars(module) if name.startswith("ds_") or name in _LEFT_ON_MODULES]:
            delattr(module, name)
    for parameter in model.parameters():
        vars(parameter).pop("_z3_optimizer", None)
    FWD_MODULE_STACK[:] = [module for module in FWD_MODULE_STACK if module is not model]
