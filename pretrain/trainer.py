"""What one run consists of, and its moves: a training step, a validation, an augmentation, a checkpoint.

`Trainer` holds everything that lives as long as the run; `TrainState` everything that a resumed run must know besides
masters and moments. The loop that makes the moves is in `pretrain/train.py`.
"""

import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor

from model.config import round_up
from model.gpt import EspalierModel, build_model, tensor_layouts
from model.process_groups import data_group, data_index, device, tensor_index, tensor_size
from pretrain.augmentation import GrowthRecord, augment, layer_measurements, measure_spectra, plan_growth
from pretrain.checkpoint_format import KEYS
from pretrain.checkpoint_reader import CheckpointReader
from pretrain.checkpoint_writer import write_checkpoint
from pretrain.config import RunConfig
from pretrain.corpus import Corpus, batch_at, micro_batch_start
from pretrain.deepspeed_config import deepspeed_dict
from pretrain.engine import build_engine, gradient_norm, set_learning_rate
from pretrain.errors import NumericalError
from pretrain.layout import Layout
from pretrain.monitor import StepMetrics
from pretrain.optimizer_state import optimizer_state
from pretrain.policies import build_policy
from pretrain.policies.explained_ratio import untrained_ranks
from pretrain.schedule import global_batch_at, learning_rate

# fp16 skips a handful of steps while it looks for its loss scale; a run that skips this many in a row is not coming
# back.
_SKIPS_IN_A_ROW = 40


@dataclass
class TrainState:
    """Where the run stands."""

    step: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    growth: list[GrowthRecord] = field(default_factory=list)


class Trainer:
    """One run on the present process groups."""

    def __init__(self, config: RunConfig, layout: Layout, corpus: Corpus, reader: CheckpointReader | None) -> None:
        self.config, self.layout, self.corpus = config, layout, corpus
        self.state = TrainState()
        self.policy = build_policy(config.rank)
        ranks = config.initial_ranks() if reader is None else reader.state["ranks"]
        self.engine = self._new_engine(build_model(config.model, ranks, seed=config.run.seed))
        if reader is not None:
            self._restore(reader)

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
        sequences = global_batch_at(state.step, train.global_batch, train.batch_ramp)
        accumulation = sequences // (train.micro_batch * self.layout.data)
        self.engine.set_train_batch_size(sequences)
        rate = learning_rate(state.step, self.config.schedule, self.config.optimizer, train.steps)
        set_learning_rate(self.engine, rate)
        total, norm = torch.zeros((), device=device()), math.nan
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
        self._count(sequences)
        return StepMetrics(
            lm_loss=float(total) / (accumulation * self.layout.data),
            grad_norm=norm if self.config.deepspeed.stage == 0 else gradient_norm(self.engine),
            learning_rate=rate,
            global_batch=sequences,
            loss_scale=self._loss_scale(),
            skipped_steps=state.skipped_steps,
            consumed_samples=state.consumed_samples,
            consumed_tokens=state.consumed_tokens,
            step_seconds=time.perf_counter() - start,
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
    def validate(self) -> tuple[float, float]:
        """Loss in nats a token and bits a byte over the validation sequences, always the same ones."""
        micro_batch = self.config.train.micro_batch
        byte_lengths = torch.from_numpy(self.corpus.tokenizer.byte_lengths())
        sums = torch.zeros(3, dtype=torch.float64)
        self._refuse_non_finite_weights()
        self.engine.eval()
        for micro_step in range(validation_samples(self.config, self.layout) // (micro_batch * self.layout.data)):
            first = micro_batch_start(0, micro_step, micro_batch, data_index(), self.layout.data)
            batch = batch_at(self.corpus.validation, first, micro_batch)
            mask = batch["loss_mask"].double()
            losses = self.engine(
                batch["tokens"].to(device()),
                batch["position_ids"].to(device()),
                None,
                labels=batch["labels"].to(device()),
            )
            length = byte_lengths[batch["labels"]].double()
            sums += torch.stack([(losses.cpu().double() * mask).sum(), mask.sum(), (length * mask).sum()])
        self.engine.train()
        sums = sums.to(device())
        dist.all_reduce(sums, group=data_group())
        nats, tokens, bytes_ = sums.tolist()
        return nats / tokens, nats / math.log(2) / bytes_

    # Ranks ------------------------------------------------------------------------------------------------------------

    def augment_if_due(self) -> GrowthRecord | None:
        """Lets the policy decide, and carries its decision out; None when ranks stay."""
        step = self.state.step
        if not self.policy.due(step):
            return None
        self._refuse_non_finite_weights()
        spectra = self.spectra() if self.policy.needs_spectra(step) else {}
        plan = plan_growth(self.model, self.policy, self.config.rank, step, spectra)
        if plan is None:
            return None
        self.engine, record = augment(self.engine, plan, rebuild=self._new_engine, seed=self.config.run.seed)
        self.state.growth.append(record)
        return record

    def mean_untrained_rank(self) -> float:
        """The null of the explained-ratio rule: the mean rank it would reach if training never changed the factors."""
        ranks = untrained_ranks(layer_measurements(self.model, self.spectra()), self.config.rank)
        return sum(ranks.values()) / len(ranks)

    def spectra(self) -> dict[str, Tensor]:
        """Singular values of every factored layer."""
        return measure_spectra(self.model)

    # Checkpoints ------------------------------------------------------------------------------------------------------

    def save(self, root: Path) -> Path:
        """Writes a checkpoint of the present step below `root`; a collective over all processes."""
        self._refuse_non_finite_weights()
        adapter = optimizer_state(self.engine)
        return write_checkpoint(
            root,
            self.state.step,
            adapter.fragments(),
            tensor_layouts(self.model),
            self._record(adapter.counters()),
            tensor_index=tensor_index(),
            tensor_size=tensor_size(),
            keep=self.config.checkpoint.keep,
            extra_files={"tokenizer.model": Path(self.config.data.tokenizer)},
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
            shard = {key: reader.read_shard(name, key, tensor_index(), tensor_size()) for key in KEYS}
            adapter.load(name, {key: values.to(parameter.device) for key, values in shard.items()})
        adapter.finish_loading()
        adapter.load_counters(reader.state["optimizer"])
        growth = [GrowthRecord(**record) for record in reader.state["growth"]]
        self.state = TrainState(**reader.state["train"], growth=growth)


def validation_samples(config: RunConfig, layout: Layout) -> int:
    """Sequences of one validation: `train.validation_sequences`, rounded up to whole micro-steps."""
    return round_up(config.train.validation_sequences, config.train.micro_batch * layout.data)


def _agreed(message: str) -> NumericalError:
    error = NumericalError(message)
    error.agreed = True  # the norm is the same on all processes
    return error
