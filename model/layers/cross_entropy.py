"""Cross entropy on a GPU: fused kernels over the vocabulary, in place of some eight passes over fp32 logits.

    loss = log Σ exp(logits) - logits[label]        ∂loss/∂logits = softmax(logits) - (1 at the label)

| the vocabulary is | on the GPU                                           | kept to the backward pass                |
|-------------------|------------------------------------------------------|------------------------------------------|
| whole             | liger-kernel's kernel: two readings and one writing  | the gradient, where the logits were      |
| split             | megatron-core's compiled one (bf16; else unfused)    | the softmax in fp32, beside the logits   |

On a CPU megatron-core's elementary operations do it, and are the reference of both.
"""

from typing import Any

import torch
from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.process_groups import tensor_group

NO_LABEL = -100
"""What liger-kernel takes for a row without a label; there is none here, since masks weigh the losses afterwards."""
_WARPS = 32
"""What liger-kernel 0.8.5 measured to be best up to Hopper."""


def whole_vocabulary_losses(labels: Tensor, logits: Tensor, vocabulary: int) -> Tensor:
    """Losses `(batch, seq)` in fp32 of `labels (batch, seq)` and `logits (seq, batch, padded_vocabulary)`.

    Columns from `vocabulary` on get no probability. Logits that have a gradient are overwritten with it. Either of
    their first two dimensions may be the outer one in memory.
    """
    if logits.is_contiguous():
        return _InPlaceCrossEntropy.apply(logits, labels.t(), vocabulary).t()
    return _InPlaceCrossEntropy.apply(logits.transpose(0, 1), labels, vocabulary)


def split_vocabulary_losses(labels: Tensor, logits: Tensor) -> Tensor:
    """Losses `(batch, seq)` in fp32 of `labels (batch, seq)` and bf16 `logits (seq, batch, padded_vocabulary/tp)`, of
    which each tensor-parallel process holds its columns.

    megatron-core 0.16.1 hands every gradient on in bf16, so other types have to do without.
    """
    return fused_vocab_parallel_cross_entropy(logits, labels.t().contiguous(), tensor_group()).t()


class HiddenPadding(torch.autograd.Function):
    """Overwrites the last dimension of logits with −∞ from `real` on. Behind a softmax these have no gradient, so there
    is none to mask."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, real: int) -> Tensor:
        ctx.mark_dirty(logits)
        logits[..., real:] = float("-inf")
        return logits

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _InPlaceCrossEntropy(torch.autograd.Function):
    """liger-kernel's kernel. Its own autograd function waits for the device four times, to look at labels and
    gradient, and multiplies the gradient into a copy."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, vocabulary: int) -> Tensor:
        # Here, because it takes seconds, and a CPU does without.
        from liger_kernel.ops.cross_entropy import MAX_FUSED_SIZE, liger_cross_entropy_kernel
        from triton import next_power_of_2

        rows = logits.detach().view(-1, logits.shape[-1])
        labels = labels.reshape(-1)
        losses = torch.zeros(labels.shape, dtype=torch.float32, device=logits.device)
        overwritten = ctx.needs_input_grad[0]
        columns = vocabulary
        if overwritten:
            # So the kernel writes zeros behind the vocabulary, too. It is also faster over all columns: Triton loads
            # several numbers at once where their count is a multiple of 16.
            rows[:, vocabulary:] = float("-inf")
            columns = rows.shape[1]
        liger_cross_entropy_kernel[(len(rows),)](
            X_ptr=rows,
            X_stride=rows.stride(0),
            Y_ptr=labels,
            Y_stride=1,
            weight_ptr=None,
            loss_ptr=losses,
            z_loss_ptr=None,
            loss_stride=1,
            token_accuracy_ptr=None,
            token_accuracy_stride=0,
            predicted_tokens_ptr=None,
            predicted_tokens_stride=0,
            n_cols=columns,
            n_non_ignore=len(rows),  # this and the next two serve means and weights
            sum_non_ignore_weight=len(rows),
            weight_sum=0.0,
            ignore_index=NO_LABEL,
            lse_square_scale=0.0,
            label_smoothing=0.0,
            reduction="none",
            softcap=None,
            RETURN_Z_LOSS=False,
            RETURN_TOKEN_ACCURACY=False,
            RETURN_PREDICTED_TOKENS=False,
            BLOCK_SIZE=min(MAX_FUSED_SIZE, next_power_of_2(columns)),
            HAS_WEIGHT=False,
            HAS_SOFTCAPPING=False,
            HAS_GRADIENTS=overwritten,
            num_warps=_WARPS,
        )
        if overwritten:
            ctx.save_for_backward(rows)
        return losses.view(logits.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        # In place: autograd refuses a second backward pass, because what was saved has changed.
        (rows,) = ctx.saved_tensors
        return rows.mul_(gradient.reshape(-1, 1)).view(*gradient.shape, -1), None, None
