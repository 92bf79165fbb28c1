"""Documents inside a sample: where each begins, and attention that stays inside them.

The end-of-document token is the label behind the last token of a document, and the first token the next one is
predicted from. So as an input it begins the next document: positions start there with 0, as they do when a model is
asked for a new document. In a sample that begins inside a document, the rest of that document counts as a document.

    tokens       b  c  <end>  d  e  f  <end>  g        labels   c  <end>  d  e  f  <end>  g  h
    positions    0  1    0    1  2  3    0    1
"""

from typing import Any

import torch
from torch import Tensor

NUMBER_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class WithinDocuments:
    """The samples of a `GPTDataset` with positions that begin anew at every document, and marks where documents
    begin."""

    def __init__(self, samples: Any, end_of_document: int) -> None:
        self._samples, self._end = samples, end_of_document

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Sample `index`: tokens, labels, loss_mask (fp32), position_ids and document_starts (bool), each
        (sequence_length,)."""
        sample = self._samples[index]
        positions = positions_within(sample["tokens"], self._end)
        return {**sample, "position_ids": positions, "document_starts": positions == 0}


def positions_within(tokens: Tensor, end_of_document: int) -> Tensor:
    """Position of each of `tokens (..., seq)` in its document, as int64 of that shape."""
    places = torch.arange(tokens.shape[-1], device=tokens.device).expand(tokens.shape)
    starts = torch.where(tokens == end_of_document, places, 0)
    return places - starts.cummax(-1).values


def document_bounds(starts: Tensor) -> Tensor:
    """Places among all tokens of a batch where documents begin, and where the last one ends: int32 `(documents + 1,)`.

    `starts (batch, seq)` is true where a document begins. It is computed on the host: their number varies, so the host
    would have to wait for a device.
    """
    return torch.cat([starts.flatten().nonzero().flatten(), torch.tensor([starts.numel()])]).int()


def outside_mask(positions: Tensor, kind: torch.dtype, *, causal: bool) -> Tensor:
    """Attention mask `(batch, 1, seq, seq)` from `positions (batch, seq)`: -inf where a query must not look, else 0. It
    must not look at other documents, nor at later tokens if `causal`."""
    document = (positions == 0).cumsum(-1)
    hidden = document[:, None, :, None] != document[:, None, None, :]
    if causal:
        hidden = hidden | torch.ones(hidden.shape[-2:], dtype=torch.bool, device=hidden.device).triu(1)
    return torch.zeros(hidden.shape, dtype=kind, device=hidden.device).masked_fill_(hidden, -torch.inf)
