"""The loss of a finished model on a text, by sliding windows.

The text is one stream: an end of document, and then each document with its end behind it. Every token but the first is
predicted once. Windows are as long as the model's positions and begin `stride` tokens apart; a window scores what no
window before it has scored, so that with a stride below the length each token but the first ones sees at least
`length - stride` tokens before it:

    stride = 3, length = 5      predictions  0 1 2 3 4 5 6 7 8
    first window                             x x x x x
    second                                         . . x x x
    last, moved back to end with the text            . . . . x

A stride of the length is the cheapest, and what the validation of a run does. Published perplexities usually have a
shorter one, at length / stride times the cost. With documents seen one by one, no window reaches over the end of one:
each document is a stream of its own, as in a run with `data.within_documents`.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from model.config import ModelConfig
from model.gpt import EspalierModel, build_model, tensor_layouts
from model.process_groups import data_index, data_size, device, tensor_index, tensor_size
from pretrain.checkpoint.reader import CheckpointReader, locate_checkpoint
from pretrain.config.parallel import check_tensor_split
from pretrain.convert.consolidated import FACTS_NAME, ConsolidatedModel, facts_of
from pretrain.convert.logit_comparison import load_transformers
from pretrain.errors import CheckpointError, ConfigError
from pretrain.loss import LossSums, perplexity, token_losses
from pretrain.tokenizer.base import main_file

Losses = Callable[[Tensor, Tensor], Tensor]
"""Nats of every label `(batch, seq)`, from tokens and labels of that shape."""


@dataclass(frozen=True)
class EvaluatedModel:
    """A model that was found in a folder, not yet in memory."""

    kind: str
    positions: int
    """Longest sequence."""
    tokenizer_path: Path
    load: Callable[[], Losses]


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation."""

    lm_loss: float
    """Nats a token."""
    perplexity: float
    bits_per_byte: float
    tokens: int
    """Tokens that were predicted, ends of documents included."""
    bytes: int
    """UTF-8 bytes that the predicted tokens stand for; an end of document stands for none."""
    length: int
    stride: int

    def facts(self) -> dict[str, Any]:
        return asdict(self)


def find_model(path: Path, tensor: int) -> EvaluatedModel:
    """The model in a dense export, a consolidated folder, a run folder or a checkpoint.

    Raises an `EspalierError` if there is no model, or if `tensor` tensor-parallel processes cannot share it.
    """
    if (path / "config.json").is_file():
        return _export(path, tensor)
    if (path / FACTS_NAME).is_file():
        consolidated = ConsolidatedModel(path)
        read = consolidated.read
        return _ours("consolidated", consolidated.config, consolidated.ranks, consolidated.tokenizer_path, tensor, read)
    reader = CheckpointReader(locate_checkpoint(path))
    facts = facts_of(reader)
    tokenizer_path = next(iter(reader.tokenizer_files().values()))
    return _ours("checkpoint", facts.model, facts.ranks, tokenizer_path, tensor, reader)


def _ours(
    kind: str,
    config: ModelConfig,
    ranks: dict[str, int],
    tokenizer_path: Path,
    tensor: int,
    source: CheckpointReader | Callable[[str], Tensor],
) -> EvaluatedModel:
    if config.bidirectional:
        raise CheckpointError(
            "the model was trained with train.objective=mlm and predicts no next token: give one of "
            "train.objective=causal"
        )
    check_tensor_split(config, tensor)

    @torch.no_grad()
    def load() -> Losses:
        model = build_model(config, ranks, seed=0)
        for name, layout in tensor_layouts(model).items():
            if isinstance(source, CheckpointReader):
                shard = source.read_shard(name, "master", tensor_index(), tensor_size())
            else:
                shard = layout.shard(source(name), tensor_index(), tensor_size())
            model.get_parameter(name).copy_(shard)
        return _losses_of(model.to(device()).eval())

    return EvaluatedModel(kind, config.sequence_length, tokenizer_path, load)


def _losses_of(model: EspalierModel) -> Losses:
    def losses(tokens: Tensor, labels: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=device()).expand_as(tokens)
        return token_losses(model, model(tokens.to(device()), positions, None), labels)

    return losses


def _export(folder: Path, tensor: int) -> EvaluatedModel:
    if tensor > 1:
        raise ConfigError(
            f"{folder} is a dense export, which is not split over processes, and --tensor-parallel is {tensor}: leave "
            "it out (processes then share the text), or give the consolidated folder"
        )
    name = main_file({path.name for path in folder.iterdir()})
    if name is None:
        raise CheckpointError(f"{folder} holds no tokenizer: evaluate it with lm_eval (--model hf)")
    model = load_transformers(folder, in_memory=True)

    def load() -> Losses:
        model.to(device())

        def losses(tokens: Tensor, labels: Tensor) -> Tensor:
            logits = model(input_ids=tokens.to(device()), use_cache=False).logits.float()
            return functional.cross_entropy(logits.transpose(1, 2), labels.to(device()), reduction="none")

        return losses

    settings: Any = model.config
    return EvaluatedModel("dense export", settings.max_position_embeddings, folder / name, load)


@dataclass(frozen=True)
class Window:
    """A row of tokens: its begin and length in the stream, and the first place that it scores."""

    begin: int
    length: int
    scores_from: int


def plan_windows(stream: np.ndarray, length: int, stride: int, end_of_document: int | None) -> list[Window]:
    """All windows, sorted by length, longest first; with an `end_of_document` none reaches over an end of document."""
    cuts = [0, len(stream) - 1]
    if end_of_document is not None:
        ends = np.flatnonzero(stream[1:-1] == end_of_document) + 1
        cuts = [0, *ends.tolist(), len(stream) - 1]
    planned = [
        Window(first + begin, min(length, last - first), scores_from)
        for first, last in pairwise(cuts)
        for begin, scores_from in windows(last - first, length, stride)
    ]
    return sorted(planned, key=lambda window: -window.length)


def windows(predictions: int, length: int, stride: int) -> Iterator[tuple[int, int]]:
    """Begin of each window, and the first place inside it that it scores."""
    length = min(length, predictions)
    scored = 0
    for begin in range(0, max(predictions - length, 0) + stride, stride):
        begin = min(begin, predictions - length)
        if scored < begin + length:
            yield begin, scored - begin if scored else 0
            scored = begin + length


@torch.no_grad()
def evaluate(
    losses: Losses,
    stream: np.ndarray,
    byte_lengths: np.ndarray,
    *,
    length: int,
    stride: int,
    micro_batch: int,
    end_of_document: int | None = None,
) -> Evaluation:
    """The loss of `stream` by sliding windows; a collective of all processes.

    Each data-parallel process takes every `data_size`-th micro-batch of windows. The result is the same on any number
    of processes, but for rounding. With an `end_of_document` each document is seen alone.
    """
    planned = plan_windows(stream, length, stride, end_of_document)
    length = planned[0].length
    sums, lengths = LossSums(), torch.from_numpy(byte_lengths)
    batches = [
        found[first : first + micro_batch]
        for _, group in groupby(planned, key=lambda window: window.length)
        for found in [list(group)]
        for first in range(0, len(found), micro_batch)
    ]
    for batch in batches[data_index() :: data_size()]:
        tokens, labels, mask = _batch(stream, batch)
        sums.add(losses(tokens, labels), mask, lengths[labels])
    nats, tokens_seen, text_bytes = sums.total()
    mean = nats / tokens_seen
    bits = nats / math.log(2) / text_bytes if text_bytes else math.inf
    return Evaluation(mean, perplexity(mean), bits, int(tokens_seen), int(text_bytes), length, stride)


def _batch(stream: np.ndarray, batch: Sequence[Window]) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, labels and mask `(batch, length)` of equally long windows; the mask is true where a window scores."""
    length = batch[0].length
    tokens = np.stack([stream[window.begin : window.begin + length + 1] for window in batch]).astype(np.int64)
    rows, scores_from = torch.from_numpy(tokens), torch.tensor([window.scores_from for window in batch])[:, None]
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous(), torch.arange(length) >= scores_from
