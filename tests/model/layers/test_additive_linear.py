"""The additive layers: where they start, what travels, and what a probe measures on them."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model.config import ModelConfig, Projection, factored_projections
from model.gpt import build_model, tensor_layouts
from model.layers.factored_linear import Probe
from model.process_groups import initialize_process_groups, tensor_index, tensor_size
from tests.support.distributed import run
from tests.support.parallel_model import (
    counted_all_reduces,
    gather_logical,
    initial_tensors,
    load_logical,
    positions_of,
    small_config,
    some_tokens,
)
from tests.support.reference import random_tensors, reference_loss

RANK = 6


def _ranks(config: ModelConfig) -> dict[str, int]:
    return {projection.name: RANK for projection in factored_projections(config)}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_starts_as_the_dense_model_on_every_layout(family: str) -> None:
    config = small_config(family, "additive")
    dense = run(initial_tensors, 1, small_config(family, "dense"), {}, 1)[0]
    for processes in (1, 2, 4):
        found = run(initial_tensors, processes, config, _ranks(config), processes)[0]
        for name, tensor in found.items():
            if name.endswith(".A"):
                assert torch.allclose(tensor @ tensor.T, torch.eye(RANK), atol=1e-5)
            elif name.endswith(".B"):
                assert not tensor.any()
            else:
                assert torch.equal(tensor, dense[name]), name


# Collectives ----------------------------------------------------------------------------------------------------------


def _traffic(config: ModelConfig) -> tuple[Counter[int], Counter[int]]:
    initialize_process_groups(2)
    model = build_model(config, _ranks(config), seed=1)
    tokens, labels = some_tokens(config)
    with counted_all_reduces() as forward:
        loss = model(tokens, positions_of(tokens), None, labels=labels).mean()
    with counted_all_reduces() as backward:
        loss.backward()
    return forward, backward


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_no_collective_forward_and_one_of_a_factors_size_backward(family: str) -> None:
    """Against the dense model: nothing more forward; backward the whole factor of each layer, once."""
    config = small_config(family, "additive")
    dense_forward, dense_backward = run(_traffic, 2, small_config(family, "dense"))[0]
    forward, backward = run(_traffic, 2, config)[0]
    whole = Counter(RANK * (p.in_features if p.normed else p.out_features) for p in factored_projections(config))
    assert dense_forward.total() > 2 * config.layers
    assert forward == dense_forward
    assert backward == dense_backward + whole


# Probes ---------------------------------------------------------------------------------------------------------------


def _probed(config: ModelConfig, count: int) -> list[dict[str, Tensor]]:
    """Whole gradients of the zero factors of probes: of one step with B = 0, and of one with A = 0."""
    initialize_process_groups(2)
    model = build_model(config, _ranks(config), seed=1)
    load_logical(model, random_tensors(config, _ranks(config), seed=3))
    tokens, labels = some_tokens(config)
    layouts, gradients = tensor_layouts(model), []
    for zero in ("B", "A"):
        for projection in factored_projections(config):
            shards = {}
            for side, full in zip("AB", _directions(projection, count), strict=True):
                layout = replace(layouts[f"{projection.name}.{side}"], full_shape=tuple(full.shape))
                shards[side] = layout.shard(full, tensor_index(), tensor_size()).clone()
            shards[zero].zero_().requires_grad_()
            model.factored_layers()[projection.name].probe = Probe(shards["A"], shards["B"])
        model(tokens, positions_of(tokens), None, labels=labels).mean().backward()
        found = {f"{n}.{zero}": getattr(layer.probe, zero).grad for n, layer in model.factored_layers().items()}
        gradients.append(gather_logical(model, found))
    return gradients


def _directions(layer: Projection, count: int) -> tuple[Tensor, Tensor]:
    """`A (count, in)` and `B (out, count)` of a layer's probe."""
    generator = torch.Generator().manual_seed(layer.layer)
    A = torch.randn(count, layer.in_features, generator=generator)
    return A, torch.randn(layer.out_features, count, generator=generator)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_probes_sketch_the_dense_gradient(family: str) -> None:
    """The gradient of a probe's zero B is G Aᵀ, that of its zero A is Bᵀ G, with G the gradient of W0 + B A."""
    config, count = small_config(family, "additive"), 3
    leaves = {n: t.requires_grad_() for n, t in random_tensors(config, _ranks(config), seed=3).items()}
    reference_loss(config, _ranks(config), leaves, *some_tokens(config)).mean().backward()
    for of_B, of_A in run(_probed, 2, config, count):
        for projection in factored_projections(config):
            name = projection.name
            A, B = _directions(projection, count)
            G = leaves[f"{name}.weight"].grad
            assert G is not None
            for found, expected in ((of_B[f"{name}.B"], G @ A.T), (of_A[f"{name}.A"], B.T @ G)):
                assert (found - expected).norm() <= 1e-5 * expected.norm(), name


def _twice(config: ModelConfig) -> bool:
    """Whether a zero probe leaves logits as they are, to the bit."""
    initialize_process_groups(2)
    model = build_model(config, _ranks(config), seed=1)
    load_logical(model, random_tensors(config, _ranks(config), seed=3))
    tokens, _ = some_tokens(config)
    with torch.no_grad():
        before = model(tokens, positions_of(tokens), None)
        for layer in model.factored_layers().values():
            layer.probe = Probe(torch.randn(2, layer.A.shape[1]), torch.zeros(layer.B.shape[0], 2))
        return torch.equal(model(tokens, positions_of(tokens), None), before)


def test_a_zero_probe_changes_no_bit() -> None:
    assert run(_twice, 2, small_config("llama", "additive")) == [True, True]
