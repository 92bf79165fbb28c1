"""Logits, losses and gradients of the first step on 1, 2 and 4 tensor-parallel processes against plain PyTorch."""

import pytest
import torch

from model.config import ModelConfig, factored_projections
from tests.support.distributed import run
from tests.support.parallel_model import first_step, small_config, some_tokens
from tests.support.reference import frozen_names, random_tensors, reference_logits, reference_loss

VARIANTS = [("dense", "all"), ("factored", "all"), ("factored", "mlp"), ("additive", "all"), ("additive", "mlp")]


@pytest.mark.parametrize("tensor_parallel", [1, 2, 4])
@pytest.mark.parametrize(("parametrization", "factored_layers"), VARIANTS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_first_step_equals_plain_pytorch(
    family: str, parametrization: str, factored_layers: str, tensor_parallel: int
) -> None:
    _check_first_step(small_config(family, parametrization, factored_layers), tensor_parallel)


@pytest.mark.parametrize("tensor_parallel", [1, 2, 4])
@pytest.mark.parametrize(("family", "factored_layers"), [("llama", "all"), ("gpt2", "mlp")])
def test_factors_alone_learn_where_all_else_is_frozen(family: str, factored_layers: str, tensor_parallel: int) -> None:
    _check_first_step(small_config(family, "additive", factored_layers, trained="factors"), tensor_parallel)


@pytest.mark.parametrize("tensor_parallel", [1, 2, pytest.param(4, marks=pytest.mark.matrix)])
@pytest.mark.parametrize(("family", "parametrization"), [("llama", "factored"), ("gpt2", "dense")])
def test_bidirectional_attention_equals_plain_pytorch(family: str, parametrization: str, tensor_parallel: int) -> None:
    _check_first_step(small_config(family, parametrization, bidirectional=True), tensor_parallel)


def _check_first_step(config: ModelConfig, tensor_parallel: int) -> None:
    ranks = {projection.name: 6 for projection in factored_projections(config)}
    tokens, labels = some_tokens(config)
    tensors = random_tensors(config, ranks, seed=3)
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    expected_logits = reference_logits(config, ranks, leaves, tokens)
    expected_losses = reference_loss(config, ranks, leaves, tokens, labels)
    expected_losses.mean().backward()

    for logits, losses, gradients in run(first_step, tensor_parallel, config, ranks, tensor_parallel):
        scale = expected_logits.abs().max()
        assert (logits[..., : config.vocabulary] - expected_logits).abs().max() <= 1e-5 * scale
        assert torch.allclose(losses, expected_losses, rtol=1e-5, atol=1e-6)
        assert gradients.keys() == leaves.keys() - frozen_names(config)
        for name in gradients:
            leaf = leaves[name]
            assert leaf.grad is not None
            error = (gradients[name] - leaf.grad).norm() / leaf.grad.norm()
            assert error <= 1e-5, f"{name}: {error:.1e}"


def test_padded_vocabulary_rows_get_no_gradient() -> None:
    config = small_config("gpt2", "factored")
    ranks = {projection.name: 4 for projection in factored_projections(config)}
    _, _, gradients = run(first_step, 2, config, ranks, 2)[0]
    padding = gradients["embedding.word_embeddings.weight"][config.vocabulary :]
    assert padding.shape[0] > 0
    assert not padding.any()
