"""How much memory a computation leaves behind, from the life of every storage that it allocates."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):
    """Notes the storage of every tensor that an operation returns, without keeping it alive.

    with Allocations() as allocations:
        loss = model(tokens)
    allocations.alive_bytes()  # what the graph behind `loss` holds, and `loss`
    """

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
        """Bytes of the storages that still live."""
        return sum(size for storage, size in self._bytes.items() if not storage.expired())
