"""Spectra of all layers, each computed on one process, against plain singular values of whole products."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from model.config import factored_projections
from model.gpt import build_model, tensor_layouts
from model.initialization import generator_for
from model.process_groups import initialize_process_groups, tensor_index, tensor_size
from model.spectrum import Grams, singular_values
from pretrain.growth import spectra
from pretrain.growth.spectra import Solver, measure_spectra, measure_updates, row_norms
from tests.support.distributed import run
from tests.support.parallel_engine import Case, SmallRun, uniform_ranks
from tests.support.parallel_model import gather_logical, small_config

Spectra = dict[str, Tensor]
START_RANK = 3


def _measured(tensor: int, parametrization: str) -> tuple[Spectra, Spectra, Spectra, Spectra, int]:
    """Measured spectra of products and of updates, both again from whole matrices, and how many eigenproblems this
    process solved."""
    initialize_process_groups(tensor)
    # Six layers, so that the last round over four processes is not full; each has another rank.
    config = small_config("llama", parametrization, "mlp", layers=3)
    ranks = {projection.name: 4 + place for place, projection in enumerate(factored_projections(config))}
    model = build_model(config, ranks, seed=1)
    layouts = tensor_layouts(model)
    start: dict[str, dict[str, Tensor]] = {}
    with torch.no_grad():
        for name, layer in model.factored_layers().items():
            start[name] = {"A": layer.A[:START_RANK].clone(), "B": layer.B[:, :START_RANK].clone()}
            for side in "AB":
                key = f"{name}.{side}"
                full = torch.randn(layouts[key].full_shape, generator=generator_for(3, key))
                getattr(layer, side).copy_(layouts[key].shard(full, tensor_index(), tensor_size()))
    solved = 0

    def counted(products: Sequence[Grams]) -> list[Tensor]:
        nonlocal solved
        solved += len(products)
        return singular_values(products)

    spectra.singular_values = counted
    try:
        products = measure_spectra(model)
        updates = measure_updates(model, {name: (both["A"], both["B"]) for name, both in start.items()})
    finally:
        spectra.singular_values = singular_values
    whole = gather_logical(model, {name: parameter.detach() for name, parameter in model.named_parameters()})
    plain, plain_updates = {}, {}
    for name, rank in ranks.items():
        pieces = {f"{name}.{side}": start[name][side] for side in "AB"}
        first = gather_logical(model, pieces)
        product = whole[f"{name}.B"].double() @ whole[f"{name}.A"].double()
        update = product - first[f"{name}.B"].double() @ first[f"{name}.A"].double()
        plain[name] = torch.linalg.svdvals(product)[:rank]
        plain_updates[name] = torch.linalg.svdvals(update)[: rank + START_RANK]
    return products, updates, plain, plain_updates, solved


@pytest.mark.parametrize(
    ("processes", "tensor", "parametrization"),
    [
        (1, 1, "factored"),
        (2, 1, "factored"),
        (2, 2, "additive"),
        (4, 2, "factored"),
        (4, 2, "additive"),
        (4, 1, "factored"),
    ],
)
def test_every_process_knows_all_values_and_computes_its_share(
    processes: int, tensor: int, parametrization: str
) -> None:
    everyone = run(_measured, processes, tensor, parametrization)
    products, updates, plain, plain_updates, _ = everyone[0]
    assert products.keys() == plain.keys()
    for found, expected in ((products, plain), (updates, plain_updates)):
        for name, values in expected.items():
            assert found[name].shape == values.shape
            assert torch.allclose(found[name], values, rtol=1e-6, atol=1e-7 * float(values[0])), name
    for other_products, other_updates, _, _, solved in everyone:
        assert all(torch.equal(other_products[name], values) for name, values in products.items())
        assert all(torch.equal(other_updates[name], values) for name, values in updates.items())
        assert solved in {2 * (6 // processes), 2 * -(-6 // processes)}
    assert sum(result[-1] for result in everyone) == 2 * 6


def _norms(tensor: int, stage: int, parametrization: str) -> tuple[dict[str, float], dict[str, float]]:
    """Norms of rows as measured, and from whole factors."""
    config = small_config("llama", parametrization)
    small = SmallRun(config, uniform_ranks(config, 4), Case(stage=stage, tensor=tensor))
    names = list(small.engine.module.ranks())[1:]
    found = row_norms(small.engine.module, names)
    masters = small.logical_state()["master"]
    return found, {name: float(masters[f"{name}.A"].norm(dim=1).square().mean().sqrt()) for name in names}


@pytest.mark.parametrize(
    ("processes", "tensor", "stage", "parametrization"),
    [(1, 1, 0, "factored"), (2, 1, 1, "factored"), (4, 2, 3, "factored"), (2, 2, 1, "additive")],
)
def test_row_norms_are_those_of_whole_factors(processes: int, tensor: int, stage: int, parametrization: str) -> None:
    everyone = run(_norms, processes, tensor, stage, parametrization)
    for found, expected in everyone:
        assert found == everyone[0][0]
        assert found == pytest.approx(expected, rel=1e-5)


def _batches() -> list[int]:
    initialize_process_groups(1)
    config = small_config("llama", "factored", "mlp", layers=3)
    model = build_model(config, {projection.name: 4 for projection in factored_projections(config)}, seed=1)
    sizes: list[int] = []

    def counted(products: Sequence[Grams]) -> list[Tensor]:
        sizes.append(len(products))
        return singular_values(products)

    spectra.singular_values = counted
    largest = max(parameter.numel() for parameter in model.parameters())
    rank = int((12 * largest / (3 * 8 * 8)) ** 0.5) + 1  # three of its problems fill a batch
    try:
        solver = Solver(model)
        for number in range(7):
            solver.add(str(number), Grams(*(torch.eye(rank, dtype=torch.float64) for _ in "AB")))
        assert list(solver.solve()) == [str(number) for number in range(7)]
        measure_spectra(model)
    finally:
        spectra.singular_values = singular_values
    return sizes


def test_a_batch_holds_what_memory_allows() -> None:
    assert run(_batches, 1)[0] == [3, 3, 1, 6]
