"""Gradient probes: what the dense gradient asks for outside the spans of a layer's factors, without forming it.

For G = ∂L/∂W, added directions with A_new = Ωᵀ, B_new = 0 leave the output as it is, and the gradient of B_new is
exactly G Ω; with B_new = Q, A_new = 0 the gradient of A_new is Qᵀ G. The three training steps before a decision carry
such directions beside the factors (Halko, Martinsson, Tropp 2011, algorithm 4.3 with one power iteration):

    step 1   Y = G₁ Ω, Ω random          Q = orthonormal basis of Y outside the span of B
    step 2   R₂ = Qᵀ G₂                  step 3   R₃ = Qᵀ G₃

Outside the row space of A, the symmetric part of R₂ R₃ᵀ holds the energy that two independent batches agree on: its
eigenvalues are the layer's demand, and its eigenvectors lead to the right directions for new rows of A.

The directions are plain tensors: neither optimizer nor ZeRO knows them, so their gradients are averaged over data
parallelism and unscaled here. They ride in the bottleneck's own all-reduce. A checkpoint between two probed steps
carries what was measured so far (`tensors`), so that a resumed run decides alike.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from model.factor_algebra import in_order_orthonormal, is_sharded, orthonormal, outside, summed
from model.gpt import EspalierModel, LayerWithFactors, tensor_layouts
from model.initialization import generator_for, orthonormal_columns
from model.layers.factored_linear import Probe
from model.process_groups import data_group, data_size, tensor_group, tensor_index, tensor_size
from model.sharding import TensorLayout
from pretrain.engine.zero3 import gathered
from pretrain.policies.gradient import PROBED_STEPS


@dataclass(frozen=True)
class Demand:
    """New directions that one layer asks for."""

    energies: Tensor
    """`(<= k,)` agreed energy along each direction, largest first, fp64."""
    rows: Tensor
    """`(<= k, in/tp)` orthonormal directions outside the row space of A, this process's columns."""


class GradientProbe:
    """Measures in the training steps before each decision. `count`: directions per layer; `seed`: the run's."""

    def __init__(self, count: int, seed: int) -> None:
        self._count, self._seed = count, seed
        self._ranges: dict[str, Tensor] = {}
        self._first: dict[str, Tensor] = {}
        self._second: dict[str, Tensor] = {}

    @property
    def measuring(self) -> bool:
        """Whether something was measured for the coming decision."""
        return bool(self._ranges)

    def attach(self, model: EspalierModel, step: int, steps_left: int) -> None:
        """Attaches the probes, before the forward passes of training step `step`; `steps_left` (3, 2, 1) to the
        decision.

        A step measures nothing if the steps before it did not (settings were changed on resume).
        """
        if steps_left == PROBED_STEPS:
            self.forget()
        elif not self._ranges:
            return
        layouts = tensor_layouts(model)
        for name, layer in model.factored_layers().items():
            A = layer.A.new_zeros(self._layout(layouts, "first", name).shard_shape(tensor_size()))
            B = layer.B.new_zeros(self._layout(layouts, "range", name).shard_shape(tensor_size()))
            if steps_left == PROBED_STEPS:
                A.copy_(self._random_rows(name, layer, step))
                B.requires_grad_()
            else:
                B.copy_(self._ranges[name])
                A.requires_grad_()
            layer.probe = Probe(A, B)

    def collect(self, model: EspalierModel, loss_scale: float) -> None:
        """Takes the probes' gradients and removes the probes, after the last backward pass of the step; a
        collective."""
        for name, layer in model.factored_layers().items():
            probe = layer.probe
            if probe is None:
                return
            layer.probe = None
            sketched = probe.B if probe.B.requires_grad else probe.A
            assert sketched.grad is not None
            gradient = sketched.grad.float() / loss_scale
            if data_size() > 1:
                dist.all_reduce(gradient, group=data_group())
                gradient /= data_size()
            if probe.B.requires_grad:
                with gathered([layer.B]):
                    columns = outside(gradient.nan_to_num(), layer.B, is_sharded(layer.B))
                self._ranges[name] = orthonormal(columns, is_sharded(layer.B)).float()
            elif name in self._first:
                self._second[name] = gradient
            else:
                self._first[name] = gradient

    def demand(self, model: EspalierModel) -> dict[str, Demand]:
        """The demand of every layer, by name, from the last three steps; a collective. It is empty for a layer that was
        not measured, or whose gradient was not finite (a skipped step)."""
        found, layouts = {}, tensor_layouts(model)
        for name, layer in model.factored_layers().items():
            columns = self._layout(layouts, "first", name).shard_shape(tensor_size())[1]
            nothing = layer.A.new_zeros(0, columns, dtype=torch.float32)
            first, second = self._first.get(name, nothing), self._second.get(name, nothing)
            if len(first) != len(second):
                found[name] = _no_demand(first)
                continue
            with gathered([layer.A]):
                found[name] = _agreed_demand(first, second, layer)
        self.forget()
        return found

    def forget(self) -> None:
        """Drops what was measured."""
        self._ranges, self._first, self._second = {}, {}, {}

    def _random_rows(self, name: str, layer: LayerWithFactors, step: int) -> Tensor:
        generator = generator_for(self._seed, name, "probe", step)
        rows = orthonormal_columns(layer.input_size, self._count, generator, layer.A.device).t()
        layout = TensorLayout(tuple(rows.shape), dim=1 if is_sharded(layer.A) else None)
        return layout.shard(rows, tensor_index(), tensor_size())

    # Between two probed steps -----------------------------------------------------------------------------------------

    def tensors(self, model: EspalierModel) -> dict[str, Tensor]:
        """Whole tensors that were measured so far, by name; empty outside a measurement. A collective."""
        kept, layouts = {}, tensor_layouts(model)
        for kind, store in self._stores().items():
            for name, shard in store.items():
                shards = [torch.empty_like(shard) for _ in range(tensor_size())]
                dist.all_gather(shards, shard.contiguous(), group=tensor_group())
                kept[f"{kind}/{name}"] = self._layout(layouts, kind, name).unshard(shards).cpu().contiguous()
        return kept

    def load(self, model: EspalierModel, tensors: Mapping[str, Tensor]) -> None:
        """Restores what `tensors` gave; drops it if it was measured with another number of directions or another
        model."""
        device, stores, layers = next(model.parameters()).device, self._stores(), model.factored_layers()
        layouts = tensor_layouts(model)
        for key, tensor in tensors.items():
            kind, _, name = key.partition("/")
            layout = self._layout(layouts, kind, name) if kind in stores and name in layers else None
            if layout is None or tuple(tensor.shape) != layout.full_shape:
                self.forget()
                return
            stores[kind][name] = layout.shard(tensor, tensor_index(), tensor_size()).to(device)

    def _stores(self) -> dict[str, dict[str, Tensor]]:
        return {"range": self._ranges, "first": self._first, "second": self._second}

    def _layout(self, layouts: Mapping[str, TensorLayout], kind: str, name: str) -> TensorLayout:
        """Tensor layout of one kind of measured tensor of a layer, from the `layouts` of the model's parameters."""
        factor = layouts[f"{name}.{'B' if kind == 'range' else 'A'}"]
        rows, columns = factor.full_shape
        shape = (rows, self._count) if kind == "range" else (self._count, columns)
        return TensorLayout(shape, factor.dim, factor.stride)


def _no_demand(rows: Tensor) -> Demand:
    return Demand(rows.new_zeros(0, dtype=torch.float64), rows[:0])


def _agreed_demand(first: Tensor, second: Tensor, layer: LayerWithFactors) -> Demand:
    """The demand on which `first` and `second` agree, both Qᵀ G `(k, in/tp)` of independent batches; a collective.

    Another processor may return eigenvectors with other signs or in another order. Those of process 0 count, so that
    every shard and every copy of the model grows alike.
    """
    sharded = is_sharded(layer.A)
    both = torch.cat([first, second]).t()
    finite = both.isfinite().all().int()
    dist.all_reduce(finite, op=dist.ReduceOp.MIN)
    if not finite or not len(first):
        return _no_demand(first)
    outer = outside(both, layer.A.t(), sharded)
    one, other = outer.chunk(2, dim=1)
    agreed = summed(one.t() @ other, sharded)
    ascending, vectors = torch.linalg.eigh((agreed + agreed.t()) / 2)
    spectrum = torch.cat([vectors, ascending.unsqueeze(0)]).flip(1)
    dist.broadcast(spectrum, src=0)
    vectors, energies = spectrum[:-1], spectrum[-1]
    known = energies > 1e-9 * energies[0].clamp_min(0.0)
    if not known.any():
        return _no_demand(first)
    rows = in_order_orthonormal((one + other) @ vectors[:, known], sharded).t().to(first.dtype).contiguous()
    for group, copies in ((data_group(), data_size()), (tensor_group(), 1 if sharded else tensor_size())):
        if copies > 1:
            dist.broadcast(rows, src=dist.get_global_rank(group, 0), group=group)
    return Demand(energies[known], rows)
