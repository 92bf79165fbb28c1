"""How a tensor is split over tensor-parallel processes, and back.

A tensor is split along one dimension, in `stride` blocks: every block is cut into one piece per process, and a process
holds the pieces with its index, one behind the other. `stride` 2 is the gate-and-up layout of a gated MLP: each process
holds its part of the gate above its part of up. It is megatron-core's `partition_dim` and `partition_stride`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TensorLayout:
    """A logical (full) tensor and its split; `dim` None: every process holds all of it."""

    full_shape: tuple[int, ...]
    dim: int | None = None
    stride: int = 1

    def shard_shape(self, processes: int) -> tuple[int, ...]:
        """Shape of one process's shard."""
        if self.dim is None:
            return self.full_shape
        shape = list(self.full_shape)
        shape[self.dim] //= processes
        return tuple(shape)

    def shard(self, full: Tensor, index: int, processes: int) -> Tensor:
        """The shard of process `index` out of `full (full_shape)`; a view where it can be one."""
        if self.dim is None or processes == 1:
            return full
        pieces = full.chunk(self.stride * processes, dim=self.dim)[index::processes]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=self.dim)

    def unshard(self, shards: Sequence[Tensor]) -> Tensor:
        """The full tensor from all shards, in order of process index."""
        if self.dim is None or len(shards) == 1:
            return shards[0]
        blocks = [shard.chunk(self.stride, dim=self.dim) for shard in shards]
        return torch.cat([shard_blocks[block] for block in range(self.stride) for shard_blocks in blocks], dim=self.dim)
