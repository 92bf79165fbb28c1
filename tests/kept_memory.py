"""How much memory a computation leaves behind, from the life of every storage that it allocates."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Allocations(TorchDispatchMode):
    """Notes the storage of every tensor that an operation returns, without keeping it alive."""

    def __init__(self) -> None:
        super().__init__()
        self._bytes: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self._bytes[StorageWeakRef(storage)] = storage.nbytes()
        return result

    def alive_bytes(self) -> int:
        return sum(size for storage, size in self._bytes.items() if not storage.expired())


def kept_bytes(compute: Callable[[], Tensor]) -> int:
    """Bytes that `compute` allocated and that live as long as its result does."""
    with _Allocations() as allocations:
        result = compute()
    assert result.requires_grad
    return allocations.alive_bytes()
