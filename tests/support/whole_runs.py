"""What workers do on a pretended GPU: whole training runs, and the tools on what came out of them."""

import gc
import importlib
import os
import sys
from collections import Counter
from contextlib import redirect_stdout
from io import StringIO
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from megatron.core import parallel_state
from torch import Tensor

from pretrain import trainer as trainer_module
from pretrain.config.run import load_config
from pretrain.engine.build import tear_down
from pretrain.engine.optimizer_state import optimizer_state
from pretrain.growth.event import change_ranks
from pretrain.train import run_training
from tests.support.device_ledger import Count
from tests.support.plain_step import count_plain_step
from tests.support.pretended_cuda import PretendedCuda


def problems_of_run(settings: list[str], lengths: list[int]) -> list[str]:
    """Trains to the first of `lengths` (steps), resumes and trains to the next, and so on; what a GPU would have
    refused."""
    with PretendedCuda() as gpu:
        for steps in lengths:
            trainer = run_training(
                load_config("quickstart", [*settings, f"train.steps={steps}"]), dist.get_world_size()
            )
            assert trainer is not None
            assert trainer.state.step == steps
            assert next(trainer.model.parameters()).is_cuda
            tear_down(trainer.engine)
            parallel_state.destroy_model_parallel()
    return sorted(gpu.problems)


def grown_run(settings: list[str], peak_bytes: int) -> tuple[Count, dict[str, Tensor], list[str]]:
    """What the growth event of a run cost, the masters at the run's end, and what a GPU would have refused. Up to the
    event the run has had `peak_bytes` on the device."""
    costs: list[Count] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        before = gpu.count()
        grown = change_ranks(*args, **kwargs)
        costs.append(gpu.count() - before)
        return grown

    with PretendedCuda() as gpu, patch.object(torch.cuda, "max_memory_allocated", lambda: peak_bytes):
        with patch.object(trainer_module, "change_ranks", counted):
            trainer = run_training(load_config("quickstart", settings), dist.get_world_size())
        assert trainer is not None
        masters = {
            fragment.name: fragment.values.cpu().clone()
            for fragment in optimizer_state(trainer.engine).fragments()
            if fragment.key == "master"
        }
        tear_down(trainer.engine)
        parallel_state.destroy_model_parallel()
    (cost,) = costs
    return cost, masters, sorted(gpu.problems)


def plain_step(settings: list[str]) -> tuple[Count, list[str]]:
    """A plain step's count, and what a GPU would have refused in the whole run."""
    with PretendedCuda() as gpu:
        count = count_plain_step(load_config("quickstart", settings), gpu, dist.get_world_size())
    return count, sorted(gpu.problems)


def problems_of_tool(name: str, flags: list[str]) -> tuple[list[str], str]:
    """Runs module `name` of `tools` with command line `flags`, alone and without a process group as from a shell; what
    a GPU would have refused, and what the tool printed."""
    dist.destroy_process_group()
    for variable in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        os.environ.pop(variable)
    said = StringIO()
    tool: Any = importlib.import_module(f"tools.{name}")
    sys.argv = [f"{name}.py", *flags]
    with PretendedCuda() as gpu, redirect_stdout(said):
        tool.main()
    for engine in [thing for thing in gc.get_objects() if isinstance(thing, DeepSpeedEngine)]:
        vars(engine).clear()  # its process group is gone, and nothing of it can be torn down any more
        engine.module = None
    return sorted(gpu.problems), said.getvalue()


def waits_with_planted_read(settings: list[str]) -> Counter[str]:
    """Causes of the host waits of a plain step that looks at its loss once more."""
    backward = DeepSpeedEngine.backward

    def looking(engine: DeepSpeedEngine, loss: Tensor, **options: Any) -> Any:
        loss.item()
        return backward(engine, loss, **options)

    DeepSpeedEngine.backward = looking
    try:
        count, _ = plain_step(settings)
    finally:
        DeepSpeedEngine.backward = backward
    return Counter({cause: number for (_, cause), number in count.waits.items()})
