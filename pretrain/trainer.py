"""What one run consists of, and its moves: a training step, a validation, a growth event, a checkpoint.

`Trainer` holds everything that lives as long as the run. `pretrain/growth/rank_control.py` measures for the policy and
asks it; the loop that makes the moves is in `pretrain/train.py`.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor

from model.config import round_up
from model.gpt import EspalierModel, build_model, tensor_layouts
from model.process_groups import data_index, device, tensor_index, tensor_size
from pretrain.agreement import NO_FLAGS, Flags, agree
from pretrain.checkpoint.format import KEYS, Fragment
from pretrain.checkpoint.reader import CheckpointReader
from pretrain.checkpoint.retention import Retention
from pretrain.checkpoint.writer import CheckpointWrite, Content
from pretrain.config.parallel import ParallelLayout
from pretrain.config.run import RunConfig
from pretrain.data.corpus import Corpus, batch_at, micro_batch_start, model_inputs
from pretrain.data.prefetch import Prefetch, on_device, training_starts
from pretrain.distributed import together
from pretrain.engine.build import build_engine, evaluating, set_learning_rate
from pretrain.engine.deepspeed_config import deepspeed_dict
from pretrain.engine.gradient_scan import list_norms, norm_of, set_squared_norm, squared_norm
from pretrain.engine.optimizer_state import frozen_fragments, optimizer_state
from pretrain.engine.replica_check import check_replicas
from pretrain.engine.zero3 import drop_gathered, held, hold
from pretrain.errors import agreed
from pretrain.growth.event import change_ranks
from pretrain.growth.initial_values import initial_model
from pretrain.growth.rank_control import Answer, RankControl
from pretrain.growth.spectra import measure_spectra
from pretrain.loss import LossSums, token_losses
from pretrain.monitor.spectrum_report import Measurement
from pretrain.monitor.tracking import Tracker
from pretrain.resilience import heartbeat
from pretrain.resilience.fault_injection import loss_factor
from pretrain.schedule import global_batch_at, learning_rate
from pretrain.train_state import GrowthRecord, StepMetrics, TrainState, Validation, saved_progress


@dataclass(frozen=True)
class Decision:
    """The policy's answer, and what was done about it."""

    answer: Answer
    growth: GrowthRecord | None
    """The growth that was carried out; None if ranks stay."""


class Trainer:
    """One run on the present process groups."""

    def __init__(
        self, config: RunConfig, layout: ParallelLayout, corpus: Corpus, reader: CheckpointReader | None
    ) -> None:
        self.config, self.layout, self.corpus = config, layout, corpus
        self.state = TrainState()
        self.flags = NO_FLAGS
        """Flags of all processes together, from the last step."""
        self._deepspeed = deepspeed_dict(config, layout)
        self._batches: Prefetch | None = None
        self.tracker = together(lambda: Tracker(config)) if config.rank.track else None
        if reader is None:
            self.engine = self._new_engine(together(lambda: initial_model(config)))
        else:
            ranks, recompute = reader.state["ranks"], config.train.recompute
            self.engine = self._new_engine(build_model(config.model, ranks, seed=config.run.seed, recompute=recompute))
            heartbeat.at("resume.built", reader.step)
            self._restore(reader)
            heartbeat.at("resume.restored")
        self.rank_control = RankControl(config, self.model)
        if reader is not None:
            self.rank_control.restore(self.model, reader)

    @property
    def model(self) -> EspalierModel:
        return self.engine.module

    def _new_engine(self, model: EspalierModel) -> DeepSpeedEngine:
        return build_engine(
            model,
            self.config.optimizer,
            deepcopy(self._deepspeed),
            compiled=self.config.train.compile,
        )

    # Steps ------------------------------------------------------------------------------------------------------------

    def train_step(self, flags: Callable[[], Flags] = lambda: NO_FLAGS) -> StepMetrics:
        """One optimizer step on the next unseen samples.

        `flags` gives this process's flags; it is called before the optimizer moves. Afterwards `self.flags` has those
        of all processes together.
        """
        start = time.perf_counter()
        train, state = self.config.train, self.state
        sequences = global_batch_at(state.step, train.global_batch, train.batch_ramp)
        accumulation = sequences // (train.micro_batch * self.layout.data)
        self.engine.set_train_batch_size(sequences)
        rate = learning_rate(state.step, self.config.schedule, self.config.optimizer, train.steps)
        set_learning_rate(self.engine, rate)
        if self.tracker is not None and self.validates_after(state.step + 1):
            self.tracker.watch_gradients(self.engine)
        total = torch.zeros((), device=device())
        self.rank_control.before_step(self.model, state.step)
        loss_scale = self._loss_scale()
        for micro_step in range(accumulation):
            self.model.dropout_counter.step, self.model.dropout_counter.micro_step = state.step, micro_step
            # Set by hand: DeepSpeed's own count of micro-steps goes wrong when a batch ramp changes their number.
            self.engine.set_gradient_accumulation_boundary(micro_step == accumulation - 1)
            heartbeat.at("step.forward", state.step)
            loss = _poisoned(self._mean_loss(self._next_batch()), state.step)
            self.engine.backward(loss)
            total += loss.detach()
            if micro_step < accumulation - 1:
                self.engine.step()
        heartbeat.at("step.optimizer")
        known = agree(total, squared_norm(self.engine), flags())
        self.flags = known.flags
        norm, applied = self._optimizer_step(known.squared_norm)
        if self.rank_control.probes(state.step):
            self._refuse_non_finite_weights()
            self.rank_control.after_step(self.model, loss_scale or 1.0)
        self._count(sequences, applied)
        seconds = time.perf_counter() - start
        self.rank_control.note_seconds(state.step - 1, seconds)
        return StepMetrics(
            lm_loss=known.loss / (accumulation * self.layout.data),
            grad_norm=norm,
            learning_rate=rate,
            global_batch=sequences,
            loss_scale=self._loss_scale(),
            skipped_steps=state.skipped_steps,
            consumed_samples=state.consumed_samples,
            consumed_tokens=state.consumed_tokens,
            step_seconds=seconds,
        )

    def _next_batch(self) -> dict[str, Tensor]:
        if self._batches is None:
            starts = training_starts(self.config.train, self.state.step, self.state.consumed_samples)
            self._batches = Prefetch(self.corpus.train, self.config.train.micro_batch, starts)
        return on_device(self._batches.take())

    def close(self) -> None:
        """Ends the thread that reads ahead."""
        if self._batches is not None:
            self._batches.close()

    def _mean_loss(self, batch: dict[str, Tensor]) -> Tensor:
        losses = self.engine(*model_inputs(self.config, batch), labels=batch["labels"])
        return (losses * batch["loss_mask"]).sum() / batch["loss_mask"].sum()

    def _optimizer_step(self, squares: float) -> tuple[float, bool]:
        """Steps the optimizer; the gradient's norm, and whether the step was taken. A gradient that is not finite
        changes nothing. Where ZeRO partitions the optimizer, DeepSpeed 0.19.8 skips that step, and calls the norm
        infinite."""
        if self.config.deepspeed.stage == 0 and not math.isfinite(norm := float(norm_of(squares))):
            self.model.zero_grad(set_to_none=True)
            return norm, False
        set_squared_norm(self.engine, squares)
        self.engine.step()
        norm = norm if self.config.deepspeed.stage == 0 else float(self.engine.get_global_grad_norm())
        return norm, bool(self.engine.was_step_applied())

    def _count(self, sequences: int, applied: bool) -> None:
        state = self.state
        state.step += 1
        state.consumed_samples += sequences
        state.consumed_tokens += sequences * self.config.model.sequence_length
        state.skipped_in_a_row = 0 if applied else state.skipped_in_a_row + 1
        state.skipped_steps += 0 if applied else 1

    def _refuse_non_finite_weights(self) -> None:
        """NumericalError if a weight is not finite. Called before anything measures or saves the weights: a spectrum of
        NaN would fail without saying why."""
        norms = list_norms([held(parameter)[1] for parameter in self.model.parameters()])
        finite = torch.stack(norms).isfinite().all().int()
        dist.all_reduce(finite, op=dist.ReduceOp.MIN)
        if not finite:
            raise agreed(
                f"there are weights that are not finite after step {self.state.step}: lower optimizer.learning_rate; "
                "the checkpoints are from before"
            )

    def _loss_scale(self) -> float | None:
        return float(self.engine.optimizer.cur_scale) if self.config.train.precision == "fp16" else None

    def validate(self) -> dict[str, Validation]:
        """Validates on every held-out set, by its name; always on the same sequences."""
        self._refuse_non_finite_weights()
        return {name: self._validate(samples) for name, samples in self.corpus.validation.items()}

    @torch.no_grad()
    def _validate(self, samples: Any) -> Validation:
        micro_batch = self.config.train.micro_batch
        masked = self.config.train.objective == "mlm"
        sums = LossSums()
        with evaluating(self.engine):
            for micro_step in range(validation_samples(self.config, self.layout) // (micro_batch * self.layout.data)):
                heartbeat.at("validation", self.state.step)
                batch = self._validation_batch(samples, micro_step)
                logits = self.engine(*model_inputs(self.config, batch))
                counted = self._right_tokens(logits, batch) if masked else self._byte_lengths[batch["labels"]]
                sums.add(token_losses(self.model, logits, batch["labels"]), batch["loss_mask"], counted)
        nats, tokens, found = sums.total()
        if masked:
            return Validation(nats / tokens, accuracy=found / tokens)
        return Validation(nats / tokens, bits_per_byte=nats / math.log(2) / found)

    def _right_tokens(self, logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return self.model.likeliest_tokens(logits) == batch["labels"]

    @cached_property
    def _byte_lengths(self) -> Tensor:
        """`(vocabulary,)`: bytes each token stands for."""
        return torch.from_numpy(self.corpus.tokenizer.byte_lengths()).to(device())

    def validates_after(self, step: int) -> bool:
        """Whether a validation follows step `step`: the last one, and every `train.validate_every`-th."""
        every = self.config.train.validate_every
        return step == self.config.train.steps or (every > 0 and step % every == 0)

    def _validation_batch(self, samples: Any, micro_step: int) -> dict[str, Tensor]:
        micro_batch = self.config.train.micro_batch
        first = micro_batch_start(0, micro_step, micro_batch, data_index(), self.layout.data)
        return on_device(batch_at(samples, first, micro_batch))

    def track(self, tracker: Tracker) -> Measurement:
        """Spectra of the updates so far, of the step's gradients, and of representations if there are validation
        samples."""
        self._refuse_non_finite_weights()
        held_out = next(iter(self.corpus.validation.values()), None)
        return tracker.measure(self.engine, None if held_out is None else self._validation_batch(held_out, 0))

    # Ranks ------------------------------------------------------------------------------------------------------------

    def decide_if_due(self) -> Decision | None:
        """Asks the policy and carries its answer out; None if no decision is due after this step."""
        if not self.rank_control.due(self.state.step):
            return None
        self._refuse_non_finite_weights()
        answer = self.rank_control.ask(self.model, self.state)
        if answer.plan is None:
            return Decision(answer, None)
        heartbeat.at("event.begin", self.state.step)
        self.engine, record = change_ranks(
            self.engine,
            answer.plan,
            rebuild=self._new_engine,
            seed=self.config.run.seed,
            consumed_samples=self.state.consumed_samples,
            directions=answer.directions,
        )
        self.state.growth.append(record)
        return Decision(answer, record)

    def mean_untrained_rank(self) -> float | None:
        """The mean rank that the policy would reach if training never changed the factors; None if it would not grow
        them."""
        return self.rank_control.mean_untrained_rank(self.model)

    def spectra(self) -> dict[str, Tensor]:
        """Singular values of every factored layer."""
        return measure_spectra(self.model)

    # Checkpoints ------------------------------------------------------------------------------------------------------

    def begin_checkpoint(self, root: Path, resources: ExitStack) -> tuple[CheckpointWrite, Iterator[Fragment]]:
        """Begins a checkpoint of the present step below `root`; the checkpoint, and this process's fragments for it. A
        collective. `resources` holds the files that the checkpoint needs until it is committed."""
        self._refuse_non_finite_weights()
        check_replicas(self.model)
        adapter, checkpoint = optimizer_state(self.engine), self.config.checkpoint
        extra_files = self.rank_control.extra_files(self.model, resources)
        extra_files |= self.corpus.tokenizer.files()
        content = Content(
            root,
            self.state.step,
            tensor_layouts(self.model),
            self._record(adapter.counters()),
            tensor_index=tensor_index(),
            tensor_size=tensor_size(),
            extra_files=extra_files,
            frozen={name for name, p in self.model.named_parameters() if not p.requires_grad},
        )
        write = CheckpointWrite(content, Retention(checkpoint.keep, checkpoint.keep_every))
        return write, chain(adapter.fragments(), frozen_fragments(self.model))

    def _record(self, counters: dict[str, Any]) -> dict[str, Any]:
        train = asdict(self.state)
        growth = train.pop("growth")
        tokenizer = self.corpus.tokenizer
        return {
            "model": self.config.model.model_dump(mode="json"),
            "ranks": self.model.ranks(),
            "growth": growth,
            "train": train,
            "optimizer": counters,
            "corpus": self.corpus.fingerprint,
            "tokenizer": {"fingerprint": tokenizer.fingerprint, "vocabulary": tokenizer.vocabulary},
            "config": self.config.model_dump(mode="json"),
            "layout": asdict(self.layout),
        }

    def _restore(self, reader: CheckpointReader) -> None:
        adapter = optimizer_state(self.engine)
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad:
                hold(parameter, reader.read_shard(name, "master", tensor_index(), tensor_size()))
                continue
            shard = {key: reader.read_shard(name, key, tensor_index(), tensor_size()) for key in KEYS}
            adapter.load(name, {key: values.to(parameter.device) for key, values in shard.items()})
        drop_gathered(p for p in self.model.parameters() if not p.requires_grad)
        adapter.finish_loading()
        adapter.load_counters(reader.state["optimizer"])
        self.state = saved_progress(reader.state)


def _poisoned(loss: Tensor, step: int) -> Tensor:
    """The loss, with a NaN gradient if the loss is not finite: DeepSpeed looks at gradients, and then skips the step on
    all processes. A finite loss is multiplied by 1, which changes no bit."""
    heartbeat.at("step.loss", step)
    loss = loss * loss_factor(step)
    return loss * torch.where(loss.detach().isfinite(), 1.0, math.nan)


def validation_samples(config: RunConfig, layout: ParallelLayout) -> int:
    """Sequences of one validation: `train.validation_sequences`, rounded up to whole micro-steps."""
    return round_up(config.train.validation_sequences, config.train.micro_batch * layout.data)
