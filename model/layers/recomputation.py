"""Activation checkpointing: a transformer layer that keeps little between its forward and its backward pass.

| `recompute` | a layer keeps                                     | its backward pass computes again                   |
|-------------|---------------------------------------------------|----------------------------------------------------|
| `none`      | all that autograd saves                           | nothing                                            |
| `factors`   | its input, and what the bottlenecks' sums brought | what hangs off B, no collective, no product with A |
| `layers`    | its input                                         | everything, collectives included                   |

`torch.utils.checkpoint` does it (without reentrance): megatron-core 0.16.1's own checkpointing saves the states of CUDA
generators and raises on a CPU. There is no generator state to save here, because dropout draws its masks from counters;
they are set back to where they stood in the forward pass. For `factors` a tape keeps what `model/layers/bottleneck.py`
gets from its products with A, and plays it back instead of computing and communicating again. (With more
tensor-parallel processes than query groups megatron-core 0.16.1 gathers q, k and v between B and attention: this is
done again.)
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain, repeat
from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from model.config import Recompute
from model.layers.dropout import DropoutCounter


class _Tape:
    """What one forward pass of a layer computed once and for all, in order."""

    def __init__(self) -> None:
        self._results: list[Tensor] = []
        self._complete = False
        self._position = 0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Records the first time, and plays back from the beginning every time after that."""
        global _running
        self._position = 0
        before, _running = _running, self
        try:
            yield
        finally:
            _running = before
        self._complete = True

    def next(self, compute: Callable[[], Tensor]) -> Tensor:
        if self._complete:
            self._position += 1
            return self._results[self._position - 1].detach()
        result = compute()
        # Without its history: a graph that held the tape, and was held by it, would never be freed.
        self._results.append(result.detach())
        return result


_running: _Tape | None = None
"""A plain variable, for `torch.compile` cannot look into a `ContextVar` (21 breaks of its graph a layer). It is right
in threads, too: on CUDA a layer runs again in autograd's own thread, but the thread that called `backward` waits for it
then, and a process has one device and so one such thread. Layers never run in two threads at once."""


def kept(compute: Callable[[], Tensor]) -> Tensor:
    """The result of `compute`; inside a layer that recomputes `factors`, what its forward pass got."""
    return compute() if _running is None else _running.next(compute)


class RecomputedLayer(TransformerLayer):
    """megatron-core's layer, run again in the backward pass."""

    def __init__(self, *args: Any, recompute: Recompute, counter: DropoutCounter, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._recompute, self._counter = recompute, counter
        self.recomputing: Callable[[], AbstractContextManager] = nullcontext
        """What the second forward pass runs in, beside what it is here; ZeRO 3 has something to add."""

    def forward(self, hidden_states: Tensor, **inputs: Any) -> tuple[Tensor, Tensor | None]:
        """`hidden_states` and the first result `(seq, batch, width of the stream on this process)`."""
        if not torch.is_grad_enabled():
            return super().forward(hidden_states, **inputs)
        step, micro_step, tape = self._counter.step, self._counter.micro_step, _Tape()
        forward = super().forward
        passes = chain([nullcontext], repeat(self.recomputing))

        def run(hidden_states: Tensor) -> tuple[Tensor, Tensor | None]:
            taped = tape.running() if self._recompute == "factors" else nullcontext()
            with next(passes)(), self._counter.at(step, micro_step), taped:
                return forward(hidden_states, **inputs)

        # To the end, although the last sums are not needed: stopped halfway, a module's forward hooks (ZeRO stage 3 has
        # its own) would see the beginning of a forward pass alone.
        return checkpoint(run, hidden_states, use_reentrant=False, preserve_rng_state=False, early_stop=False)
