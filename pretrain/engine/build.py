"""Builds DeepSpeed engines and takes them down without leaving anything behind."""

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import nn

from model.gpt import EspalierModel
from model.process_groups import DeepSpeedProcessGroups
from pretrain.engine.gradient_scan import TIMERS_OFF, attach
from pretrain.engine.zero3 import fetch_tied_weight, forget_engine, hold_while_recomputing, partition, shape_of
from pretrain.schedule import OptimizerConfig, has_weight_decay


def parameter_groups(model: EspalierModel, optimizer: OptimizerConfig) -> list[dict[str, Any]]:
    """The trained parameters with weight decay, and those without.

    Frozen parameters are in no group, and a group that would be empty is left out: DeepSpeed 0.19.8 cannot flatten it.
    """
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.trained_parameters().items():
        (decayed if has_weight_decay(name, len(shape_of(parameter))) else others).append(parameter)
    groups = [{"params": decayed, "weight_decay": optimizer.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_engine(
    model: EspalierModel, optimizer: OptimizerConfig, deepspeed_config: dict[str, Any], *, compiled: bool = False
) -> DeepSpeedEngine:
    """An engine around `model` with torch's fused AdamW; the caller sets the learning rate in each step."""
    if compiled:
        from model.layers.compilation import compile_layers  # which loads the compiler

        compile_layers(model.decoder.layers)
    stage = deepspeed_config["zero_optimization"]["stage"]
    if stage == 3:
        partition(model, _precision(deepspeed_config))
    adamw = torch.optim.AdamW(
        parameter_groups(model, optimizer),
        lr=optimizer.learning_rate,
        betas=(optimizer.beta1, optimizer.beta2),
        eps=optimizer.epsilon,
        fused=True,
    )
    engine, _, _, _ = deepspeed.initialize(
        model=model,
        optimizer=adamw,
        mpu=DeepSpeedProcessGroups(),
        config=deepspeed_config | TIMERS_OFF,
        dist_init_required=False,
    )
    attach(engine)
    if stage == 3:
        fetch_tied_weight(model)
        hold_while_recomputing(model)
    return engine


def _precision(deepspeed_config: dict[str, Any]) -> torch.dtype:
    for section, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        if deepspeed_config.get(section, {}).get("enabled"):
            return dtype
    return torch.float32


def tear_down(engine: DeepSpeedEngine) -> None:
    """Destroys the engine and everything it left on the module, and gives every trained parameter memory of its own.

    DeepSpeed 0.19.8's `destroy` leaves its two forward hooks on the module, and parameters as views of its flat buffers
    with its own attributes. So the hooks are removed by hand, and trained parameters are made anew; DeepSpeed never
    touched the frozen ones. Under ZeRO 3 all parameters stay partitioned, since the whole model may not fit. The engine
    object is emptied, because the caller still holds it, and it holds the optimizer under four names.
    """
    module, stage = engine.module, engine.zero_optimization_stage()
    engine.destroy()
    for hook in (engine.module_forward_pre_hook, engine.module_forward_post_hook):
        hook.remove()
    vars(engine).clear()
    engine.module = None  # marks it as torn down
    if stage == 3:
        forget_engine(module)
    gc.collect()  # frees masters and moments that nobody keeps, before parameters are copied
    if stage == 3:
        return
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            if parameter.requires_grad:
                setattr(owner, name, _fresh_parameter(parameter))


def _fresh_parameter(parameter: nn.Parameter) -> nn.Parameter:
    """A copy with megatron-core's attributes. The methods that DeepSpeed bound to the old parameter are removed: they
    would keep it, and its flat buffer, alive until the next garbage collection."""
    fresh = nn.Parameter(parameter.detach().clone())
    for mark in ("tensor_model_parallel", "partition_dim", "partition_stride"):
        if hasattr(parameter, mark):
            setattr(fresh, mark, getattr(parameter, mark))
    vars(parameter).clear()
    return fresh


def release_free_memory() -> None:
    """Gives freed memory back to the system, and to other users of the device.

    glibc keeps freed blocks for itself: without this, resident memory of a small model rose by 4 MB per event and stood
    135 MB above what was in use after 20.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc alone has it
    if trim is not None:
        trim(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def evaluating(engine: DeepSpeedEngine) -> Iterator[None]:
    """Forward passes inside it have no dropout.

    ZeRO 3 (DeepSpeed 0.19.8) prefetches parameters in the order of a training step. After a forward pass alone some are
    still being fetched, and can neither be gathered nor replaced. At the end they are waited for and released.
    """
    engine.eval()
    yield
    engine.train()
    if engine.zero_optimization_stage() == 3:
        engine.empty_partition_cache()


def set_learning_rate(engine: DeepSpeedEngine, learning_rate: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate
