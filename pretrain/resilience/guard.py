"""What may end a run or roll it back between two steps: signals, steps without a finite gradient, and loss spikes.

A spike is a loss far above what the last ones were, in robust standard deviations:

    z = (loss − median) / (1.4826 · MAD),      MAD = median |loss_i − median|

Every process decides the same, by what all agree on once a step (`pretrain/agreement.py`).
"""

import math
import signal
from collections import deque
from collections.abc import Callable
from statistics import median

from pretrain.agreement import Flags
from pretrain.config.run import GuardConfig
from pretrain.errors import StopSignal, agreed
from pretrain.resilience.signals import Signals
from pretrain.train_state import TrainState

_MAD_TO_DEVIATION = 1.4826
"""Standard deviation over MAD of normally distributed values."""
_SMALLEST_MAD = 1e-3
"""Smallest MAD, as a share of the median: after losses that hardly moved, a small rise is no spike."""
_SPIKES_IN_A_ROW = 5
"""After as many spikes in a row the higher loss counts as normal."""


class RollBack(Exception):
    """The run goes back to its newest checkpoint, and on with the samples after those consumed so far."""

    def __init__(self, reason: str, consumed_samples: int) -> None:
        super().__init__(reason)
        self.reason, self.consumed_samples = reason, consumed_samples


class Guard:
    """Watches the steps of one run."""

    def __init__(self, config: GuardConfig, signals: Signals) -> None:
        self.config, self.signals = config, signals
        self._losses: deque[float] = deque(maxlen=config.spike_window or None)
        self._spikes = 0

    def flags(self, writing: bool) -> Flags:
        """This process's flags; `writing`: whether it still writes its part of a checkpoint."""
        return Flags(self.signals.received, writing)

    @staticmethod
    def stop(number: int, step: int) -> StopSignal:
        """The end of a run that was saved at `step` because some process had received signal `number`."""
        name = signal.Signals(number).name
        return StopSignal(f"{name}: saved at step {step}; start the run again to go on", 128 + number)

    def judge(self, loss: float, state: TrainState, report: Callable[..., None]) -> None:
        """Judges the step that was just taken, from figures that are the same on all processes.

        Raises NumericalError or RollBack if the run cannot go on from here; `report` is `Monitor.log_record`.
        """
        config, deviations = self.config, self.deviations(loss)
        if deviations is not None:
            report("spike", state.step, lm_loss=loss, deviations=deviations)
            if config.on_spike != "warn":
                above = f"{deviations:.1f} robust deviations above the last {config.spike_window}"
                reason = f"the loss of step {state.step}, {loss:.4g}, is {above}: lower optimizer.learning_rate"
                self._roll_back_or_end(config.on_spike, reason, state)
        if state.skipped_in_a_row:
            report("skipped", state.step, in_a_row=state.skipped_in_a_row)
        if state.skipped_in_a_row >= config.skips:
            reason = f"the gradient was not finite in {state.skipped_in_a_row} steps in a row, up to step {state.step}"
            advice = "lower optimizer.learning_rate, or set train.precision to bf16 or fp32"
            self._roll_back_or_end(config.on_skips, f"{reason}: {advice}", state)

    @staticmethod
    def _roll_back_or_end(action: str, reason: str, state: TrainState) -> None:
        """RollBack if `action` is "rollback", else NumericalError; both say `reason`."""
        if action == "rollback":
            raise RollBack(reason, state.consumed_samples)
        raise agreed(reason)

    def deviations(self, loss: float) -> float | None:
        """Robust standard deviations of `loss` above the last losses if it is a spike, else None.

        A loss that is no spike joins those that later ones are compared with.
        """
        before, window = list(self._losses), self.config.spike_window
        if not window or not math.isfinite(loss):
            return None
        found = None
        if len(before) == window:
            middle = median(before)
            spread = median(abs(one - middle) for one in before)
            found = (loss - middle) / (_MAD_TO_DEVIATION * max(spread, _SMALLEST_MAD * abs(middle)))
        if found is None or found <= self.config.spike_deviations:
            self._spikes = 0
            self._losses.append(loss)
            return None
        self._spikes += 1
        if self._spikes >= _SPIKES_IN_A_ROW:
            self.forget()
        return found  # a spike does not join the losses that later ones are compared with

    def forget(self) -> None:
        """Forgets the last losses: ranks have changed, or the loss stays at another level."""
        self._losses.clear()
        self._spikes = 0
