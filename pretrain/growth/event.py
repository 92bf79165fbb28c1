"""The growth event: ranks change in mid-run, under ZeRO partitioning, and nothing that was learned is lost.

ZeRO flattens parameters into partitions when an engine is built, and no shape can change under it. So an event is:

    measure → decide (process 0) → agree → stash masters and moments → tear the engine down → change the factors →
    build a new engine → put masters and moments back, one state at a time → verify → go on

Growth preserves the function: new rows of A are orthogonal to each other, as long as the rows A has, along the measured
gradient or random, and new columns of B are zero. Moments of new entries are zero, Adam's step count is kept.

A rank shrinks in the balanced basis of `model/factor_algebra.py`, B' = B T and A' = T⁻¹ A, by cutting the directions
with the smallest singular values. First moments are gradients' averages and follow exactly,

    m_B' = m_B T⁻ᵀ,    m_A' = Tᵀ m_A,

while second moments go as if entries were independent, v_B' = v_B (T⁻ᵀ)∘² and v_A' = (Tᵀ)∘² v_A.
"""

import hashlib
import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor

from model.config import factored_projections
from model.factor_algebra import BasisChange, balanced_basis, in_order_orthonormal, is_sharded, outside
from model.gpt import EspalierModel, LayerWithFactors
from model.initialization import new_directions
from model.process_groups import device, tensor_index, tensor_size
from model.sharding import TensorLayout
from model.spectrum import grams
from pretrain.checkpoint.format import KEYS
from pretrain.devices import synchronize
from pretrain.distributed import is_first_process
from pretrain.engine.build import evaluating, release_free_memory, tear_down
from pretrain.engine.optimizer_state import optimizer_state
from pretrain.engine.zero3 import gathered, replace_factors, shape_of
from pretrain.errors import agreed
from pretrain.growth.probe import Demand
from pretrain.growth.spectra import row_norms
from pretrain.growth.stash import Stash, host_copy
from pretrain.policies.limits import decide_ranks
from pretrain.policies.policy import LayerMeasurement, Policy, RankConfig
from pretrain.resilience import heartbeat
from pretrain.train_state import GrowthRecord


@dataclass(frozen=True)
class _Tolerance:
    """How far logits of the fixed batch may move, relative to the largest."""

    expected: float
    """Above it there is a warning."""
    limit: float
    """Above it the run ends."""


# Products with zero columns change the order of summation at most. In random models of 24 layers other orders moved
# logits by up to 1.5e-6 in fp32, 3.5e-3 in fp16 and 2.9e-2 in bf16 (directions permuted, products summed as two rounded
# halves); a tensor out of place moves them by about 1. In fp32 nothing lies between the two.
_LOGIT_TOLERANCE = {
    torch.float32: _Tolerance(1e-4, 1e-4),
    torch.bfloat16: _Tolerance(3e-2, 15e-2),
    torch.float16: _Tolerance(1e-2, 5e-2),
}


@dataclass(frozen=True)
class RankMeasurement:
    """What a policy asked for, by `Projection.name`; what it did not need is empty."""

    product: Mapping[str, Tensor] = field(default_factory=dict)
    update: Mapping[str, Tensor] = field(default_factory=dict)
    demand: Mapping[str, Demand] = field(default_factory=dict)


@dataclass(frozen=True)
class RankPlan:
    """What a growth event does: new ranks, higher or lower, and the norm of new rows where they grow, by
    `Projection.name`; layers that stay are left out."""

    step: int
    ranks: dict[str, int]
    row_norms: dict[str, float]


def layer_measurements(model: EspalierModel, measured: RankMeasurement) -> list[LayerMeasurement]:
    """What policies are given."""
    ranks = model.ranks()
    return [
        LayerMeasurement(
            projection,
            ranks[projection.name],
            singular_values=measured.product.get(projection.name, torch.empty(0)).numpy(),
            update_values=measured.update.get(projection.name, torch.empty(0)).numpy(),
            demand=measured.demand[projection.name].energies.cpu().numpy() if measured.demand else np.empty(0),
        )
        for projection in factored_projections(model.model_config)
    ]


def plan_ranks(
    model: EspalierModel,
    policy: Policy,
    rank: RankConfig,
    step: int,
    measured: RankMeasurement,
    affordable: int | None = None,
) -> RankPlan | None:
    """Process 0's decision from the reduced measurements, the same for all; a collective.

    `affordable`: parameters that all factored layers together may have after the event; None: any number.
    """
    layers = layer_measurements(model, measured)
    decision = [decide_ranks(policy, rank, step, layers, affordable) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(decision, src=0)
    ranks = decision[0]
    if not ranks:
        return None
    present = model.ranks()
    return RankPlan(step, ranks, row_norms(model, [name for name in ranks if ranks[name] > present[name]]))


def change_ranks(
    engine: DeepSpeedEngine,
    plan: RankPlan,
    *,
    rebuild: Callable[[EspalierModel], DeepSpeedEngine],
    seed: int,
    consumed_samples: int,
    directions: Mapping[str, Tensor] | None = None,
) -> tuple[DeepSpeedEngine, GrowthRecord]:
    """Carries a plan out and returns the new engine; `engine` is gone afterwards. All processes call it together.

    `directions`: orthonormal `(any, in/tp)` rows by layer that come first among the new rows of A; `consumed_samples`:
    sequences trained on so far, for the record.

    Raises NumericalError when the logits are not finite before it or processes disagree about the plan, and
    RuntimeError when the logits are not what they were.
    """
    synchronize()  # what the steps before left to do, and failed to, is not the event's
    start = time.perf_counter()
    model: EspalierModel = engine.module
    before = model.ranks()
    _agree_on(plan, before)
    expected = _fixed_batch_logits(engine)
    _refuse_non_finite(expected, plan.step)
    changes = _factor_changes(model, plan, directions or {}, seed)
    with Stash(engine, _size_ratio(model, plan)) as stash:
        heartbeat.at("event.stashed", plan.step)
        tear_down(engine)
        for name, change in changes.items():
            _change_factors(model.factored_layers()[name], change)
        heartbeat.at("event.changed")
        release_free_memory()  # the new engine's tensors are as large as the old one's, and fit into no hole between
        engine = rebuild(model)
        heartbeat.at("event.rebuilt")
        state = optimizer_state(engine)
        for name in model.trained_parameters():
            for key in KEYS:
                state.load(name, {key: _changed_state(name, key, stash.take(name, key), changes)})
        state.finish_loading()
        state.load_counters(stash.counters)
    heartbeat.at("event.restored")
    moved = None
    if all(isinstance(change, _Growth) for change in changes.values()):  # cutting directions does change the function
        moved = _check_logits(expected, _fixed_batch_logits(engine))
    release_free_memory()
    changed = {name: before[name] for name in plan.ranks}
    return engine, GrowthRecord(plan.step, consumed_samples, changed, plan.ranks, time.perf_counter() - start, moved)


def _size_ratio(model: EspalierModel, plan: RankPlan) -> float:
    """Trained parameters after the event, as a multiple of those before."""
    numbers = sum(shape_of(parameter).numel() for parameter in model.trained_parameters().values())
    layers = model.factored_layers()
    added = sum(
        (rank - layers[name].rank) * (shape_of(layers[name].A)[1] + shape_of(layers[name].B)[0])
        for name, rank in plan.ranks.items()
    )
    return (numbers + added) / numbers


def _agree_on(plan: RankPlan, present: Mapping[str, int]) -> None:
    text = json.dumps([asdict(plan), dict(present)], sort_keys=True)
    digests: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(digests, hashlib.sha256(text.encode()).hexdigest())
    if len(set(digests)) > 1:
        raise agreed(
            f"processes disagree about the growth at step {plan.step}, and should decide the same: a fault of memory "
            "or of the code; start the run again to go on from its newest checkpoint"
        )


def _change_factors(layer: LayerWithFactors, change: "_Growth | _Truncation") -> None:
    with gathered([layer.A, layer.B]):
        A, B = change.of_A(layer.A.detach(), "master"), change.of_B(layer.B.detach(), "master")
    replace_factors(layer, A, B)


class _Growth:
    """Appends rows to A, which wait in host memory, and zero columns to B."""

    def __init__(self, rows: Tensor) -> None:
        self._rows = host_copy(rows)

    def of_A(self, tensor: Tensor, key: str) -> Tensor:
        """`tensor (rank, in/tp)`: A itself or its state `key`."""
        new = self._rows.to(tensor, non_blocking=True) if key == "master" else tensor.new_zeros(self._rows.shape)
        return torch.cat([tensor, new])

    def of_B(self, tensor: Tensor, key: str) -> Tensor:
        """`tensor (out/tp, rank)`: B itself or its state `key`."""
        return torch.cat([tensor, tensor.new_zeros(tensor.shape[0], len(self._rows))], dim=1)


class _Truncation:
    """Turns both factors into the balanced basis and keeps its first directions."""

    def __init__(self, basis: BasisChange) -> None:
        forward, inverse = basis.forward, basis.inverse
        self._of_A = {"master": inverse, "exp_avg": forward.t(), "exp_avg_sq": forward.t().square()}
        self._of_B = {"master": forward, "exp_avg": inverse.t(), "exp_avg_sq": inverse.t().square()}

    def of_A(self, tensor: Tensor, key: str) -> Tensor:
        """`tensor (rank, in/tp)`: A itself or its state `key`."""
        return (self._of_A[key] @ tensor.double()).to(tensor)

    def of_B(self, tensor: Tensor, key: str) -> Tensor:
        """`tensor (out/tp, rank)`: B itself or its state `key`."""
        return (tensor.double() @ self._of_B[key]).to(tensor)


@torch.no_grad()
def _factor_changes(
    model: EspalierModel, plan: RankPlan, directions: Mapping[str, Tensor], seed: int
) -> dict[str, _Growth | _Truncation]:
    """What happens to each layer, by name; a collective."""
    changes: dict[str, _Growth | _Truncation] = {}
    for name, layer in model.factored_layers().items():
        new_rank = plan.ranks.get(name, layer.rank)
        if name in plan.row_norms:
            changes[name] = _Growth(_new_rows(name, layer, new_rank - layer.rank, plan, directions.get(name), seed))
        elif new_rank < layer.rank:
            with gathered([layer.A, layer.B]):
                both = grams(layer.A, layer.B)
            basis = balanced_basis(both.of_A, both.of_B, new_rank)
            for matrix in (basis.forward, basis.inverse):  # the same to the last bit on every process
                dist.broadcast(matrix, src=0)
            changes[name] = _Truncation(basis)
    return changes


def _new_rows(
    name: str, layer: LayerWithFactors, count: int, plan: RankPlan, directed: Tensor | None, seed: int
) -> Tensor:
    """This process's columns of the new rows of A, `(count, in/tp)`: the directed ones first."""
    norm, sharded = plan.row_norms[name], is_sharded(layer.A)
    full = new_directions(name, plan.step, count, layer.input_size, norm, seed, layer.A.device)
    layout = TensorLayout(tuple(full.shape), dim=1 if sharded else None)
    random = layout.shard(full, tensor_index(), tensor_size())
    if directed is None or not len(directed):
        return random
    first = directed[:count].to(random)
    rest = in_order_orthonormal(outside(random[len(first) :].t(), first.t(), sharded), sharded).t().to(random)
    return norm * torch.cat([first, rest])


def _changed_state(parameter: str, key: str, values: Tensor, changes: Mapping[str, _Growth | _Truncation]) -> Tensor:
    """One state of one parameter after the event."""
    name, _, side = parameter.rpartition(".")
    if name not in changes or side not in ("A", "B"):
        return values
    change = changes[name]
    return change.of_A(values, key) if side == "A" else change.of_B(values, key)


@torch.no_grad()
def _fixed_batch_logits(engine: DeepSpeedEngine) -> Tensor:
    """Logits of one short sequence that never changes; dropout off."""
    config = engine.module.model_config
    positions = torch.arange(min(config.sequence_length, 32), device=device()).unsqueeze(0)
    tokens = (positions * 7919 + 17) % config.vocabulary
    with evaluating(engine):
        return engine(tokens, positions, None)


def _refuse_non_finite(logits: Tensor, step: int) -> None:
    """A model that has diverged has no function to preserve."""
    finite = logits.isfinite().all().int()
    dist.all_reduce(finite, op=dist.ReduceOp.MIN)
    if not finite:
        raise agreed(f"the model's logits are not finite at step {step}: lower optimizer.learning_rate")


def _check_logits(expected: Tensor, found: Tensor) -> float:
    """The largest change over all processes; RuntimeError where it is none that rounding can explain."""
    change = (found.float() - expected.float()).abs().max() / expected.float().abs().max()
    change = change.nan_to_num(nan=torch.inf)  # which a maximum would lose
    dist.all_reduce(change, op=dist.ReduceOp.MAX)  # so that all processes go on, or none
    tf32 = expected.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    # As many digits as fp16 has.
    difference, tolerance = float(change), _LOGIT_TOLERANCE[torch.float16 if tf32 else expected.dtype]
    changed = f"growth changed the logits of a fixed batch by {difference:.1e} of their scale, more than"
    if not difference <= tolerance.limit:
        raise RuntimeError(f"{changed} {tolerance.limit:.0e}")
    if difference > tolerance.expected and is_first_process():
        print(f"warning: {changed} the {tolerance.expected:.0e} that rounding usually does", file=sys.stderr)
    return difference
