"""The augmentation event: ranks change in mid-run, under ZeRO partitioning, and nothing that was learned is lost.

ZeRO flattens parameters into partitions when an engine is built, and no shape can change under it. So an event is:

    measure → decide (process 0) → agree → stash masters and moments → tear the engine down → grow the factors →
    build a new engine → put masters and moments back, one parameter at a time → verify → go on

Growth preserves the function: a new row of A is a random direction orthogonal to the other new ones, as long as the
rows A has, and the new column of B is zero. Moments of new entries are zero, Adam's step count is kept.
"""

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor

from model.config import factored_projections
from model.gpt import EspalierModel
from model.initialization import new_directions
from model.process_groups import device, tensor_index, tensor_size
from model.sharding import TensorLayout
from model.spectrum import grams, row_norm, singular_values
from pretrain.engine import release_free_memory, tear_down
from pretrain.errors import NumericalError
from pretrain.optimizer_state import gather, optimizer_state, stash
from pretrain.policies import LayerMeasurement, Policy, RankConfig, limit_growth

# How far logits of the fixed batch may move, relative to the largest: products with zero columns change the order of
# summation at most, and what that does depends on the precision.
_LOGIT_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class GrowthPlan:
    """What an event does: new ranks and the norm of new rows, by `Projection.name`; layers that stay are left out."""

    step: int
    ranks: dict[str, int]
    row_norms: dict[str, float]


@dataclass(frozen=True)
class GrowthRecord:
    """What an event did: ranks of the layers that grew, and how long training stood still."""

    step: int
    before: dict[str, int]
    after: dict[str, int]
    seconds: float


@torch.no_grad()
def measure_spectra(model: EspalierModel) -> dict[str, Tensor]:
    """Singular values `(rank,)` of every factored layer, largest first; a collective over the tensor-parallel group."""
    return {name: singular_values(grams(layer.A, layer.B)).cpu() for name, layer in model.factored_layers().items()}


def layer_measurements(model: EspalierModel, spectra: Mapping[str, Tensor]) -> list[LayerMeasurement]:
    """What policies are given; without a spectrum a layer has an empty one."""
    ranks = model.ranks()
    return [
        LayerMeasurement(p, ranks[p.name], spectra.get(p.name, torch.empty(0)).numpy())
        for p in factored_projections(model.model_config)
    ]


def plan_growth(
    model: EspalierModel, policy: Policy, rank: RankConfig, step: int, spectra: Mapping[str, Tensor]
) -> GrowthPlan | None:
    """Process 0's decision from the reduced `spectra` (empty if the policy needs none), the same for all; a
    collective."""
    layers = layer_measurements(model, spectra)
    decision = [limit_growth(policy.targets(step, layers), layers, rank, step) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(decision, src=0)
    ranks = decision[0]
    if not ranks:
        return None
    factors = model.factored_layers()
    norms = [{name: row_norm(factors[name].A) for name in ranks}]
    dist.broadcast_object_list(norms, src=0)
    return GrowthPlan(step, ranks, norms[0])


def augment(
    engine: DeepSpeedEngine,
    plan: GrowthPlan,
    *,
    rebuild: Callable[[EspalierModel], DeepSpeedEngine],
    seed: int,
) -> tuple[DeepSpeedEngine, GrowthRecord]:
    """Carries a plan out and returns the new engine; `engine` is gone afterwards. All processes call it together.

    Raises NumericalError when the logits are not finite before it, RuntimeError when processes disagree about the plan,
    or when the logits are not what they were.
    """
    start = time.perf_counter()
    model: EspalierModel = engine.module
    before = model.ranks()
    _agree_on(plan, before)
    expected = _fixed_batch_logits(engine)
    _refuse_non_finite(expected, plan.step)
    state = optimizer_state(engine)
    kept, counters = stash(state), state.counters()
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    del state
    tear_down(engine)
    for name, new_rank in plan.ranks.items():
        _grow_layer(model, name, new_rank, plan, seed)
    engine = rebuild(model)
    state = optimizer_state(engine)
    for name, parameter in model.named_parameters():
        shard = gather(kept.pop(name, []), shapes[name], parameter.device)
        state.load(name, _extended(name, shard, plan, seed))
    state.finish_loading()
    state.load_counters(counters)
    _check_logits(expected, _fixed_batch_logits(engine))
    release_free_memory()
    changed = {name: before[name] for name in plan.ranks}
    return engine, GrowthRecord(plan.step, changed, plan.ranks, time.perf_counter() - start)


def _agree_on(plan: GrowthPlan, present: Mapping[str, int]) -> None:
    text = json.dumps([asdict(plan), dict(present)], sort_keys=True)
    digests: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(digests, hashlib.sha256(text.encode()).hexdigest())
    if len(set(digests)) > 1:
        raise RuntimeError(f"processes disagree about the growth at step {plan.step}: {digests}")


def _new_rows(name: str, count: int, plan: GrowthPlan, width: int, seed: int) -> Tensor:
    """This process's columns of the new rows of A, `(count, in/tp)`."""
    full = new_directions(name, plan.step, count, width * tensor_size(), plan.row_norms[name], seed)
    return TensorLayout(tuple(full.shape), dim=1).shard(full, tensor_index(), tensor_size())


def _grow_layer(model: EspalierModel, name: str, new_rank: int, plan: GrowthPlan, seed: int) -> None:
    layer = model.factored_layers()[name]
    A, B = layer.A.detach(), layer.B.detach()
    added = new_rank - layer.rank
    rows = _new_rows(name, added, plan, A.shape[1], seed).to(A)
    layer.set_factors(torch.cat([A, rows]), torch.cat([B, B.new_zeros(B.shape[0], added)], dim=1))


def _extended(parameter: str, shard: dict[str, Tensor], plan: GrowthPlan, seed: int) -> dict[str, Tensor]:
    """The states of one parameter at its new size: new rows in A's master, zeros everywhere else."""
    name, _, side = parameter.rpartition(".")
    if name not in plan.ranks or side not in ("A", "B"):
        return shard
    dim = 0 if side == "A" else 1
    master = shard["master"]
    added = plan.ranks[name] - master.shape[dim]
    size = (added, master.shape[1]) if side == "A" else (master.shape[0], added)
    new = {key: values.new_zeros(size) for key, values in shard.items()}
    if side == "A":
        new["master"] = _new_rows(name, added, plan, master.shape[1], seed).to(master)
    return {key: torch.cat([shard[key], new[key]], dim=dim) for key in shard}


@torch.no_grad()
def _fixed_batch_logits(engine: DeepSpeedEngine) -> Tensor:
    """Logits of one short sequence that never changes; dropout off."""
    config = engine.module.model_config
    positions = torch.arange(min(config.sequence_length, 32), device=device()).unsqueeze(0)
    tokens = (positions * 7919 + 17) % config.vocabulary
    engine.eval()
    logits = engine(tokens, positions, None)
    engine.train()
    return logits


def _refuse_non_finite(logits: Tensor, step: int) -> None:
    """A model that has diverged has no function to preserve."""
    finite = logits.isfinite().all().int()
    dist.all_reduce(finite, op=dist.ReduceOp.MIN)
    if not finite:
        error = NumericalError(f"the model's logits are not finite at step {step}: lower optimizer.learning_rate")
        error.agreed = True
        raise error


def _check_logits(expected: Tensor, found: Tensor) -> None:
    change = (found.float() - expected.float()).abs().max() / expected.float().abs().max()
    change = change.nan_to_num(nan=torch.inf)  # which a maximum would lose
    dist.all_reduce(change, op=dist.ReduceOp.MAX)  # so that all processes go on, or none
    difference = float(change)
    tolerance = _LOGIT_TOLERANCE[expected.dtype]
    if not difference <= tolerance:
        raise RuntimeError(
            f"growth changed the logits of a fixed batch by {difference:.1e} of their scale, more than {tolerance:.0e}"
        )
