"""Masters and moments inside DeepSpeed's optimizers: one adapter per optimizer class.

| ZeRO stage | DeepSpeed 0.19.8's class  | what this process owns                                             |
|------------|---------------------------|--------------------------------------------------------------------|
| 0 (fp32)   | torch's AdamW itself      | everything; the parameter is the master                            |
| 1, 2       | `DeepSpeedZeroOptimizer`  | its slice of one flat fp32 tensor per parameter group, and moments |
| 3          | `..._Stage3`              | its slice of every parameter, in flat fp32 tensors, and moments    |

With the optimizer offloaded (stages 1 to 3) the same tensors lie in host memory. An adapter names the fragments this
process owns as (parameter, flat start, values) without a collective: checkpoints write them as they are, a growth
event gathers one parameter at a time from them. It reads private attributes of DeepSpeed (`_hp_mapping`,
`single_partition_of_fp32_groups`, `bit16_groups`; `fp16_groups`, `fp32_partitioned_groups_flat`,
`_reassign_or_swap_out_partitioned_parameters`): `tests/pretrain/engine/test_optimizer_state.py` fails when a release
moves them. DeepSpeed's public `safe_get_*` will not do: before the first step it raises on one process and leaves the
other waiting, and with several parameter groups it misses all moments but the first group's.

Frozen parameters are in no optimizer, and a growth event leaves them where they are; `frozen_fragments` names what a
checkpoint keeps of them.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor

from model.gpt import EspalierModel
from model.process_groups import data_group, data_index, data_size
from pretrain.checkpoint.format import KEYS, Fragment
from pretrain.engine.zero3 import drop_gathered, held, is_partitioned

# What a dynamic loss scaler counts; the rest of it is configuration.
_SCALER_COUNTERS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


@dataclass(frozen=True)
class _Slice:
    """A piece of one parameter and where its master and moments lie: `states[key][offset : offset + length]`."""

    name: str
    start: int
    length: int
    offset: int
    states: dict[str, Tensor]


class OptimizerState(Protocol):
    """Masters and moments of an engine, by parameter name."""

    def fragments(self) -> Iterator[Fragment]:
        """The fragments this process owns, as views; over all data-parallel processes they cover each shard once."""

    def load(self, name: str, shard: Mapping[str, Tensor]) -> None:
        """Takes this process's part of one parameter's states, those that are in `shard`; each has the shape of the
        parameter's shard."""

    def finish_loading(self) -> None:
        """Makes the parameters that compute agree with the masters; after the last `load`, on all processes."""

    def counters(self) -> dict[str, Any]:
        """Adam's step count and the loss scaler's counters; JSON-able."""

    def load_counters(self, counters: Mapping[str, Any]) -> None:
        """Takes what `counters` gave."""


def optimizer_state(engine: DeepSpeedEngine) -> OptimizerState:
    """The adapter for the engine's optimizer; moments exist from here on, zero before the first step."""
    if isinstance(engine.optimizer, DeepSpeedZeroOptimizer):
        return _ZeroState(engine)
    if isinstance(engine.optimizer, DeepSpeedZeroOptimizer_Stage3):
        return _PartitionedState(engine)
    if isinstance(engine.optimizer, torch.optim.AdamW):
        return _PlainState(engine)
    raise TypeError(f"no adapter for optimizer class {type(engine.optimizer).__name__}")


class _AdamState:
    """What the adapters share: slices, by parameter, over fp32 tensors that torch's AdamW steps."""

    def __init__(self, adam: torch.optim.AdamW, masters: list[Tensor]) -> None:
        self.adam, self.masters = adam, masters
        for master in masters:
            self._prime(master)
        self._slices: dict[str, list[_Slice]] = {}

    def _own(self, piece: _Slice) -> None:
        self._slices.setdefault(piece.name, []).append(piece)

    def _prime(self, master: Tensor) -> None:
        """AdamW makes its state at the first step; a restored one needs it before. Same values, same types."""
        if not self.adam.state[master]:
            self.adam.state[master].update(
                step=torch.zeros((), dtype=torch.float32, device=master.device),
                exp_avg=torch.zeros_like(master),
                exp_avg_sq=torch.zeros_like(master),
            )

    def _states(self, master: Tensor) -> dict[str, Tensor]:
        state = self.adam.state[master]
        moments = {key: state[key].view(-1) for key in KEYS if key != "master"}
        return {"master": master.detach().view(-1), **moments}

    def fragments(self) -> Iterator[Fragment]:
        for piece in chain.from_iterable(self._slices.values()):
            for key in KEYS:
                values = piece.states[key].narrow(0, piece.offset, piece.length)
                yield Fragment(piece.name, key, piece.start, values)

    def load(self, name: str, shard: Mapping[str, Tensor]) -> None:
        for piece in self._slices.get(name, ()):  # none where all of it lies with other processes
            for key, values in shard.items():
                part = values.reshape(-1).narrow(0, piece.start, piece.length)
                piece.states[key].narrow(0, piece.offset, piece.length).copy_(part)

    def counters(self) -> dict[str, Any]:
        return {"adam_step": float(self.adam.state[self.masters[0]]["step"])}

    def load_counters(self, counters: Mapping[str, Any]) -> None:
        for master in self.masters:
            self.adam.state[master]["step"].fill_(counters["adam_step"])


class _PlainState(_AdamState):
    """ZeRO 0 in fp32: every data-parallel process holds everything, the first one speaks for all."""

    def __init__(self, engine: DeepSpeedEngine) -> None:
        named = engine.module.trained_parameters()
        super().__init__(engine.optimizer, list(named.values()))
        for name, p in named.items():
            self._own(_Slice(name, 0, p.numel(), 0, self._states(p)))

    def fragments(self) -> Iterator[Fragment]:
        if data_index() == 0:
            yield from super().fragments()

    def finish_loading(self) -> None:
        """The parameters are the masters."""


class _ScaledState(_AdamState):
    """What the stages of ZeRO share: a loss scaler."""

    def __init__(self, zero: DeepSpeedZeroOptimizer | DeepSpeedZeroOptimizer_Stage3, masters: list[Tensor]) -> None:
        self.zero = zero
        super().__init__(zero.optimizer, masters)

    def counters(self) -> dict[str, Any]:
        scaler = self.zero.loss_scaler
        counts = {key: getattr(scaler, key) for key in _SCALER_COUNTERS if hasattr(scaler, key)}
        return {**super().counters(), "loss_scaler": counts}

    def load_counters(self, counters: Mapping[str, Any]) -> None:
        super().load_counters(counters)
        for key, value in counters.get("loss_scaler", {}).items():  # ZeRO 0 has none
            setattr(self.zero.loss_scaler, key, value)


class _ZeroState(_ScaledState):
    """ZeRO 1 and 2: slices of one flat master per parameter group."""

    def __init__(self, engine: DeepSpeedEngine) -> None:
        super().__init__(engine.optimizer, engine.optimizer.single_partition_of_fp32_groups)
        names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
        for group, master in zip(self.zero.bit16_groups, self.masters, strict=True):
            states = self._states(master)
            for parameter in group:
                mapping = parameter._hp_mapping
                if mapping is None:  # all of it lies with other processes
                    continue
                inside, flat = mapping.lp_fragment_address, mapping.hp_fragment_address
                self._own(_Slice(names[id(parameter)], inside.start, inside.numel, flat.start, states))

    def finish_loading(self) -> None:
        self.zero.update_lp_params()


class _PartitionedState(_ScaledState):
    """ZeRO 3: every process's equal slice of each parameter, one behind the other in one flat master per sub-group."""

    def __init__(self, engine: DeepSpeedEngine) -> None:
        super().__init__(engine.optimizer, engine.optimizer.fp32_partitioned_groups_flat)
        self.parameters = dict(engine.module.named_parameters())
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        for group, master in zip(self.zero.fp16_groups, self.masters, strict=True):
            states, offset = self._states(master), 0
            for parameter in group:
                start, values = held(parameter)
                if len(values):
                    self._own(_Slice(names[id(parameter)], start, len(values), offset, states))
                offset += parameter.partition_numel()

    def finish_loading(self) -> None:
        for sub_group in range(len(self.masters)):
            self.zero._reassign_or_swap_out_partitioned_parameters(sub_group)
        drop_gathered(self.parameters.values())


def frozen_fragments(model: EspalierModel) -> Iterator[Fragment]:
    """The parameters that never change, as views; the whole ones from the first data-parallel process, for all hold
    the same.

    They have no moments, and in a 16-bit run no fp32 master either: what is kept are the 16-bit values.
    """
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad and (data_index() == 0 or is_partitioned(parameter)):
            start, values = held(parameter)
            if len(values):
                yield Fragment(name, "master", start, values)


def gather(fragments: Iterable[Fragment], shape: torch.Size, device: torch.device) -> Tensor:
    """The whole shard of one parameter and key on every data-parallel process; a collective over them. The host does
    not wait for copies to the device."""
    pieces = list(fragments)
    if data_size() == 1 and len(pieces) == 1:
        return pieces[0].values.to(device, non_blocking=True).view(shape)
    whole = torch.zeros(shape.numel(), device=device)
    for piece in pieces:
        whole.narrow(0, piece.start, piece.values.numel()).copy_(piece.values, non_blocking=True)
    if data_size() > 1:
        dist.all_reduce(whole, group=data_group())
    return whole.view(shape)
