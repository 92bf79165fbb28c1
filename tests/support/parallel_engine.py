"""What worker processes do in tests of the engine: train a small model on random text, with or without events."""

import gc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from megatron.core import parallel_state
from torch import Tensor

from model.config import ModelConfig, Recompute, factored_projections
from model.gpt import EspalierModel, build_model
from model.process_groups import data_group, data_index, data_size, initialize_process_groups
from pretrain.checkpoint.format import KEYS
from pretrain.engine.build import build_engine, set_learning_rate
from pretrain.engine.gradient_scan import norm_of, squared_norm, sum_over_processes
from pretrain.engine.optimizer_state import optimizer_state
from pretrain.engine.zero3 import gathered, held
from pretrain.growth.event import RankPlan, change_ranks
from pretrain.growth.spectra import row_norms
from pretrain.growth.stash import Stash
from pretrain.schedule import OptimizerConfig
from tests.support.parallel_model import gather_logical, positions_of

RELEASING = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
}
"""With them ZeRO 3 releases every parameter after use, however small the model is."""
OPTIMIZER = OptimizerConfig(learning_rate=2e-3)


@dataclass(frozen=True)
class Case:
    """One point of the supported matrix."""

    stage: int = 1
    precision: str = "fp32"
    tensor: int = 1
    accumulation: int = 1
    micro_batch: int = 2
    offload: bool = False
    recompute: Recompute = "none"


def allow_fp16_on_cpu() -> None:
    """torch computes in fp16 on any CPU; DeepSpeed 0.19.8 asks oneDNN for fast kernels, which few have, and refuses."""
    type(get_accelerator()).is_fp16_supported = lambda self: True


def deepspeed_settings(case: Case) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": case.micro_batch,
        "gradient_accumulation_steps": case.accumulation,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": case.stage, "reduce_bucket_size": 10_000_000},
        "steps_per_print": 10**9,
    }
    if case.stage == 3:
        settings["zero_optimization"] |= RELEASING
    if case.offload:
        settings["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
        settings["zero_force_ds_cpu_optimizer"] = False
    if case.precision == "bf16":
        settings["bf16"] = {"enabled": True}
    if case.precision == "fp16":
        allow_fp16_on_cpu()
        settings["fp16"] = {"enabled": True, "initial_scale_power": 12}
    return settings


class SmallRun:
    """A model, its engine, and text that does not depend on the layout."""

    def __init__(self, config: ModelConfig, ranks: Mapping[str, int], case: Case) -> None:
        if not parallel_state.model_parallel_is_initialized():
            initialize_process_groups(case.tensor)
        self.config, self.case, self.step = config, case, 0
        self.engine = self.new_engine(build_model(config, ranks, seed=1, recompute=case.recompute))

    def new_engine(self, model: EspalierModel) -> DeepSpeedEngine:
        return build_engine(model, OPTIMIZER, deepspeed_settings(self.case))

    def train(self, steps: int) -> list[tuple[float, float]]:
        """Loss and gradient norm of each step."""
        return [self._train_step() for _ in range(steps)]

    def _train_step(self) -> tuple[float, float]:
        case, model = self.case, self.engine.module
        sequences = case.micro_batch * case.accumulation * data_size()
        generator = torch.Generator().manual_seed(100 + self.step)
        shape = (sequences, self.config.sequence_length + 1)
        text = torch.randint(0, self.config.vocabulary, shape, generator=generator)
        total, norm = torch.zeros(()), 0.0
        for micro_step in range(case.accumulation):
            model.dropout_counter.step, model.dropout_counter.micro_step = self.step, micro_step
            first = (micro_step * data_size() + data_index()) * case.micro_batch
            piece = text[first : first + case.micro_batch]
            self.engine.set_gradient_accumulation_boundary(micro_step == case.accumulation - 1)
            set_learning_rate(self.engine, OPTIMIZER.learning_rate)
            tokens, labels = piece[:, :-1].contiguous(), piece[:, 1:].contiguous()
            loss = self.engine(tokens, positions_of(tokens), None, labels=labels).mean()
            self.engine.backward(loss)
            if case.stage == 0 and micro_step == case.accumulation - 1:
                norm = gradient_norm(self.engine)
            self.engine.step()
            total += loss.detach().float()
        dist.all_reduce(total, group=data_group())
        self.step += 1
        mean = float(total) / (case.accumulation * data_size())
        return mean, norm if case.stage == 0 else gradient_norm(self.engine)

    def grow(self, ranks: Mapping[str, int], directions: Mapping[str, Tensor] | None = None) -> None:
        """`directions`: as `change_ranks` takes them."""
        model = self.engine.module
        growing = [name for name, rank in ranks.items() if rank >= model.ranks()[name]]
        plan = RankPlan(self.step, dict(ranks), row_norms(model, growing))
        self.engine, _ = change_ranks(
            self.engine, plan, rebuild=self.new_engine, seed=1, consumed_samples=0, directions=directions
        )

    def logical_state(self) -> dict[str, dict[str, Tensor]]:
        """Whole masters and moments by key and name; frozen parameters have a master alone."""
        model = self.engine.module
        shards = whole_states(self.engine)
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                with gathered([parameter]):
                    shards[name] = {"master": parameter.detach().float().clone()}
        return {key: gather_logical(model, {n: s[key] for n, s in shards.items() if key in s}) for key in KEYS}

    def owned_bytes(self) -> dict[str, int]:
        """Bytes of parameters, and of masters and moments, that this process holds."""
        state = optimizer_state(self.engine)
        tensors: dict[int, int] = {}
        for fragment in state.fragments():
            storage = fragment.values.untyped_storage()
            tensors[storage.data_ptr()] = storage.nbytes()
        return {
            "parameters": sum(held(p)[1].numel() * p.element_size() for p in self.engine.module.parameters()),
            "state": sum(tensors.values()),
        }


def gradient_norm(engine: DeepSpeedEngine) -> float:
    """Global gradient norm before clipping, of the coming step (ZeRO 0) or of the last one (ZeRO 1 to 3).

    DeepSpeed 0.19.8 computes none at stage 0, so it is computed here. Call it between backward and step: a collective.
    """
    if engine.zero_optimization_stage() > 0:
        return float(engine.get_global_grad_norm())
    return float(norm_of(sum_over_processes(squared_norm(engine))))


def whole_states(engine: DeepSpeedEngine) -> dict[str, dict[str, Tensor]]:
    """Every trained parameter's shard of masters and moments, on all data-parallel processes."""
    with Stash(engine, growth=1.0) as stash:
        names = engine.module.trained_parameters()
        return {name: {key: stash.take(name, key) for key in KEYS} for name in names}


def uniform_ranks(config: ModelConfig, rank: int) -> dict[str, int]:
    return {projection.name: rank for projection in factored_projections(config)}


def live_engines() -> int:
    """Engines, and what ZeRO 3 makes one of for each of its own."""
    gc.collect()
    kinds = (DeepSpeedEngine, PartitionedParameterCoordinator)
    things = gc.get_objects()
    return max(sum(isinstance(thing, kind) for thing in things) for kind in kinds)
