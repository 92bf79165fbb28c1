"""The kernel that adds bias and residual and drops, in Triton's interpreter: what it computes, which masks it draws."""

import pytest
import torch
from torch import Tensor

from model.layers.residual_kernel import bias_dropout_add

SEED = 2**62 + 12345
PROBABILITY = 0.25
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2**-6}
"""Largest error of sums over two tokens, which are the coarsest."""


def _mask(shape: tuple[int, ...], seed: int = SEED) -> Tensor:
    """What it multiplies each number with."""
    return bias_dropout_add(torch.ones(shape), None, None, PROBABILITY, seed)


@pytest.mark.parametrize(
    ("has_bias", "has_residual", "probability"),
    [(True, True, PROBABILITY), (False, True, PROBABILITY), (False, False, PROBABILITY), (True, True, 0.0)],
)
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_values_and_gradients_are_those_of_elementary_operations(
    dtype: torch.dtype, has_bias: bool, has_residual: bool, probability: float
) -> None:
    shape = (2, 1, 1030)  # two programs a row, the second one nearly empty
    generator = torch.Generator().manual_seed(1)
    x, bias, residual, gradient = (
        torch.randn(size, generator=generator).to(dtype) for size in (shape, shape[-1:], shape, shape)
    )
    used = [x] + [bias] * has_bias + [residual] * has_residual
    for values in used:
        values.requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda saved: saved):
        out = bias_dropout_add(x, bias if has_bias else None, residual if has_residual else None, probability, SEED)
    assert out.dtype == dtype
    assert not kept
    found = (out, *torch.autograd.grad(out, used, gradient))
    mask = _mask(shape).double() if probability else 1.0
    exact = (residual.double() if has_residual else 0.0) + mask * (x.double() + (bias.double() if has_bias else 0.0))
    expected = (exact, *torch.autograd.grad(exact, used, gradient.double()))
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.double(), other.double(), rtol=ROUNDING[dtype], atol=ROUNDING[dtype])


def test_masks_are_independent_from_place_to_place_and_from_seed_to_seed() -> None:
    shape = (8, 1030)
    mask, other = _mask(shape), _mask(shape, SEED + 1)
    assert mask.unique().tolist() == pytest.approx([0.0, 1 / (1 - PROBABILITY)])
    assert torch.equal(mask, _mask(shape))
    kept, others = ((values > 0).double().flatten() - (1 - PROBABILITY) for values in (mask, other))
    variance = PROBABILITY * (1 - PROBABILITY)
    most = 5 * (variance / len(kept)) ** 0.5
    assert abs(float(kept.mean())) < most
    most = 5 * variance / len(kept) ** 0.5  # of the mean product of independent places
    assert abs(float((kept * others).mean())) < most
    for step in (1, 2, 3, 4, 256, 512, 1030):
        assert abs(float((kept[step:] * kept[:-step]).mean())) < most, step
