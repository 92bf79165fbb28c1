"""One look at all gradients before the optimizer step, instead of DeepSpeed's many.

    ‖g‖² = Σ_p ‖g_p‖²,      p over the gradients of all processes, those that several hold alike once

It is finite if and only if every element is, so it says both whether the step is skipped and how far it is clipped.
`squared_norm` gives this process's share as a number on the device. The trainer sums it over all processes, reads it
together with everything else that is read once a step, and passes it on with `set_squared_norm`. An engine that was
not given the sum computes and reads it by itself.

What this works around in DeepSpeed 0.19.8, all of it in `engine.step()`:

- `has_overflow` runs amax, amin, two isfinite and three logical operators on every gradient, and
  `get_grad_norm_direct` a conversion to fp64, a copy of eight bytes an element, and a norm: some 13 kernels a
  parameter, most of them waiting for nothing but their launch. One `torch._foreach_norm` over the list, accumulated in
  fp64 without a copy, answers both.
- Both, and `is_invalid_grad_norm` once a group, bring a number to the host, which waits for the device each time. With
  an offloaded optimizer `update_offload_overflow_tracker` and `complete_grad_norm_calculation_for_cpu_offload` do so
  once a parameter. The one number above can be read once.
- `unscale_and_clip_grads` multiplies all gradients by 1 where nothing is scaled or clipped.
- `clip_fp32_gradients` (stage 0) takes three kernels a parameter for the norm and one for the product.
- ZeRO 3 has the host wait for its reduction stream after every backward pass, where only later kernels have to.
- The throughput timer calls `torch.cuda.synchronize` twice a micro-step unless `timers.throughput.enabled` is false.

A gradient whose squared norm does not fit fp32 (a norm above 1.8e19) is treated as one that is not finite. DeepSpeed
does the same under ZeRO 1 and 2; under ZeRO 3 it would still step. Experts (MoE) and Muon have rules of their own and
are not supported here.
"""

import math
from abc import ABCMeta, abstractmethod
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor

from model.process_groups import data_size, device, tensor_index

TIMERS_OFF = {"timers": {"throughput": {"enabled": False}}}
"""Part of DeepSpeed's config that switches its throughput timer off."""


def list_norms(tensors: list[Tensor]) -> list[Tensor]:
    """Euclidean norm of each tensor, in fp64 on the tensors' device, by one operator for all of them. Finite elements
    of fp32 or smaller types cannot overflow."""
    return list(torch._foreach_norm(tensors, 2, dtype=torch.float64)) if tensors else []


def attach(engine: DeepSpeedEngine) -> None:
    """Makes the engine step by the summed squared norm; its ZeRO optimizer gets a subclass with the methods below."""
    optimizer = engine.optimizer
    if isinstance(optimizer, DeepSpeedZeroOptimizer | DeepSpeedZeroOptimizer_Stage3):
        optimizer.__class__ = _Stage1And2 if isinstance(optimizer, DeepSpeedZeroOptimizer) else _Stage3
        optimizer.summed_squared_norm = None
    else:
        engine.summed_squared_norm = None
        engine.clip_fp32_gradients = partial(_clip, engine)
    if isinstance(optimizer, _Stage3) and not optimizer.offload_optimizer:
        _order_instead_of_waiting(optimizer.reduce_and_partition_stream)


def squared_norm(engine: DeepSpeedEngine) -> Tensor:
    """This process's share of the squared norm of the gradient, times the squared loss scale: an fp64 number on the
    device. To be called between the last backward pass of a step and `engine.step()`."""
    if isinstance(engine.optimizer, _Scanned):
        return engine.optimizer.squared_norm()
    held = [parameter for parameter in engine.module.parameters() if parameter.grad is not None]
    share = _share(list_norms([parameter.grad for parameter in held]), held)
    return share / data_size()  # all data-parallel processes have the same gradients


def set_squared_norm(engine: DeepSpeedEngine, summed: float) -> None:
    """Gives the engine the squared norm, summed over all processes, by which the coming `engine.step()` skips or
    clips."""
    if isinstance(engine.optimizer, _Scanned):
        engine.optimizer.summed_squared_norm = summed
    else:
        engine.summed_squared_norm = summed


def norm_of(squared: float) -> Tensor:
    """The norm as one fp32 number, as DeepSpeed hands it on, but on the host; not finite if the step is to be
    skipped."""
    return torch.tensor(squared, dtype=torch.float32).sqrt()


def sum_over_processes(share: Tensor) -> float:
    """The sum of all processes' shares, the same to the last bit on all of them; waits for the device."""
    dist.all_reduce(share)
    dist.broadcast(share, src=0)
    return float(share)


def _share(norms: list[Tensor], parameters: Iterable[Tensor]) -> Tensor:
    """Sum of the squared norms that this process counts.

    A parameter that every tensor-parallel process holds whole is counted by the first one. The others add 0 times
    theirs, which is NaN if theirs is not finite.
    """
    counted: list[Tensor] = []
    others: list[Tensor] = []
    for norm, parameter in zip(norms, parameters, strict=True):
        own = tensor_index() == 0 or getattr(parameter, "tensor_model_parallel", False)
        (counted if own else others).append(norm)
    total = torch.stack(counted).square().sum() if counted else torch.zeros((), dtype=torch.float64, device=device())
    return total + 0.0 * torch.stack(others).sum() if others else total


def _clip(engine: DeepSpeedEngine) -> None:
    """Clips the gradients at stage 0, in place of `engine.clip_fp32_gradients`."""
    summed, engine.summed_squared_norm = engine.summed_squared_norm, None
    if summed is None:
        summed = sum_over_processes(squared_norm(engine))
    factor = float(engine.gradient_clipping() / (norm_of(summed) + 1e-6))
    gradients = [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
    if factor < 1.0:
        torch._foreach_mul_(gradients, factor)


def _order_instead_of_waiting(stream: Any) -> None:
    """Turns a wait of the host for `stream` into a wait of the later kernels."""
    if stream is not None:
        stream.synchronize = lambda: get_accelerator().current_stream().wait_stream(stream)


class _Scanned(metaclass=ABCMeta):
    """Methods that both of DeepSpeed's ZeRO optimizers share; the first base class, so that they override
    DeepSpeed's. The base class `ABC` would give objects another memory layout, and `attach` could not assign the
    class."""

    summed_squared_norm: float | None
    """Squared norm over all processes, for the coming step; None until it is known."""
    loss_scale: float
    clip_grad: float

    @abstractmethod
    def squared_norm(self) -> Tensor:
        """This process's share, as the function `squared_norm` gives it."""

    def step(self, closure: Any = None) -> None:
        if self.summed_squared_norm is None:
            self.summed_squared_norm = sum_over_processes(self.squared_norm())
        super().step(closure)  # type: ignore[misc]
        self.summed_squared_norm = None

    def has_overflow(self, partition_gradients: bool = True) -> bool:
        assert self.summed_squared_norm is not None
        return not 0.0 <= self.summed_squared_norm <= torch.finfo(torch.float32).max

    def _norm(self) -> Tensor:
        assert self.summed_squared_norm is not None
        return norm_of(self.summed_squared_norm)

    def _leaves_as_is(self) -> bool:
        """Whether `unscale_and_clip_grads` would multiply by 1."""
        assert self.summed_squared_norm is not None
        clipped = self.clip_grad > 0 and (math.sqrt(self.summed_squared_norm) + 1e-6) / self.clip_grad > 1.0
        return self.loss_scale == 1.0 and not clipped


class _Stage1And2(_Scanned, DeepSpeedZeroOptimizer):
    def squared_norm(self) -> Tensor:
        parameters = [parameter for group in self.params_in_partition for parameter in group]
        if self.cpu_offload:  # the gradients are on their way to the host, their norms were taken before
            known = self.norm_for_param_grads
            parameters = [parameter for parameter in parameters if self.get_param_id(parameter) in known]
            return _share([known[self.get_param_id(parameter)] for parameter in parameters], parameters)
        gradients = []
        for index, group in enumerate(self.params_in_partition):
            pieces = [one for one in self.averaged_gradients[index] if not getattr(one, "_zero_padding", False)]
            # DeepSpeed 0.19.8 does not mark the zeros that fill up a group's last partition, or an empty one.
            gradients += pieces[: len(group)]
        return _share(list_norms(gradients), parameters)

    def scaled_global_norm(self, norm_type: int = 2) -> Tensor:
        return self._norm()

    def unscale_and_clip_grads(self, grad_groups_flat: list[Tensor], total_norm: Tensor) -> None:
        if not self._leaves_as_is():
            super().unscale_and_clip_grads(grad_groups_flat, total_norm)

    def set_norm_for_param_grad_in_gpu(self, param: Tensor) -> None:
        gradient = self.get_param_gradient_attribute(param)
        gradient = param.grad if gradient is None else gradient
        assert gradient is not None
        _, start, _, length = self.grad_position[self.get_param_id(param)]
        (norm,) = list_norms([gradient.detach().view(-1).narrow(0, start, length)])
        self.norm_for_param_grads[self.get_param_id(param)] = norm

    def update_offload_overflow_tracker(self, grad: Tensor) -> None:
        """Does nothing: the norm already shows an overflow."""


class _Stage3(_Scanned, DeepSpeedZeroOptimizer_Stage3):
    def squared_norm(self) -> Tensor:
        parameters = [parameter for group in self.fp16_groups for parameter in group]
        if self.offload_optimizer:
            known = self.norm_for_param_grads
            parameters = [parameter for parameter in parameters if self.get_param_id(parameter) in known]
            return _share([known[self.get_param_id(parameter)] for parameter in parameters], parameters)
        groups = [self.averaged_gradients[index] for index in range(len(self.fp16_groups))]
        return _share(list_norms([gradient for group in groups for gradient in group]), parameters)

    def _get_norm_groups(self) -> list[Tensor]:
        return [self._norm()]

    def unscale_and_clip_grads(self, sub_group_id: int, total_norm: Tensor) -> None:
        if not self._leaves_as_is():
            super().unscale_and_clip_grads(sub_group_id, total_norm)

    def _constant_buffered_norm2(self, input: Tensor, buffer_size: int = 250000000) -> Tensor:
        return list_norms([input.detach().view(-1)])[0]
