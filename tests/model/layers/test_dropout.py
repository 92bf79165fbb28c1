"""Dropout from counters: independent where tensors are split, equal where they are whole, and repeatable."""

import pytest
import torch
from torch import Tensor

from model.config import factored_projections
from model.gpt import build_model
from model.layers.dropout import CounterDropout, DropoutCounter
from model.process_groups import initialize_process_groups, tensor_index
from tests.support.distributed import run
from tests.support.parallel_model import gather_logical, positions_of, small_config, some_tokens


def _masks(tensor_parallel: int, sharded: bool, fused: bool = False) -> list[Tensor]:
    """Outputs on ones of: the same counters twice, the next step, the next micro-step, another layer, another site.
    `fused`: of a GPU's kernel."""
    initialize_process_groups(tensor_parallel)
    counter = DropoutCounter(seed=3)

    def drop(layer: int = 1, site: str = "mlp_output") -> Tensor:
        dropout, ones = CounterDropout(counter, 0.25, layer, site, sharded), torch.ones(4, 1024)
        return dropout.fused(ones, None, None) if fused else dropout(ones)

    outputs = [drop(), drop()]
    counter.step = 1
    outputs.append(drop())
    counter.step, counter.micro_step = 0, 1
    outputs.append(drop())
    counter.micro_step = 0
    return [*outputs, drop(layer=2), drop(site="attention_output")]


@pytest.mark.parametrize("fused", [False, True])
def test_counters_alone_make_the_mask(fused: bool) -> None:
    first, again, *others = run(_masks, 1, 1, True, fused)[0]
    assert torch.equal(first, again)
    assert float(first.mean()) == pytest.approx(1.0, abs=0.05)
    assert first.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    for other in others:
        assert float((first == other).float().mean()) == pytest.approx(0.25**2 + 0.75**2, abs=0.05)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("sharded", [True, False])
def test_tensor_parallel_processes_share_masks_of_whole_tensors_alone(sharded: bool, fused: bool) -> None:
    one, other = (masks[0] for masks in run(_masks, 2, 2, sharded, fused))
    assert torch.equal(one, other) is not sharded


def test_data_parallel_processes_drop_different_entries() -> None:
    one, other = (masks[0] for masks in run(_masks, 2, 1, False))
    assert not torch.equal(one, other)


def _dropped_gradient() -> tuple[Tensor, Tensor, int]:
    """Outputs of a site and the gradient of its inputs, both of ones, and the bytes that autograd keeps."""
    initialize_process_groups(1)
    site = CounterDropout(DropoutCounter(seed=3), 0.25, 1, "mlp_output", sharded=False)
    values = torch.ones(64, 64, dtype=torch.bfloat16, requires_grad=True)
    kept: list[int] = []

    def pack(saved: Tensor) -> Tensor:
        kept.append(saved.nbytes)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        dropped = site(values)
    dropped.sum().backward()
    assert values.grad is not None
    return dropped.detach(), values.grad, sum(kept)


def test_the_gradient_is_dropped_like_the_values_and_one_byte_a_number_is_kept() -> None:
    dropped, gradient, kept = run(_dropped_gradient, 1)[0]
    assert torch.equal(dropped, gradient)
    assert dropped.unique().tolist() == [0.0, float(torch.tensor(1 / 0.75).bfloat16())]
    assert kept == 64 * 64


def _training_step(
    parametrization: str, attention: float, hidden: float
) -> tuple[Tensor, Tensor, dict[str, Tensor], int]:
    initialize_process_groups(2)
    config = small_config("gpt2", parametrization, attention_dropout=attention, hidden_dropout=hidden)
    ranks = {projection.name: 6 for projection in factored_projections(config)}
    model = build_model(config, ranks, seed=1)
    tokens, labels = some_tokens(config)
    before = torch.get_rng_state()
    losses = model(tokens, positions_of(tokens), None, labels=labels)
    losses.mean().backward()
    again = model(tokens, positions_of(tokens), None, labels=labels)
    assert torch.equal(torch.get_rng_state(), before), "a generator's state ran on"
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return losses.detach(), again.detach(), gather_logical(model, gradients), tensor_index()


@pytest.mark.parametrize(("attention", "hidden"), [(0.2, 0.0), (0.0, 0.2), (0.2, 0.2)])
@pytest.mark.parametrize("parametrization", ["dense", "factored"])
def test_training_with_dropout_is_repeatable_and_agrees_across_processes(
    parametrization: str, attention: float, hidden: float
) -> None:
    """`gather_logical` also fails when copies of a whole parameter's gradient differ between processes."""
    (one, one_again, _, _), (other, _, _, _) = run(_training_step, 2, parametrization, attention, hidden)
    assert torch.equal(one, one_again)
    assert torch.allclose(one, other)
    plain = run(_training_step, 2, parametrization, 0.0, 0.0)[0][0]
    assert not torch.allclose(one, plain)
