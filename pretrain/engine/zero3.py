"""Parameters under ZeRO 3: every process holds a slice of each, and the whole only while a module computes.

DeepSpeed 0.19.8 turns parameters into partitioned ones when an engine is built: `data` is empty, `ds_tensor` is this
process's slice of the flat parameter (all of equal length, the last ones padded), `ds_shape` its shape. At other stages
a parameter is whole everywhere, and the functions here treat it so.
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
"""Number of recomputation as a user of parameters; DeepSpeed numbers modules from 0."""


def is_partitioned(parameter: Tensor) -> bool:
    return hasattr(parameter, "ds_id")


def gathered(parameters: Iterable[Tensor]) -> AbstractContextManager:
    """Context in which the parameters are whole, for reading; a collective over the data-parallel group."""
    return deepspeed.zero.GatheredParameters(list(parameters))


def shape_of(parameter: Tensor) -> torch.Size:
    """Shape of this tensor-parallel process's shard."""
    return getattr(parameter, "ds_shape", parameter.shape)


def held(parameter: Tensor) -> tuple[int, Tensor]:
    """Start of this process's slice in the flat parameter, and its values as a view; the whole parameter unless it is
    partitioned."""
    if not is_partitioned(parameter):
        return 0, parameter.detach().view(-1)
    start = data_index() * len(parameter.ds_tensor)  # type: ignore[attr-defined]
    length = min(len(parameter.ds_tensor), parameter.ds_numel - start)  # type: ignore[attr-defined]
    return start, parameter.ds_tensor[: max(length, 0)]  # type: ignore[attr-defined]


def hold(parameter: Tensor, shard: Tensor) -> None:
    """Copies this process's slice of `shard`, which has the parameter's shape, into the parameter."""
    start, slice_held = held(parameter)
    slice_held.copy_(shard.reshape(-1)[start : start + len(slice_held)])


def drop_gathered(parameters: Iterable[Tensor]) -> None:
    """Makes small parameters, which are kept whole, be gathered anew after their slices have changed."""
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
    """Partitions a model parameter by parameter, in `dtype`, while it moves from the host to the device; a collective.

    The device needs no room for the whole model. Parameters that are partitioned already stay as they are.

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
    """Makes the tied embedding be gathered for the output layer too, which uses it as a plain tensor."""
    if model.model_config.tied_embeddings:
        weight = model.shared_embedding_or_output_weight()
        deepspeed.zero.register_external_parameter(model.output_layer, weight)


def hold_while_recomputing(model: EspalierModel) -> None:
    """Makes layers that recompute keep their parameters whole from the second forward pass to the end of the backward
    one.

    DeepSpeed 0.19.8's hooks would release them after the second forward pass as after the first, and the backward pass
    would find empty parameters. The parameters of one layer at a time are whole.
    """
    for module in model.modules():
        if isinstance(module, RecomputedLayer):
            module.recomputing = partial(_in_use, module)


@contextmanager
def _in_use(module: nn.Module) -> Iterator[None]:
    """Context in which no hook releases the module's parameters, since recomputation counts as a user of them."""
    for parameter in module.parameters():
        parameter.ds_active_sub_modules.add(_RECOMPUTATION)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for parameter in module.parameters():
            parameter.ds_active_sub_modules.discard(_RECOMPUTATION)  # type: ignore[attr-defined]


def forget_engine(model: EspalierModel) -> None:
    """Removes what an engine's ZeRO 3 leaves on the model, so that the engine is freed and another can be built.

    DeepSpeed 0.19.8 leaves these references:

    - on every module the closures of its backward hooks, which the next engine would go on using, and the dictionary of
      the parameters it had;
    - on every parameter its optimizer;
    - the model on a stack of DeepSpeed's own;
    - the coordinator of the parameters, with all of them, in a cache of one of its methods.
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
