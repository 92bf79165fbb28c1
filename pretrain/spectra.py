"""Singular values of all factored layers: each layer's on one process, and then all of them on all.

Layer k is the business of the data-parallel processes with index k mod (data-parallel size): the tensor-parallel group
of each sums the Gram matrices of its shards, and one process of the group takes the eigenvalues. Layers go in rounds of
as many as there are processes, so each holds two rank x rank matrices at a time and all of them are busy. Every value
has one writer and zeros from all others, so one sum over all processes brings it everywhere, the same to the last bit.
"""

from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from model.gpt import EspalierModel
from model.process_groups import data_index, data_size, device, tensor_index, tensor_size
from model.spectrum import Grams, grams, singular_values, update_grams
from pretrain.partitioned import gathered


def measure_spectra(model: EspalierModel) -> dict[str, Tensor]:
    """Singular values `(rank,)` of every factored layer, largest first; a collective."""
    return _spread(model, model.ranks(), lambda _, A, B: grams(A, B))


def measure_updates(model: EspalierModel, initial: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Singular values of every layer's cumulative update B·A - B₀·A₀, largest first; `initial` holds this process's A₀
    and B₀. A collective."""
    sizes = {name: rank + len(initial[name][0]) for name, rank in model.ranks().items()}
    return _spread(model, sizes, lambda name, A, B: update_grams(A, B, *initial[name]))


@torch.no_grad()
def _spread(
    model: EspalierModel, sizes: Mapping[str, int], grams_of: Callable[[str, Tensor, Tensor], Grams]
) -> dict[str, Tensor]:
    """`sizes[name]` singular values of what `grams_of` gives for each layer's A and B."""
    layers = model.factored_layers()
    if not layers:  # a dense model
        return {}
    names, round_size = list(layers), data_size() * tensor_size()
    found = {name: torch.zeros(sizes[name], dtype=torch.float64, device=device()) for name in names}
    for start in range(0, len(names), round_size):
        mine: tuple[str, Grams] | None = None
        for place, name in enumerate(names[start : start + round_size]):
            # The one place that takes a layer's factors; all data-parallel processes pass it for every layer.
            A, B = layers[name].A, layers[name].B
            with gathered([A, B]):
                if place % data_size() == data_index():
                    product = grams_of(name, A, B)
                    if place // data_size() == tensor_index():
                        mine = name, product
        if mine is not None:
            name, product = mine
            found[name].copy_(singular_values(product))
    everything = torch.cat(list(found.values()))
    dist.all_reduce(everything)
    return dict(zip(names, everything.cpu().split([sizes[name] for name in names]), strict=True))
