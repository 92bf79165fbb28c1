"""The fused losses of a GPU against elementary operations: liger-kernel's kernel in Triton's interpreter, and
megatron-core's compiled functions uncompiled, over two processes."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.layers.cross_entropy import HiddenPadding, split_vocabulary_losses, whole_vocabulary_losses
from model.process_groups import initialize_process_groups
from tests.support.distributed import run

SEQUENCE, BATCH, VOCABULARY, PADDED = 5, 3, 300, 384
ROUNDING = {torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}
"""Error of a gradient beside the largest one: twice half a last place."""


def _logits_labels_weights(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Logits `(seq, batch, padded_vocabulary)`, the padding larger than all others; labels and weights `(batch, seq)`,
    some of which are 0."""
    generator = torch.Generator().manual_seed(4)
    logits = 4.0 * torch.randn(SEQUENCE, BATCH, PADDED, generator=generator)
    logits[..., VOCABULARY:] += 50.0
    labels = torch.randint(VOCABULARY, (BATCH, SEQUENCE), generator=generator)
    labels[0, 0] = VOCABULARY - 1
    weights = torch.rand(BATCH, SEQUENCE, generator=generator)
    return logits.to(dtype), labels, weights * (weights > 0.3)


def _reference(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Losses and their weighted sum's gradient, in fp64."""
    logits, labels, weights = _logits_labels_weights(dtype)
    real = logits[..., :VOCABULARY].double().requires_grad_()
    losses = nn.functional.cross_entropy(real.permute(1, 2, 0), labels, reduction="none")
    (losses * weights).sum().backward()
    assert real.grad is not None
    return losses.detach(), nn.functional.pad(real.grad, (0, PADDED - VOCABULARY))


@pytest.mark.parametrize("outer", ["seq", "batch"])
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_the_kernel_finds_losses_and_gradient_of_a_whole_vocabulary(dtype: torch.dtype, outer: str) -> None:
    values, labels, weights = _logits_labels_weights(dtype)
    expected, gradient = _reference(dtype)
    if outer == "batch":
        values = values.transpose(0, 1).contiguous().transpose(0, 1)
    leaf = values.clone().requires_grad_()
    logits = leaf * 1.0
    places: list[int] = []
    logits.register_hook(lambda values: places.append(values.data_ptr()))
    losses = whole_vocabulary_losses(labels, logits, VOCABULARY)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-5)
    weighted = (losses * weights).sum()
    weighted.backward(retain_graph=True)
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad.double(), gradient, rtol=0.0, atol=ROUNDING[dtype])
    assert not leaf.grad[..., VOCABULARY:].any()
    assert places == [logits.data_ptr()]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        weighted.backward()


def test_nothing_is_kept_beside_the_logits() -> None:
    values, labels, _ = _logits_labels_weights(torch.bfloat16)
    logits = values.requires_grad_() * 1.0
    kept: list[int] = []

    def pack(saved: Tensor) -> Tensor:
        kept.append(saved.data_ptr())
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        whole_vocabulary_losses(labels, logits, VOCABULARY)
    assert kept == [logits.data_ptr()]


def test_logits_without_a_gradient_stay_as_they_are() -> None:
    logits, labels, _ = _logits_labels_weights(torch.bfloat16)
    before = logits.clone()
    with torch.no_grad():
        losses = whole_vocabulary_losses(labels, logits, VOCABULARY)
    torch.testing.assert_close(losses.double(), _reference(torch.bfloat16)[0], rtol=1e-5, atol=1e-5)
    assert torch.equal(logits, before)


def _split_losses_and_gradient() -> tuple[Tensor, Tensor]:
    initialize_process_groups(2)
    values, labels, weights = _logits_labels_weights(torch.bfloat16)
    columns = PADDED // 2
    start = dist.get_rank() * columns
    leaf = values[..., start : start + columns].clone().requires_grad_()
    hidden = HiddenPadding.apply(leaf * 1.0, VOCABULARY - start)
    with torch.compiler.set_stance("force_eager"):
        losses = split_vocabulary_losses(labels, hidden)
        (losses * weights).sum().backward()
    assert leaf.grad is not None
    return losses.detach(), leaf.grad


def test_two_processes_find_losses_and_gradient_of_a_split_vocabulary() -> None:
    expected, gradient = _reference(torch.bfloat16)
    parts = run(_split_losses_and_gradient, 2)
    for losses, _ in parts:
        torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-5)
    found = torch.cat([part for _, part in parts], dim=-1).double()
    torch.testing.assert_close(found, gradient, rtol=0.0, atol=ROUNDING[torch.bfloat16])
