"""Token and position embedding into the hidden-sharded stream.

megatron-core's embedding can scatter along the sequence only and adds positions at full width. Here the look-up in the
vocabulary shard is summed and scattered along hidden in one reduce-scatter, and the position table is split along
hidden.
"""

import torch
from torch import Tensor, nn

from model.collectives import scatter_stream
from model.layers.sharded_norm import mark_sharded
from model.process_groups import tensor_index, tensor_size


class WordEmbedding(nn.Module):
    """The rows of the vocabulary that this process holds: `weight (padded_vocabulary/tp, hidden)`."""

    def __init__(self, padded_vocabulary: int, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(padded_vocabulary // tensor_size(), hidden))
        mark_sharded(self.weight, dim=0)

    def forward(self, tokens: Tensor) -> Tensor:
        """`tokens (batch, seq)` to partial sums `(seq, batch, hidden)`: zero where another process holds the row."""
        rows = self.weight.shape[0]
        local = tokens.t() - tensor_index() * rows
        elsewhere = (local < 0) | (local >= rows)
        return nn.functional.embedding(local.masked_fill(elsewhere, 0), self.weight).masked_fill(
            elsewhere.unsqueeze(-1), 0.0
        )


class PositionEmbedding(nn.Module):
    """Learned positions, split along hidden: `weight (sequence_length, hidden/tp)`."""

    def __init__(self, sequence_length: int, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(sequence_length, hidden // tensor_size()))
        mark_sharded(self.weight, dim=1)

    def forward(self, positions: Tensor) -> Tensor:
        """`positions (batch, seq)` to `(seq, batch, hidden/tp)`."""
        return nn.functional.embedding(positions.t(), self.weight)


class StreamEmbedding(nn.Module):
    """`input_ids, position_ids (batch, seq)` to the stream `(seq, batch, hidden/tp)`."""

    def __init__(self, padded_vocabulary: int, hidden: int, sequence_length: int | None, dropout: nn.Module) -> None:
        super().__init__()
        self.word_embeddings = WordEmbedding(padded_vocabulary, hidden)
        self.position_embeddings = PositionEmbedding(sequence_length, hidden) if sequence_length else None
        self.embedding_dropout = dropout

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        stream = scatter_stream(self.word_embeddings(input_ids))
        if self.position_embeddings is not None:
            stream = stream + self.position_embeddings(position_ids)
        return self.embedding_dropout(stream)
