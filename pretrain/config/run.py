"""All settings of a run: `RunConfig`, read from a YAML file and `section.key=value` overrides.

    config = load_config("gpt2_small", ["train.steps=100", "parallel.tensor=2"])

A config is checked as a whole when it is built; `config.parallel_layout(processes)` checks it against the number of
processes. Sections that belong to one component are declared beside it. Every mistake is a ConfigError of one sentence.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, field_validator, model_validator

from model.config import ModelConfig, Recompute, check_recompute, factored_projections
from pretrain.config.data import DataConfig
from pretrain.config.files import explain, find_file, merge, parse_override, read_settings
from pretrain.config.parallel import ParallelLayout, lay_out
from pretrain.errors import ConfigError
from pretrain.policies.policy import RankConfig
from pretrain.policies.select import check_rank_config, with_defaults
from pretrain.schedule import BatchRamp, OptimizerConfig, ScheduleConfig, check_ramp, check_schedule, samples_before


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class RunSection(_Section):
    """The run itself."""

    folder: str = Field(
        "runs/default",
        min_length=1,
        description="folder where everything of the run is written; one that holds a checkpoint is continued. One "
        "folder a run; with many nodes on storage that all of them share",
    )
    seed: int = Field(
        1234,
        ge=0,
        description="number behind initial values, new directions, dropout and the order of samples. Change it to "
        "repeat a run with other random numbers; a resumed run keeps it",
    )


class ParallelConfig(_Section):
    """How the model is split."""

    tensor: int = Field(
        1,
        ge=1,
        description="processes that share one copy of the model; the others are data-parallel. Raise it when one "
        "process cannot hold the model",
    )


class TrainConfig(_Section):
    """Objective, length of the run, batches, precision, and when to report."""

    objective: Literal["causal", "mlm"] = Field(
        "causal",
        description="causal: predict the next token; mlm: predict hidden tokens from both sides (docs/masked-lm.md)",
    )
    mask_probability: float | None = Field(
        None, gt=0.0, lt=1.0, description="share of the tokens that mlm hides; none: 0.15"
    )
    steps: int = Field(1000, ge=1, description="optimizer steps of the run. A complete run goes on when it is raised")
    micro_batch: int = Field(
        8,
        ge=1,
        description="sequences per data-parallel process and micro-step. Lower it when memory is short: results "
        "change by rounding alone",
    )
    global_batch: int = Field(
        32,
        ge=1,
        description="sequences per step over all processes, a multiple of train.micro_batch times the "
        "data-parallel processes",
    )
    batch_ramp: BatchRamp | None = Field(
        None, description="global batch that grows to train.global_batch; none: constant"
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32",
        description="type of weights and arithmetic; masters are fp32. 16 bits halve the memory of weights and "
        "activations and need ZeRO 1 or higher; bf16 has the range of fp32, fp16 needs a loss scale",
    )
    tf32: bool = Field(
        False,
        description="fp32 products on a GPU's tensor cores, operands rounded to 10 bits of mantissa. For "
        "train.precision fp32, where speed counts more than digits",
    )
    deterministic: bool = Field(
        False,
        description="the same bits in every run of the same parallel layout, also on a GPU, where that costs time. "
        "Switch it on to compare runs to the last bit (docs/reliability.md)",
    )
    recompute: Recompute = Field(
        "none",
        description="what the backward pass computes again: nothing (none), all but the bottlenecks and without "
        "communicating (factors), or whole layers (layers). Try factors first when memory is short",
    )
    compile: bool = Field(
        False,
        description="compiles the layers of a factored model with torch.compile, once for all ranks; needs "
        "parallel.tensor 1, ZeRO 0 to 2, no recomputation and no dropout. Whether it pays on a GPU is "
        "open",
    )
    clip: float = Field(
        1.0, ge=0.0, description="largest norm of the whole gradient; 0: not clipped. Lower it when the loss spikes"
    )
    validate_every: int = Field(100, ge=0, description="steps between validations; 0: only at the end")
    validation_sequences: int = Field(
        64,
        ge=0,
        description="sequences per validation over all processes; 0: none. More of them give a steadier loss and "
        "take longer",
    )
    log_every: int = Field(10, ge=1, description="steps between two log lines")

    @model_validator(mode="after")
    def _tf32_belongs_to_fp32(self) -> "TrainConfig":
        if self.tf32 and self.precision != "fp32":
            raise ValueError(
                f"train.tf32 is true, and with train.precision {self.precision} no product of the model is in fp32: "
                "set train.precision=fp32 or leave train.tf32 out"
            )
        return self

    @model_validator(mode="after")
    def _masks_belong_to_mlm(self) -> "TrainConfig":
        if self.mask_probability is not None and self.objective != "mlm":
            raise ValueError(
                f"train.mask_probability is {self.mask_probability}, and train.objective {self.objective} hides "
                "nothing: leave train.mask_probability out or set train.objective=mlm"
            )
        return self


class CheckpointConfig(_Section):
    """When checkpoints are written, and how many stay."""

    every: int = Field(
        500,
        ge=0,
        description="steps between checkpoints; 0: only at the end. A fault costs the steps since the last one",
    )
    keep: int = Field(2, ge=2, description="newest checkpoints that stay; a single one could turn out damaged")
    keep_every: int = Field(
        0,
        ge=0,
        description="checkpoints of steps that are multiples of it stay, too; 0: none. For models that are to be "
        "looked at later",
    )
    background: bool = Field(
        False,
        description="write while training goes on, from a copy of masters and moments in host memory. It pays "
        "where storage is slower than memory",
    )
    failures: int = Field(3, ge=1, description="saves in a row that may fail before the run ends")
    start_from: str | None = Field(
        None,
        min_length=1,
        description="consolidated or imported folder whose weights a new run starts from; none: from the seed "
        "(docs/adaptation.md)",
    )


class GuardConfig(_Section):
    """When a run rolls back, gives up, or counts as stuck."""

    skips: int = Field(
        40, ge=1, description="steps in a row without a finite gradient, after which guard.on_skips happens"
    )
    on_skips: Literal["rollback", "stop"] = Field(
        "rollback",
        description="go back to the newest checkpoint and leave out the samples since (rollback), or end the run "
        "(stop)",
    )
    spike_window: int = Field(100, ge=0, description="losses that the next one is compared with; 0: no comparison")
    spike_deviations: float = Field(
        12.0,
        gt=0.0,
        description="robust deviations above their median that make a loss spike. Raise it when ordinary losses "
        "are reported",
    )
    on_spike: Literal["warn", "rollback", "stop"] = Field("warn", description="what happens after a loss spike")
    rollbacks: int = Field(3, ge=0, description="rollbacks that one start of the run may take")
    hang_seconds: float = Field(
        1800.0,
        ge=0.0,
        description="time without progress after which a process ends the run and says who hangs; 0: never. It "
        "must be longer than the longest step, save and compilation; lower it to notice lost nodes "
        "sooner",
    )


class DeepSpeedConfig(_Section):
    """ZeRO, and the user's own DeepSpeed file."""

    stage: int = Field(
        1,
        description="ZeRO stage: what is split over data-parallel processes. 0: nothing (fp32 only); 1: masters "
        "and moments; 2: gradients, too; 3: weights, too. Raise it when memory is short",
    )
    offload_optimizer: bool = Field(
        False,
        description="masters and moments in host memory, and the optimizer's step there; for ZeRO 1 to 3. When "
        "the GPU's memory is short and time is not",
    )
    config: str | dict[str, JsonValue] | None = Field(
        None,
        description="DeepSpeed JSON file of your own (a path), or zero1, zero2, zero3, zero2_offload, "
        "zero3_offload, or what such a file says; none: DeepSpeed's defaults. It is read once, taken as it is, "
        "kept in the run's config.yaml, and refused where it contradicts the run",
    )

    @field_validator("config", mode="before")
    @classmethod
    def _config_is_a_file_or_settings(cls, config: Any) -> Any:
        if config is not None and not isinstance(config, str | dict):
            raise ValueError(f"deepspeed.config is {config!r}: name a DeepSpeed JSON file, or write what it says")
        return config

    @field_validator("stage")
    @classmethod
    def _stage_is_supported(cls, stage: int) -> int:
        if stage not in (0, 1, 2, 3):
            raise ValueError(f"deepspeed.stage is {stage}: set it to 0, 1, 2 or 3")
        return stage

    @model_validator(mode="after")
    def _offload_belongs_to_zero(self) -> "DeepSpeedConfig":
        if self.offload_optimizer and self.stage == 0:
            raise ValueError(
                "deepspeed.offload_optimizer is true, and without ZeRO (deepspeed.stage 0) nothing is offloaded: set "
                "deepspeed.stage to 1, 2 or 3, or leave deepspeed.offload_optimizer out"
            )
        return self


class RunConfig(_Section):
    """Every setting of a run."""

    run: RunSection = RunSection()
    model: ModelConfig = ModelConfig()
    parallel: ParallelConfig = ParallelConfig()
    train: TrainConfig = TrainConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    rank: RankConfig = RankConfig()
    data: DataConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    guard: GuardConfig = GuardConfig()
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()

    @model_validator(mode="after")
    def _policy_fills_settings_in(self) -> "RunConfig":
        return self.model_copy(update={"rank": with_defaults(self.rank, self.train.steps)})

    @model_validator(mode="after")
    def _sections_agree(self) -> "RunConfig":
        check_schedule(self.schedule, self.train.steps)
        if self.train.batch_ramp is not None:
            check_ramp(self.train.batch_ramp, self.train.global_batch, self.train.steps)
        check_recompute(self.model, self.train.recompute)
        check_rank_config(self.rank, factored_projections(self.model), self.train.steps)
        if self.deepspeed.stage == 0 and self.train.precision != "fp32":
            # DeepSpeed's 16-bit optimizers without ZeRO take a throw-away Adam step when they are built, and their
            # gradient norm is wrong under tensor parallelism.
            raise ValueError(
                f"deepspeed.stage 0 trains in fp32 only, and train.precision is {self.train.precision}: "
                "set deepspeed.stage=1"
            )
        return self

    @model_validator(mode="after")
    def _compiled_layers_are_whole(self) -> "RunConfig":
        """ValueError if layers are compiled together with what a layer's graph cannot hold: hooks of ZeRO 3,
        collectives in flight, recomputation and seeds of dropout masks."""
        model, train = self.model, self.train
        whole = model.parametrization == "factored" and model.factored_layers == "all"
        needs = (
            ("model.parametrization=factored with model.factored_layers=all", whole),
            ("deepspeed.stage 0, 1 or 2", self.deepspeed.stage < 3),
            ("parallel.tensor=1", self.parallel.tensor == 1),
            ("train.recompute=none", train.recompute == "none"),
            (
                "model.hidden_dropout=0 and model.attention_dropout=0",
                not model.hidden_dropout + model.attention_dropout,
            ),
        )
        missing = [setting for setting, holds in needs if not holds]
        if train.compile and missing:
            raise ValueError(f"train.compile needs {', '.join(missing)}: set it so, or leave train.compile out")
        return self

    @model_validator(mode="after")
    def _objective_decides_attention(self) -> "RunConfig":
        masked = self.train.objective == "mlm"
        if self.model.bidirectional and not masked:
            raise ValueError(
                "model.bidirectional is true, and train.objective causal predicts tokens that such a model sees: "
                "set train.objective=mlm or leave model.bidirectional out"
            )
        if masked == self.model.bidirectional:
            return self
        return self.model_copy(update={"model": self.model.model_copy(update={"bidirectional": True})})

    def parallel_layout(self, processes: int) -> ParallelLayout:
        """The split over `processes` processes; ConfigError, with the numbers, if the run does not divide evenly."""
        return lay_out(
            self.model,
            processes,
            self.parallel.tensor,
            self.train.micro_batch,
            self.train.global_batch,
            self.train.batch_ramp,
        )

    def samples_at_end(self, step: int, consumed: int) -> int:
        """Sequences consumed at the end by a run that has consumed `consumed` at `step`, whatever its batches were."""
        train = self.train
        end, now = (samples_before(taken, train.global_batch, train.batch_ramp) for taken in (train.steps, step))
        return consumed + end - now

    def initial_ranks(self) -> dict[str, int]:
        """Rank at the start of every factored layer, by `Projection.name`; empty for a dense model."""
        return {projection.name: self.rank.initial for projection in factored_projections(self.model)}

    def with_vocabulary(self, vocabulary: int) -> "RunConfig":
        """This config with the tokenizer's vocabulary filled in; ConfigError if a smaller size is set."""
        if self.model.vocabulary >= vocabulary:
            return self  # published models have rows to spare
        if self.model.vocabulary:
            raise ConfigError(
                f"model.vocabulary is {self.model.vocabulary}, and the tokenizer {self.data.tokenizer} has "
                f"{vocabulary} tokens: leave model.vocabulary out or change data.tokenizer"
            )
        return self.model_copy(update={"model": self.model.model_copy(update={"vocabulary": vocabulary})})


def load_config(path: str, overrides: Sequence[str] = ()) -> RunConfig:
    """The config in a YAML file (a path, or the bare name of an installed one) with overrides laid over it."""
    settings = read_settings(find_file(path, "configs", ".yaml"))
    for override in overrides:
        settings = merge(settings, parse_override(override))
    return parse_config(settings)


def parse_config(settings: Mapping[str, Any]) -> RunConfig:
    """The config that a mapping of sections stands for."""
    try:
        return RunConfig.model_validate(settings)
    except ValidationError as error:
        raise ConfigError(explain(error, RunConfig)) from error


def dump_config(config: RunConfig) -> str:
    """The resolved config as YAML that `load_config` reads back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=120)


def check_same_architecture(saved: Mapping[str, Any], config: RunConfig) -> None:
    """ConfigError if a checkpoint's model section (`state["model"]`) describes another model than `config`."""
    differing = differing_architecture(saved, config)
    if differing:
        raise ConfigError(
            f"the checkpoint holds another architecture: {differing}; use its settings or another run.folder"
        )


def differing_architecture(saved: Mapping[str, Any], config: RunConfig, *free: str) -> str:
    """The differences, in words, between a saved model section and the model of `config`; empty if they are the same
    model.

    Dropout, the initial scale and the keys in `free` may differ. A vocabulary that is still to be read from the
    tokenizer is not compared, and neither are ranks. A setting that is missing in the saved section had its default.
    """
    present, saved = _with_widths(config.model.model_dump()), _with_widths(ModelConfig().model_dump() | dict(saved))
    ignored = {"attention_dropout", "hidden_dropout", "initial_std", *free}
    if config.model.vocabulary == 0:
        ignored.add("vocabulary")
    return ", ".join(
        f"model.{key} is {saved.get(key, 'absent')} there and {present.get(key, 'absent')} here"
        for key in sorted((saved.keys() | present.keys()) - ignored)
        if saved.get(key) != present.get(key)
    )


def _with_widths(section: dict[str, Any]) -> dict[str, Any]:
    """A model section with the widths that its zeros stand for, since 0 and that width are the same architecture."""
    model = ModelConfig.model_construct(**{key: section[key] for key in ModelConfig.model_fields})
    return section | {"ffn": model.ffn_width, "query_groups": model.groups}
