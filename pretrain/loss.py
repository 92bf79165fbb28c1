"""Losses of tokens and their sums, for validations during a run and evaluations after it."""

import math

import torch
import torch.distributed as dist
from torch import Tensor

from model.gpt import EspalierModel
from model.process_groups import data_group, device


def token_losses(model: EspalierModel, logits: Tensor, labels: Tensor) -> Tensor:
    """Nats of every label `(batch, seq)` from logits `(batch, seq, padded_vocabulary/tp)`."""
    return model.compute_language_model_loss(labels.to(device()), logits.transpose(0, 1))


def perplexity(lm_loss: float) -> float:
    """exp of a loss in nats per token; infinite where it would overflow."""
    return math.inf if lm_loss > 700.0 else math.exp(lm_loss)


class LossSums:
    """Sums of nats, of predicted tokens, and of a third quantity; in fp64, on this process's device until `total`."""

    def __init__(self) -> None:
        self._sums = torch.zeros(3, dtype=torch.float64, device=device())

    def add(self, losses: Tensor, mask: Tensor, counted: Tensor) -> None:
        """Adds the tokens of a batch. All arguments are `(batch, seq)`; `mask` is 0 where a token does not count."""
        mask = mask.to(device()).double()
        each = (losses.double(), mask, counted.to(device()))
        self._sums += torch.stack([(values * mask).sum() for values in each])

    def total(self) -> tuple[float, float, float]:
        """The three sums over all data-parallel processes; a collective."""
        sums = self._sums.clone()
        dist.all_reduce(sums, group=data_group())
        nats, tokens, counted = sums.tolist()
        return nats, tokens, counted
