"""Where the storage of a tensor pretends to lie. All of them lie in host memory; a mark says otherwise."""

from enum import Enum

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

HOST, DEVICE = torch.device("cpu"), torch.device("cuda", 0)
_FEWEST_TO_SWEEP = 10_000


class Place(Enum):
    """Where a storage lies."""

    PAGEABLE = "host memory"
    PINNED = "pinned host memory"
    DEVICE = "device memory"
    EITHER = "memory of its companions"
    """Made by C++ for an operator of its own, which knows of no pretended device: it goes with what it meets first."""

    @property
    def on_host(self) -> bool:
        return self in (Place.PAGEABLE, Place.PINNED)

    @property
    def device(self) -> torch.device:
        return HOST if self.on_host else DEVICE


class Marks:
    """The place of every storage; pageable host memory where nothing is known."""

    def __init__(self) -> None:
        # The address of a storage is not used again while a weak reference to it is kept.
        self._known: dict[int, tuple[StorageWeakRef, Place]] = {}
        self._sweep_at = _FEWEST_TO_SWEEP

    def of(self, tensor: Tensor) -> Place:
        with torch._C.DisableTorchFunction():
            return self.at(storage_key(tensor))

    def at(self, key: int) -> Place:
        """Place of the storage with this `storage_key`."""
        found = self._known.get(key)
        return Place.PAGEABLE if found is None else found[1]

    def put(self, tensor: Tensor, place: Place) -> None:
        with torch._C.DisableTorchFunction():
            storage = tensor.untyped_storage()
        self._known[storage._cdata] = (StorageWeakRef(storage), place)
        if len(self._known) > self._sweep_at:
            self._known = {key: entry for key, entry in self._known.items() if not entry[0].expired()}
            self._sweep_at = max(_FEWEST_TO_SWEEP, 2 * len(self._known))


def storage_key(tensor: Tensor) -> int:
    """Key that all tensors share whose memory is the same; to be called where torch-function modes are off."""
    return int(tensor.untyped_storage()._cdata)
