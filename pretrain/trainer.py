"""What one run consists of, and its moves: a training step, a validation, an augmentation, a checkpoint.

`Trainer` holds everything that lives as long as the run; `TrainState` everything that a resumed run must know besides
masters and moments. The loop that makes the moves is in `pretrain/train.py`.
"""

import math
import statistics
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.arithmetic import gram_flops, probe_flops_per_token
from model.config import factored_projections, round_up
from model.gpt import EspalierModel, build_model, tensor_layouts
from model.process_groups import data_group, data_index, device, tensor_index, tensor_size
from pretrain.augmentation import (
    GrowthRecord,
    RankMeasurement,
    augment,
    layer_measurements,
    measure_spectra,
    measure_updates,
    plan_growth,
)
from pretrain.checkpoint_format import KEYS
from pretrain.checkpoint_reader import CheckpointReader
from pretrain.checkpoint_writer import write_checkpoint
from pretrain.config import RunConfig
from pretrain.corpus import Corpus, batch_at, micro_batch_start
from pretrain.deepspeed_config import deepspeed_dict
from pretrain.engine import build_engine, gradient_norm, set_learning_rate
from pretrain.errors import CheckpointError, NumericalError
from pretrain.initial_values import initial_factors, initial_model
from pretrain.layout import Layout
from pretrain.monitor import StepMetrics
from pretrain.optimizer_state import frozen_fragments, optimizer_state
from pretrain.policies import affordable_parameters, build_policy
from pretrain.policies.explained_ratio import untrained_ranks
from pretrain.policies.gradient import PROBED_STEPS
from pretrain.probe import GradientProbe
from pretrain.processes import is_first_process, together
from pretrain.schedule import global_batch_at, learning_rate, samples_before
from pretrain.spectrum_report import Measurement
from pretrain.tracking import Tracker

# fp16 skips a handful of steps while it looks for its loss scale; a run that skips this many in a row is not coming
# back.
_SKIPS_IN_A_ROW = 40


PROBE_NAME = "probe.safetensors"
"""Extra file of a checkpoint written between two probed steps."""


@dataclass
class TrainState:
    """Where the run stands."""

    step: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    growth: list[GrowthRecord] = field(default_factory=list)


@dataclass(frozen=True)
class Validation:
    """What a validation found."""

    lm_loss: float
    """Mean over all predicted tokens, in nats per token."""
    bits_per_byte: float | None = None
    """Causal objective only: hidden tokens are no text."""
    accuracy: float | None = None
    """Share of the tokens predicted right; masked objective only."""


@dataclass(frozen=True)
class Decision:
    """What came of asking the policy, and what asking cost."""

    growth: GrowthRecord | None
    """None: ranks stay."""
    seconds: float
    """Of measuring and deciding, and what probed steps took more than the steps between; without the growth."""
    flops: float
    """Of Gram matrices, and of the probes in the steps before."""


class Trainer:
    """One run on the present process groups."""

    def __init__(self, config: RunConfig, layout: Layout, corpus: Corpus, reader: CheckpointReader | None) -> None:
        self.config, self.layout, self.corpus = config, layout, corpus
        self.state = TrainState()
        self.policy = build_policy(config.rank, config.train.steps)
        self.probe = GradientProbe(config.rank.probe, config.run.seed) if "demand" in self.policy.needs else None
        self._plain_seconds: list[float] = []
        self._probed_seconds: list[float] = []
        self.tracker = together(lambda: Tracker(config)) if config.rank.track else None
        if reader is None:
            self.engine = self._new_engine(together(lambda: initial_model(config)))
        else:
            self.engine = self._new_engine(build_model(config.model, reader.state["ranks"], seed=config.run.seed))
            self._restore(reader)
        updates_needed = "update" in self.policy.needs
        self._initial = together(lambda: initial_factors(self.model, config)) if updates_needed else {}

    @property
    def model(self) -> EspalierModel:
        return self.engine.module

    def _new_engine(self, model: EspalierModel) -> DeepSpeedEngine:
        return build_engine(model, self.config.optimizer, deepspeed_dict(self.config, self.layout))

    # Steps ------------------------------------------------------------------------------------------------------------

    def train_step(self) -> StepMetrics:
        """One optimizer step on the next unseen samples."""
        start = time.perf_counter()
        train, state = self.config.train, self.state
        sequences = self._global_batch(state.step)
        accumulation = sequences // (train.micro_batch * self.layout.data)
        self.engine.set_train_batch_size(sequences)
        rate = learning_rate(state.step, self.config.schedule, self.config.optimizer, train.steps)
        set_learning_rate(self.engine, rate)
        if self.tracker is not None and self.validates_after(state.step + 1):
            self.tracker.watch_gradients(self.engine)
        total, norm = torch.zeros((), device=device()), math.nan
        probed = self._steps_to_probed_decision()
        if self.probe is not None and probed is not None:
            self.probe.attach(self.model, state.step, probed)
        loss_scale = self._loss_scale()
        for micro_step in range(accumulation):
            self.model.dropout_counter.step, self.model.dropout_counter.micro_step = state.step, micro_step
            first = micro_batch_start(
                state.consumed_samples, micro_step, train.micro_batch, data_index(), self.layout.data
            )
            # Said and not counted: DeepSpeed's own count of micro-steps goes wrong when a batch ramp changes their
            # number.
            self.engine.set_gradient_accumulation_boundary(micro_step == accumulation - 1)
            loss = self._mean_loss(batch_at(self.corpus.train, first, train.micro_batch))
            self.engine.backward(loss)
            if self.config.deepspeed.stage == 0 and micro_step == accumulation - 1:
                norm = gradient_norm(self.engine)
                self._refuse_non_finite(norm)
            self.engine.step()
            total += loss.detach()
        dist.all_reduce(total, group=data_group())
        if self.probe is not None and probed is not None:
            self._refuse_non_finite_weights()
            self.probe.collect(self.model, loss_scale or 1.0)
        self._count(sequences)
        norm = norm if self.config.deepspeed.stage == 0 else gradient_norm(self.engine)
        seconds = time.perf_counter() - start
        if self.probe is not None:
            (self._plain_seconds if probed is None else self._probed_seconds).append(seconds)
        return StepMetrics(
            lm_loss=float(total) / (accumulation * self.layout.data),
            grad_norm=norm,
            learning_rate=rate,
            global_batch=sequences,
            loss_scale=self._loss_scale(),
            skipped_steps=state.skipped_steps,
            consumed_samples=state.consumed_samples,
            consumed_tokens=state.consumed_tokens,
            step_seconds=seconds,
        )

    def _mean_loss(self, batch: dict[str, Tensor]) -> Tensor:
        batch = {key: values.to(device()) for key, values in batch.items()}
        losses = self.engine(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
        return (losses * batch["loss_mask"]).sum() / batch["loss_mask"].sum()

    def _count(self, sequences: int) -> None:
        state = self.state
        state.step += 1
        state.consumed_samples += sequences
        state.consumed_tokens += sequences * self.config.model.sequence_length
        if self.engine.was_step_applied():
            state.skipped_in_a_row = 0
            return
        state.skipped_steps += 1
        state.skipped_in_a_row += 1
        if state.skipped_in_a_row >= _SKIPS_IN_A_ROW:
            raise _agreed(
                f"the gradient was not finite in {state.skipped_in_a_row} steps in a row, up to step {state.step}: "
                "lower optimizer.learning_rate, or set train.precision to bf16 or fp32"
            )

    def _refuse_non_finite(self, norm: float) -> None:
        if not math.isfinite(norm):
            raise _agreed(
                f"the gradient norm of step {self.state.step} is {norm}, and deepspeed.stage 0 cannot skip a step: "
                "lower optimizer.learning_rate, or set deepspeed.stage=1"
            )

    def _refuse_non_finite_weights(self) -> None:
        """Before anything measures or saves the weights: a spectrum of NaN is an error without a sentence."""
        finite = torch.stack([parameter.detach().isfinite().all() for parameter in self.model.parameters()]).all().int()
        dist.all_reduce(finite, op=dist.ReduceOp.MIN)
        if not finite:
            raise _agreed(
                f"there are weights that are not finite after step {self.state.step}: lower optimizer.learning_rate; "
                "the checkpoints are from before"
            )

    def _loss_scale(self) -> float | None:
        return float(self.engine.optimizer.cur_scale) if self.config.train.precision == "fp16" else None

    @torch.no_grad()
    def validate(self) -> Validation:
        """What the model makes of the validation sequences, always the same ones."""
        micro_batch = self.config.train.micro_batch
        byte_lengths = torch.from_numpy(self.corpus.tokenizer.byte_lengths())
        masked = self.config.train.objective == "mlm"
        sums = torch.zeros(3, dtype=torch.float64)
        self._refuse_non_finite_weights()
        self.engine.eval()
        for micro_step in range(validation_samples(self.config, self.layout) // (micro_batch * self.layout.data)):
            batch = self._validation_batch(micro_step)
            mask = batch["loss_mask"].double()
            logits = self.engine(batch["tokens"].to(device()), batch["position_ids"].to(device()), None)
            losses = self.model.compute_language_model_loss(batch["labels"].to(device()), logits.transpose(0, 1))
            counted = self._right_tokens(logits, batch) if masked else byte_lengths[batch["labels"]]
            sums += torch.stack([(values * mask).sum() for values in (losses.cpu().double(), mask, counted)])
        self.engine.train()
        sums = sums.to(device())
        dist.all_reduce(sums, group=data_group())
        nats, tokens, counted = sums.tolist()
        if masked:
            return Validation(nats / tokens, accuracy=counted / tokens)
        return Validation(nats / tokens, bits_per_byte=nats / math.log(2) / counted)

    def _right_tokens(self, logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return self.model.likeliest_tokens(logits).cpu() == batch["labels"]

    def validates_after(self, step: int) -> bool:
        """Whether `step` is the last one or one of every `train.validate_every`."""
        every = self.config.train.validate_every
        return step == self.config.train.steps or (every > 0 and step % every == 0)

    def _validation_batch(self, micro_step: int) -> dict[str, Tensor]:
        micro_batch = self.config.train.micro_batch
        first = micro_batch_start(0, micro_step, micro_batch, data_index(), self.layout.data)
        return batch_at(self.corpus.validation, first, micro_batch)

    def track(self, tracker: Tracker) -> Measurement:
        """Spectra of the updates so far, of the step's gradients, and of representations if there are validation
        samples."""
        self._refuse_non_finite_weights()
        return tracker.measure(self.engine, None if self.corpus.validation is None else self._validation_batch(0))

    # Ranks ------------------------------------------------------------------------------------------------------------

    def decide_if_due(self) -> Decision | None:
        """Asks the policy, and carries out what it wants; None when it has nothing to decide after this step."""
        start, step = time.perf_counter(), self.state.step
        if not self.policy.due(step):
            return None
        self._refuse_non_finite_weights()
        flops = self._measurement_flops()
        measured = self._measure()
        plan = plan_growth(self.model, self.policy, self.config.rank, step, measured, self._affordable_parameters())
        seconds = time.perf_counter() - start + self._extra_seconds()
        if plan is None:
            return Decision(None, seconds, flops)
        directed = measured.demand if self.config.rank.directed else {}
        self.engine, record = augment(
            self.engine,
            plan,
            rebuild=self._new_engine,
            seed=self.config.run.seed,
            consumed_samples=self.state.consumed_samples,
            directions={name: demand.rows for name, demand in directed.items()},
        )
        self.state.growth.append(record)
        return Decision(record, seconds, flops)

    def _measure(self) -> RankMeasurement:
        needs = self.policy.needs
        return RankMeasurement(
            product=self.spectra() if "product" in needs else {},
            update=measure_updates(self.model, self._initial) if "update" in needs else {},
            demand={} if self.probe is None else self.probe.demand(self.model),
        )

    def _measurement_flops(self) -> float:
        """Of what the coming decision is told: Gram matrices, and the probes of the steps before."""
        config, ranks, flops = self.config.model, self.model.ranks(), 0
        if "product" in self.policy.needs:
            flops += gram_flops(config, ranks)
        if "update" in self.policy.needs:
            flops += gram_flops(config, {name: rank + len(self._initial[name][0]) for name, rank in ranks.items()})
        if self.probe is not None and self.probe.measuring:
            batches = [self._global_batch(self.state.step - left) for left in range(1, PROBED_STEPS + 1)]
            tokens = sum(batches) * config.sequence_length
            flops += tokens * probe_flops_per_token(config, ranks, self.config.rank.probe)
        return float(flops)

    def _extra_seconds(self) -> float:
        """What probed steps took more since the last decision than the plain ones between; 0 without either."""
        plain, probed = self._plain_seconds, self._probed_seconds
        self._plain_seconds, self._probed_seconds = [], []
        return sum(probed) - len(probed) * statistics.median(plain) if plain else 0.0

    def _global_batch(self, step: int) -> int:
        return global_batch_at(step, self.config.train.global_batch, self.config.train.batch_ramp)

    def _affordable_parameters(self) -> int | None:
        return affordable_parameters(
            self.config.rank,
            factored_projections(self.config.model),
            self.model.ranks(),
            [asdict(record) for record in self.state.growth],
            self.state.consumed_samples,
            samples_of_the_run(self.config, self.state.step, self.state.consumed_samples),
        )

    def _steps_to_probed_decision(self) -> int | None:
        """How many steps from now a decision waits for this step's gradient; None: it is an ordinary step."""
        if self.probe is None:
            return None
        ahead = (left for left in range(1, PROBED_STEPS + 1) if self.policy.due(self.state.step + left))
        return next(ahead, None)

    def mean_untrained_rank(self) -> float:
        """The null of the explained-ratio rule: the mean rank it would reach if training never changed the factors."""
        layers = layer_measurements(self.model, RankMeasurement(product=self.spectra()))
        ranks = untrained_ranks(layers, self.config.rank)
        return sum(ranks.values()) / len(ranks)

    def spectra(self) -> dict[str, Tensor]:
        """Singular values of every factored layer."""
        return measure_spectra(self.model)

    # Checkpoints ------------------------------------------------------------------------------------------------------

    def save(self, root: Path) -> Path:
        """Writes a checkpoint of the present step below `root`; a collective over all processes."""
        self._refuse_non_finite_weights()
        adapter = optimizer_state(self.engine)
        probed = {} if self.probe is None else self.probe.tensors(self.model)
        extra_files = {"tokenizer.model": Path(self.config.data.tokenizer)}
        with ExitStack() as stack:
            if probed:
                extra_files[PROBE_NAME] = together(lambda: _written_probe(probed, stack))
            return write_checkpoint(
                root,
                self.state.step,
                chain(adapter.fragments(), frozen_fragments(self.model)),
                tensor_layouts(self.model),
                self._record(adapter.counters()),
                tensor_index=tensor_index(),
                tensor_size=tensor_size(),
                keep=self.config.checkpoint.keep,
                extra_files=extra_files,
                frozen={name for name, p in self.model.named_parameters() if not p.requires_grad},
            )

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
                parameter.detach().copy_(reader.read_shard(name, "master", tensor_index(), tensor_size()))
                continue
            shard = {key: reader.read_shard(name, key, tensor_index(), tensor_size()) for key in KEYS}
            adapter.load(name, {key: values.to(parameter.device) for key, values in shard.items()})
        adapter.finish_loading()
        adapter.load_counters(reader.state["optimizer"])
        growth = [GrowthRecord(**record) for record in reader.state["growth"]]
        self.state = TrainState(**reader.state["train"], growth=growth)
        if self.probe is not None and PROBE_NAME in reader.extra_files:
            self.probe.load(self.model, load_file(reader.extra_file(PROBE_NAME)))


def _written_probe(tensors: dict[str, Tensor], stack: ExitStack) -> Path:
    """A file with `tensors` that lasts as long as `stack`, on process 0, from which checkpoints take extra files."""
    if not is_first_process():
        return Path(PROBE_NAME)
    try:
        path = Path(stack.enter_context(tempfile.TemporaryDirectory())) / PROBE_NAME
        save_file(tensors, path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{PROBE_NAME} could not be written ({error}): free space in the temporary folder, or set TMPDIR"
        ) from error
    return path


def validation_samples(config: RunConfig, layout: Layout) -> int:
    """Sequences of one validation: `train.validation_sequences`, rounded up to whole micro-steps."""
    return round_up(config.train.validation_sequences, config.train.micro_batch * layout.data)


def samples_of_the_run(config: RunConfig, step: int, consumed: int) -> int:
    """Sequences consumed at the end by a run that has `consumed` behind it at `step`, whatever its batches were."""
    train = config.train
    end, now = (samples_before(moment, train.global_batch, train.batch_ramp) for moment in (train.steps, step))
    return consumed + end - now


def _agreed(message: str) -> NumericalError:
    error = NumericalError(message)
    error.agreed = True  # the norm is the same on all processes
    return error
