"""Singular values of all factored layers: each layer's on one process, and then all of them on all.

Layer k is the business of the data-parallel processes with index k mod (data-parallel size): the tensor-parallel group
of each sums the Gram matrices of its shards, and one process of the group takes the eigenvalues. Layers go in rounds of
as many as there are processes, so all of them are busy. What a process has to solve waits until it fills a batch: as
many layers as need no more memory than the masters and moments of the largest parameter, which an event may hold beside
the steady state. Every value has one writer and zeros from all others, so one sum over all processes brings it
everywhere, the same to the last bit.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from model.factor_algebra import is_sharded
from model.gpt import EspalierModel
from model.process_groups import data_index, data_size, device, tensor_index, tensor_size
from model.spectrum import SOLVER_MATRICES, Grams, grams, singular_values, update_grams
from pretrain.engine.zero3 import gathered, held, is_partitioned, shape_of


def measure_spectra(model: EspalierModel) -> dict[str, Tensor]:
    """Singular values `(rank,)` of every factored layer, largest first; a collective."""
    return _spread(model, model.ranks(), lambda _, A, B: grams(A, B))


def measure_updates(model: EspalierModel, initial: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Singular values of every layer's cumulative update B·A - B₀·A₀, largest first; `initial` holds this process's A₀
    and B₀. A collective."""
    sizes = {name: rank + len(initial[name][0]) for name, rank in model.ranks().items()}
    return _spread(model, sizes, lambda name, A, B: update_grams(A, B, *initial[name]))


class Solver:
    """Singular values of products by name, from Gram matrices that come one by one and are solved in batches."""

    def __init__(self, model: EspalierModel) -> None:
        self.found: dict[str, Tensor] = {}
        self._waiting: dict[str, Grams] = {}
        self._bytes = 0
        self._most_bytes = 12 * max(shape_of(parameter).numel() for parameter in model.parameters())

    def add(self, name: str, product: Grams) -> None:
        """Takes a product in, and solves those that wait once they fill a batch."""
        self._waiting[name] = product
        self._bytes += SOLVER_MATRICES * product.of_A.nbytes
        if self._bytes >= self._most_bytes:
            self.solve()

    def solve(self) -> dict[str, Tensor]:
        """All values found so far, those of the products that wait included."""
        names, products = list(self._waiting), list(self._waiting.values())
        self._waiting, self._bytes = {}, 0
        self.found |= zip(names, singular_values(products), strict=True)
        return self.found


@torch.no_grad()
def _spread(
    model: EspalierModel, sizes: Mapping[str, int], grams_of: Callable[[str, Tensor, Tensor], Grams]
) -> dict[str, Tensor]:
    """`sizes[name]` singular values of what `grams_of` gives for each layer's A and B."""
    layers = model.factored_layers()
    if not layers:  # a dense model
        return {}
    names, round_size, solver = list(layers), data_size() * tensor_size(), Solver(model)
    for start in range(0, len(names), round_size):
        for place, name in enumerate(names[start : start + round_size]):
            # The one place that takes a layer's factors; all data-parallel processes pass it for every layer.
            A, B = layers[name].A, layers[name].B
            with gathered([A, B]):
                if place % data_size() == data_index():
                    product = grams_of(name, A, B)
                    if place // data_size() == tensor_index():
                        solver.add(name, product)
    found = solver.solve()
    nothing = torch.zeros(max(sizes.values()), dtype=torch.float64, device=device())
    everything = torch.cat([found.get(name, nothing[: sizes[name]]) for name in names])
    dist.all_reduce(everything)
    return dict(zip(names, everything.cpu().split([sizes[name] for name in names]), strict=True))


@torch.no_grad()
def row_norms(model: EspalierModel, names: Sequence[str]) -> dict[str, float]:
    """Root mean squares of the norms of the full A's rows, the sizes of new rows, by name; a collective, and the same
    on all processes.

    Each adds the squares of what it holds, but for copies of what another one holds, and no A is gathered.
    """
    if not names:
        return {}
    layers, squares = model.factored_layers(), []
    for name in names:
        A = layers[name].A
        counts = (is_sharded(A) or tensor_index() == 0) and (is_partitioned(A) or data_index() == 0)
        squares.append(held(A)[1].double().square().sum() * int(counts))
    total = torch.stack(squares)
    dist.all_reduce(total)
    return {name: (square / layers[name].rank) ** 0.5 for name, square in zip(names, total.tolist(), strict=True)}
