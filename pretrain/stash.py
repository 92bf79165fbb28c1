"""Where masters and moments wait while an augmentation builds the new engine.

The old engine's flat tensors can only be freed as a whole, and the new engine allocates its own, so everything waits
outside of both: state on a device in host memory, state in host memory (no GPU, or an offloaded optimizer) in files of
the system's temporary folder (`TMPDIR`). At no moment does a process hold more of a state beside its own share than
one parameter's.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from deepspeed.runtime.engine import DeepSpeedEngine
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pretrain.checkpoint_format import Fragment
from pretrain.errors import EspalierError
from pretrain.optimizer_state import OptimizerState, gather, optimizer_state
from pretrain.partitioned import shape_of
from pretrain.processes import together


class Stash:
    """What this process owns of every parameter, from an engine that is about to be torn down; a context manager, and
    a collective to enter."""

    def __init__(self, engine: DeepSpeedEngine) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="espalier_stash_", ignore_cleanup_errors=True)
        self._kept: dict[tuple[str, str], list[Fragment]] = {}
        self._start_in_file: dict[str, int] = {}
        parameters = engine.module.trained_parameters()
        self._shapes = {name: shape_of(parameter) for name, parameter in parameters.items()}
        self._places = {name: place for place, name in enumerate(parameters)}
        self._device = next(iter(parameters.values())).device
        state = optimizer_state(engine)
        self.counters = state.counters()
        together(lambda: self._fill(state))

    def __enter__(self) -> "Stash":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._folder.cleanup()

    def _fill(self, state: OptimizerState) -> None:
        for fragment in state.fragments():
            values = fragment.values.detach()
            if values.device.type == "cpu":
                self._write(fragment)
            else:
                copy = Fragment(fragment.name, fragment.key, fragment.start, values.to("cpu"))
                self._kept.setdefault((fragment.name, fragment.key), []).append(copy)

    def _file(self, name: str, key: str) -> Path:
        return Path(self._folder.name, f"{self._places[name]}_{key}.safetensors")

    def _write(self, fragment: Fragment) -> None:
        self._start_in_file[fragment.name] = fragment.start
        try:
            save_file({"values": fragment.values.detach()}, self._file(fragment.name, fragment.key))
        except (OSError, SafetensorError) as error:
            raise EspalierError(
                f"the optimizer's state could not be set aside in {self._folder.name} ({error}): free space there, or "
                "set TMPDIR to a folder with room for it"
            ) from error

    def take(self, name: str, key: str) -> Tensor:
        """One parameter's whole shard of one state on every data-parallel process; once, and a collective over them."""
        return gather(self._fragments(name, key), self._shapes[name], self._device)

    def _fragments(self, name: str, key: str) -> Iterator[Fragment]:
        yield from self._kept.pop((name, key), [])
        if name in self._start_in_file:
            file = self._file(name, key)
            values = load_file(file)["values"]
            file.unlink()
            yield Fragment(name, key, self._start_in_file[name], values)
