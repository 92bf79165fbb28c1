"""Where masters and moments wait while a growth event builds the new engine.

The old engine's flat tensors can only be freed as a whole, and the new engine allocates its own, so both stand side by
side for a while, and where the state waits depends on where there is room:

- state on a device stays there, in the old engine's own tensors, as far as that makes no new peak of the run: no
  training step is under way, so the memory of its activations is free. For p parameters grown to p' that is

      kept bytes ≤ largest bytes allocated so far − p'/p · (bytes allocated now + bytes of the trained weights)

  where the weights count twice, since engines are taken down and built by copying them

- other state on a device waits in host memory
- state in host memory (no GPU, or an offloaded optimizer) waits in files of the system's temporary folder (`TMPDIR`)

Beside these and its own share, a process never holds more of a state than that of one parameter.

Whole flat tensors are copied from a device, in chunks, into page-locked memory, and the host waits once for all of
them. The estimated time for S bytes (12 a number) is S / 25 GB/s each way over PCIe 4, and half of that over PCIe 5.
Locking pages takes up to 1 s per GB, in the first event alone, since torch keeps them for the next one. Two small
staging buffers that drain into ordinary memory would lock next to nothing. But one core would then copy everything once
more in every event, into new pages and back, at 2 to 3 GB/s.
"""

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType

import psutil
import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pretrain.checkpoint.format import Fragment
from pretrain.devices import processes_of_machine, synchronize
from pretrain.distributed import together
from pretrain.engine.optimizer_state import OptimizerState, gather, optimizer_state
from pretrain.engine.zero3 import held, shape_of
from pretrain.errors import EspalierError

_CHUNK_BYTES = 64 * 2**20
"""Bytes of one copy to the host: a power of two, since torch rounds page-locked blocks up to one."""
_LOCKED_SHARE = 0.5
"""Share of the machine's memory that the stashes of its processes may lock. The rest of a larger state waits in
ordinary memory, which the device fills at a fifth of the speed."""


class Stash:
    """What this process owns of every parameter's state, taken from an engine that is about to be torn down.

    A context manager; building one is a collective. `growth`: parameters after the event, as a multiple of those now.
    """

    def __init__(self, engine: DeepSpeedEngine, growth: float) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="espalier_stash_", ignore_cleanup_errors=True)
        self._kept: dict[tuple[str, str], list[Fragment]] = {}
        self._start_in_file: dict[tuple[str, str], int] = {}
        parameters = engine.module.trained_parameters()
        self._shapes = {name: shape_of(parameter) for name, parameter in parameters.items()}
        self._places = {name: place for place, name in enumerate(parameters)}
        self._device = next(iter(parameters.values())).device
        self._weight_bytes = sum(held(parameter)[1].nbytes for parameter in parameters.values())
        state = optimizer_state(engine)
        self.counters = state.counters()
        together(lambda: self._fill(state, growth))

    def __enter__(self) -> "Stash":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._folder.cleanup()

    def _fill(self, state: OptimizerState, growth: float) -> None:
        on_device: list[Fragment] = []
        for fragment in state.fragments():
            if fragment.values.device.type == "cuda":
                on_device.append(fragment)
            else:
                self._write(fragment)
        spare_bytes = _spare_device_bytes(growth, self._weight_bytes) if on_device else 0.0
        staying, leaving = staying_and_leaving(on_device, spare_bytes)
        self._keep(staying)
        # The same in every event of a run, so that torch reuses the page-locked chunks of the last one.
        lockable = _LOCKED_SHARE * psutil.virtual_memory().total / processes_of_machine(dist.get_world_size())
        self._keep(host_copies(leaving, _CHUNK_BYTES, lockable))
        synchronize()  # before anyone frees or overwrites what is being copied

    def _keep(self, fragments: Iterable[Fragment]) -> None:
        for fragment in fragments:
            self._kept.setdefault((fragment.name, fragment.key), []).append(fragment)

    def _file(self, name: str, key: str) -> Path:
        return Path(self._folder.name, f"{self._places[name]}_{key}.safetensors")

    def _write(self, fragment: Fragment) -> None:
        self._start_in_file[fragment.name, fragment.key] = fragment.start
        try:
            save_file({"values": fragment.values.detach()}, self._file(fragment.name, fragment.key))
        except (OSError, SafetensorError) as error:
            raise EspalierError(
                f"the optimizer's state could not be set aside in {self._folder.name} ({error}): free space there, or "
                "set TMPDIR to a folder with room for it"
            ) from error

    def take(self, name: str, key: str) -> Tensor:
        """One parameter's whole shard of one state, on every data-parallel process: a collective over them. Each shard
        can be taken once."""
        return gather(self._fragments(name, key), self._shapes[name], self._device)

    def _fragments(self, name: str, key: str) -> Iterator[Fragment]:
        yield from self._kept.pop((name, key), [])
        if (name, key) in self._start_in_file:
            file = self._file(name, key)
            values = load_file(file)["values"]
            file.unlink()
            yield Fragment(name, key, self._start_in_file[name, key], values)


def _spare_device_bytes(growth: float, weight_bytes: int) -> float:
    """Bytes of this process's device that may keep state, by this module's equation; negative if there are none."""
    return torch.cuda.max_memory_allocated() - growth * (torch.cuda.memory_allocated() + weight_bytes)


def staying_and_leaving(fragments: Iterable[Fragment], spare_bytes: float) -> tuple[list[Fragment], list[Fragment]]:
    """The fragments whose flat tensors fit into `spare_bytes` together, and the others. A flat tensor is freed as a
    whole."""
    staying: list[Fragment] = []
    leaving: list[Fragment] = []
    for inside in _by_storage(fragments):
        size_bytes = inside[0].values.untyped_storage().nbytes()
        if size_bytes <= spare_bytes:
            spare_bytes -= size_bytes
            staying += inside
        else:
            leaving += inside
    return staying, leaving


def _by_storage(fragments: Iterable[Fragment]) -> list[list[Fragment]]:
    """The fragments, grouped by the flat tensor that they are views of."""
    storages: dict[int, list[Fragment]] = {}
    for fragment in fragments:
        storages.setdefault(fragment.values.untyped_storage().data_ptr(), []).append(fragment)
    return list(storages.values())


def host_copies(fragments: Iterable[Fragment], chunk_bytes: int, lockable_bytes: float) -> Iterator[Fragment]:
    """The fragments in host memory. A fragment in which a chunk ends comes in pieces. Copies from a device are complete
    after `synchronize`.

    What lies in one storage is copied as one range, gaps included, in chunks of at most `chunk_bytes`, however many
    fragments it holds; the first `lockable_bytes` into page-locked memory.
    """
    for inside in _by_storage(fragments):
        starts = [int(fragment.values.storage_offset()) for fragment in inside]
        first = min(starts)
        end = max(start + fragment.values.numel() for start, fragment in zip(starts, inside, strict=True))
        flat = inside[0].values.detach().as_strided((end - first,), (1,), first)
        chunk = chunk_bytes // flat.element_size()
        copies = []
        for part in flat.split(chunk):
            copies.append(host_copy(part, locked=lockable_bytes >= part.nbytes))
            lockable_bytes -= part.nbytes
        for start, fragment in zip(starts, inside, strict=True):
            yield from _pieces(fragment, start - first, chunk, copies)


def _pieces(fragment: Fragment, place: int, chunk: int, copies: Sequence[Tensor]) -> Iterator[Fragment]:
    """The fragment's values out of `copies`, the chunks of `chunk` numbers of a flat tensor; it starts there at
    `place`."""
    end = place + fragment.values.numel()
    for number in range(place // chunk, -(-end // chunk)):
        begin, stop = max(place, number * chunk), min(end, (number + 1) * chunk)
        values = copies[number][begin - number * chunk : stop - number * chunk]
        yield Fragment(fragment.name, fragment.key, fragment.start + begin - place, values)


def host_copy(values: Tensor, locked: bool = True) -> Tensor:
    """A copy of the values in host memory; page-locked if `locked` and they come from a device. Then it is complete
    after `synchronize`."""
    locked = locked and values.device.type == "cuda"
    host = torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=locked)
    return host.copy_(values.detach(), non_blocking=True)
