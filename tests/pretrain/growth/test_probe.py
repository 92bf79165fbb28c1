"""Gradient probes against the dense gradient that they sketch, in plain PyTorch."""

from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from model.config import ModelConfig, factored_projections
from model.gpt import build_model, tensor_layouts
from model.process_groups import initialize_process_groups, tensor_group, tensor_size
from model.sharding import TensorLayout
from pretrain.growth.probe import GradientProbe, _agreed_demand
from tests.support.distributed import run
from tests.support.parallel_model import load_logical, positions_of, small_config, some_tokens
from tests.support.reference import random_tensors, reference_loss

DIRECTIONS = 3
NORMS = {"linear_qkv": "input_layernorm", "linear_fc1": "pre_mlp_layernorm"}


def _ranks(config: ModelConfig) -> dict[str, int]:
    return {projection.name: 5 for projection in factored_projections(config)}


def _dense_gradients(config: ModelConfig) -> dict[str, Tensor]:
    """∂L/∂W of every factored layer, from the dense model with W = B·A (or W₀ + B·A)."""
    tensors = dict(random_tensors(config, _ranks(config), seed=3))
    leaves = {}
    for projection in factored_projections(config):
        name = projection.name
        base = tensors.pop(f"{name}.weight", 0.0)
        weight = base + tensors.pop(f"{name}.B") @ tensors.pop(f"{name}.A")
        leaves[name] = tensors[f"{name}.weight"] = weight.requires_grad_()
        for leaf in ("weight", "bias"):
            norm = tensors.pop(f"{name}.norm_{leaf}", None)
            if norm is not None:
                module = NORMS[name.rpartition(".")[2]]
                tensors[f"decoder.layers.{projection.layer}.{module}.{leaf}"] = norm
    tokens, labels = some_tokens(config)
    dense = config.model_copy(update={"parametrization": "dense"})
    reference_loss(dense, {}, tensors, tokens, labels).mean().backward()
    return {name: weight.grad for name, weight in leaves.items() if weight.grad is not None}


def _measured(config: ModelConfig, tensor_parallel: int) -> tuple[dict[str, Tensor], float, list[bool]]:
    """Whole tensors that the probe measured, how far it moved the logits, and whether parameters stayed the same
    objects."""
    initialize_process_groups(tensor_parallel)
    ranks = _ranks(config)
    model = build_model(config, ranks, seed=1)
    load_logical(model, random_tensors(config, ranks, seed=3))
    parameters = list(map(id, model.parameters()))
    tokens, labels = some_tokens(config)
    with torch.no_grad():
        plain = model(tokens, positions_of(tokens), None)
    probe, moved, same = GradientProbe(DIRECTIONS, seed=4), 0.0, []
    for steps_left in (3, 2, 1):
        probe.attach(model, 10 - steps_left, steps_left)
        with torch.no_grad():
            logits = model(tokens, positions_of(tokens), None)
        moved = max(moved, float((logits - plain).abs().max() / plain.abs().max()))
        same.append(list(map(id, model.parameters())) == parameters)
        (8.0 * model(tokens, positions_of(tokens), None, labels=labels).mean()).backward()
        probe.collect(model, loss_scale=8.0)
    whole, layouts = probe.tensors(model), tensor_layouts(model)
    for name, demand in probe.demand(model).items():
        whole[f"energies/{name}"] = demand.energies
        factor = layouts[f"{name}.A"]
        shards = [torch.empty_like(demand.rows) for _ in range(tensor_size())]
        dist.all_gather(shards, demand.rows, group=tensor_group())
        whole[f"rows/{name}"] = TensorLayout((len(demand.rows), factor.full_shape[1]), factor.dim).unshard(shards)
    assert not probe.measuring
    return whole, moved, same


CASES = [
    (2, "llama", "factored"),
    (1, "gpt2", "factored"),
    (2, "gpt2", "additive"),
    *(
        pytest.param(processes, family, parametrization, marks=pytest.mark.matrix)
        for processes in (1, 2, 4)
        for family in ("llama", "gpt2")
        for parametrization in ("factored", "additive")
    ),
]


@pytest.mark.parametrize(("processes", "family", "parametrization"), CASES)
def test_probes_sketch_the_dense_gradient(processes: int, family: str, parametrization: str) -> None:
    config = small_config(family, parametrization)
    gradients = _dense_gradients(config)
    tensors = random_tensors(config, _ranks(config), seed=3)
    for whole, moved, same in run(_measured, processes, config, processes):
        assert moved < 1e-5
        assert all(same)
        for name, G in gradients.items():
            G, A, B = G.double(), tensors[f"{name}.A"].double(), tensors[f"{name}.B"].double()
            Q, R = whole[f"range/{name}"].double(), whole[f"first/{name}"].double()
            assert torch.allclose(Q.T @ Q, torch.eye(DIRECTIONS).double(), atol=1e-4)
            assert (B.T @ Q).abs().max() < 1e-4 * B.norm()
            assert (R - Q.T @ G).norm() < 1e-4 * G.norm()
            # The two batches were the same, so they agree on everything outside the rows of A.
            rows_of_A = torch.linalg.qr(A.T).Q
            outer = Q.T @ G
            outer = outer - outer @ rows_of_A @ rows_of_A.T
            expected = torch.linalg.svdvals(outer) ** 2
            assert torch.allclose(whole[f"energies/{name}"], expected, rtol=1e-3, atol=1e-6 * float(expected[0]))
            rows = whole[f"rows/{name}"].double()
            assert torch.allclose(rows @ rows.T, torch.eye(DIRECTIONS).double(), atol=1e-3)
            assert (rows @ A.T).abs().max() < 1e-4 * A.norm()
            leading = torch.linalg.svd(outer).Vh[0]
            assert float((rows[0] @ leading).abs()) == pytest.approx(1.0, abs=1e-3)


def _walks_over_parameters(layers: int) -> list[int]:
    """How often attaching, saving and restoring each walk over all parameters."""
    initialize_process_groups(1)
    config = small_config("llama", "factored", layers=layers)
    model = build_model(config, _ranks(config), seed=1)
    tokens, labels = some_tokens(config)
    walks, probe = [], GradientProbe(DIRECTIONS, seed=4)
    with patch.object(model, "named_parameters", wraps=model.named_parameters) as walk:
        probe.attach(model, 7, 3)
        walks.append(walk.call_count)
        model(tokens, positions_of(tokens), None, labels=labels).mean().backward()
        probe.collect(model, loss_scale=1.0)
        walk.reset_mock()
        kept = probe.tensors(model)
        walks.append(walk.call_count)
        assert kept
        walk.reset_mock()
        probe.load(model, kept)
        walks.append(walk.call_count)
    return walks


def test_the_parameters_are_not_gone_through_for_every_layer() -> None:
    assert run(_walks_over_parameters, 1, 1) == run(_walks_over_parameters, 1, 3)


def _demand_of(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    initialize_process_groups(1)
    config = small_config("llama", "factored")
    layer = build_model(config, _ranks(config), seed=1).factored_layers()["decoder.layers.0.self_attention.linear_proj"]
    demand = _agreed_demand(first, second, layer)
    return demand.energies, demand.rows


def test_what_two_batches_do_not_share_is_no_demand() -> None:
    generator = torch.Generator().manual_seed(5)
    signal, noises = torch.randn(1, 32, generator=generator), torch.randn(2, 4, 32, generator=generator)
    weights = torch.tensor([[3.0], [0.0], [0.0], [0.0]])
    shared = run(_demand_of, 1, weights * signal + 0.1 * noises[0], weights * signal + 0.1 * noises[1])[0][0]
    alone = run(_demand_of, 1, 0.1 * noises[0], 0.1 * noises[1])[0][0]
    assert shared[0] > 100 * float(shared[1:].abs().sum())
    plain_energy = float((0.1 * noises[0]).square().sum())
    assert float(alone.sum()) < 0.5 * plain_energy


def test_a_gradient_that_is_not_finite_asks_for_nothing() -> None:
    broken = torch.ones(4, 32)
    broken[1, 3] = torch.inf
    energies, rows = run(_demand_of, 1, broken, torch.ones(4, 32))[0]
    assert len(energies) == len(rows) == 0
