"""The dictionary that `deepspeed.initialize` gets: the user's own JSON file, with the keys that follow from the run
filled in.

A run reads the file once, when it starts (`with_deepspeed_file`), and keeps what it says in its config: engines are
built anew at every growth, whatever has become of the file.

Batch sizes, clipping, precision and ZeRO stage have one home, the run's config. The file may repeat them (or say
"auto"); a different number is an error that shows both. What is not tested together with growing ranks is refused by
name: a feature that DeepSpeed accepts here and that silently loses optimizer state at the first growth is worse than
one that is missing.
"""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch

from pretrain.config.files import find_file, read_json
from pretrain.config.parallel import ParallelLayout
from pretrain.config.run import RunConfig
from pretrain.errors import ConfigError

NEVER = 10**9
BUCKET_ELEMENTS = 50_000_000
"""Numbers in a bucket of the reduction. DeepSpeed's own 500 million allocate 1 to 2 GB per process, most of a small
device."""

_TAKEN = {
    "communication_data_type", "comms_logger", "disable_allgather", "dump_state", "gradient_predivide_factor",
    "memory_breakdown", "prescale_gradients", "steps_per_print", "wall_clock_breakdown",
    "zero_allow_untested_optimizer",
}  # fmt: skip
_TAKEN_INSIDE = {
    "zero_optimization": {
        "allgather_bucket_size", "allgather_partitions", "contiguous_gradients", "ignore_unused_parameters",
        "offload_optimizer", "overlap_comm", "reduce_bucket_size", "reduce_scatter", "stage",
        "stage3_max_live_parameters", "stage3_max_reuse_distance", "stage3_model_persistence_threshold",
        "stage3_param_persistence_threshold", "stage3_prefetch_bucket_size", "sub_group_size",
        "use_multi_rank_bucket_allreduce",
    },
    "bf16": {"enabled", "check_grad_overflow"},
    "fp16": {
        "enabled", "loss_scale", "initial_scale_power", "loss_scale_window", "hysteresis", "consecutive_hysteresis",
        "min_loss_scale",
    },
    "data_types": {"grad_accum_dtype"},
}  # fmt: skip
_ON_BY_DEFAULT = {
    "zero_optimization.compute_grad_norm", "zero_optimization.load_from_fp32_weights",
    "zero_optimization.memory_efficient_linear", "zero_optimization.override_module_apply",
}  # fmt: skip
"""Settings that are `true` by default in DeepSpeed 0.19.8: `true` changes nothing, `false` does."""
_AUTOTP = "tensor parallelism is megatron-core's: set parallel.tensor"
_MONITOR = "the run writes its own TensorBoard folder, and two writers would disagree"
_OFFLOAD = "only the optimizer can be offloaded, by deepspeed.offload_optimizer in the run's config"
_REASONS = {
    "optimizer": "the run builds AdamW itself: use the optimizer section of the run's config",
    "scheduler": "the learning rate is the run's own: use the schedule section of the run's config",
    "tensor_parallel": _AUTOTP,
    "autotp": _AUTOTP,
    "tensorboard": _MONITOR,
    "wandb": _MONITOR,
    "csv_monitor": _MONITOR,
    "comet": _MONITOR,
    "checkpoint": "checkpoints have a format of their own: use the checkpoint section of the run's config",
    "gradient_allreduce_op": "gradients are averaged over data-parallel processes, and the clipping norm counts on it",
    "zero_optimization.offload_param": _OFFLOAD,
    "zero_optimization.cpu_offload": _OFFLOAD,
    "zero_optimization.cpu_offload_params": _OFFLOAD,
    "zero_optimization.compute_grad_norm": "the run clips by the gradient's norm, logs it, and skips steps by it",
    "zero_optimization.zenflow": "its split optimizer step is not carried through a growth of ranks",
    "zero_optimization.round_robin_gradients": "it reorders the partitions that checkpoints name",
    "zero_optimization.elastic_checkpoint": "checkpoints of a run can be resumed on any parallel layout without it",
    "zero_optimization.save_muon_momentum_buffer_in_memory": "the run trains with AdamW, not with Muon",
    "bf16.immediate_grad_update": "it belongs to an optimizer class whose state cannot be grown yet",
    "bf16.bf16_master_weights_and_grads": "masters and moments are kept in fp32",
    "bf16.bf16_optimizer_states": "masters and moments are kept in fp32",
    "fp16.fp16_master_weights_and_grads": "masters and moments are kept in fp32",
    "fp16.auto_cast": "the model casts its inputs itself",
    "torch_autocast": "precision is one setting for the whole model: use train.precision",
    "amp": "precision is one setting for the whole model: use train.precision",
}


def deepspeed_dict(config: RunConfig, layout: ParallelLayout) -> dict[str, Any]:
    """DeepSpeed's config for this run on this parallel layout, at the full global batch; it shares no object with
    `config`."""
    result: dict[str, Any] = {"steps_per_print": NEVER, "wall_clock_breakdown": False}
    result |= deepcopy(_checked_settings(config, layout))
    for key, (value, _) in _derived(config, layout).items():
        section, dot, name = key.partition(".")
        if dot:
            result.setdefault(section, {})[name] = value
        else:
            result[key] = value
    if config.deepspeed.stage:
        zero = result["zero_optimization"]
        zero.setdefault("reduce_bucket_size", BUCKET_ELEMENTS)
        zero.setdefault("allgather_bucket_size", BUCKET_ELEMENTS)
        if config.deepspeed.offload_optimizer:
            offload = {"device": "cpu", "pin_memory": torch.cuda.is_available()} | zero.get("offload_optimizer", {})
            zero["offload_optimizer"] = offload
            result["zero_force_ds_cpu_optimizer"] = False  # torch's fused AdamW steps on the host as well
    return result


def with_deepspeed_file(config: RunConfig, layout: ParallelLayout) -> RunConfig:
    """The config with the content of its DeepSpeed file in place of the file's name; ConfigError if the run refuses
    it."""
    if not isinstance(config.deepspeed.config, str):
        return config
    section = config.deepspeed.model_copy(update={"config": _checked_settings(config, layout)})
    return config.model_copy(update={"deepspeed": section})


def given_settings(config: RunConfig) -> tuple[dict[str, Any], str]:
    """The content of the user's DeepSpeed file, or of the mapping that the config holds in its place; and its name for
    errors."""
    given = config.deepspeed.config
    if isinstance(given, str):
        path = find_file(given, "configs.deepspeed", ".json")
        return read_json(path), path.name
    return given or {}, "deepspeed.config"


def _checked_settings(config: RunConfig, layout: ParallelLayout) -> dict[str, Any]:
    """The given settings without those that change nothing: an unused section may hold an account's key."""
    given, source = given_settings(config)
    derived = _derived(config, layout)
    _refuse_unsupported(given, derived, source)
    _refuse_conflicts(given, derived, source)
    _check_precision(given, config, source)
    _check_offload(given, config, source)
    kept = {key: value for key, value in given.items() if key in _TAKEN or key in derived or key in _TAKEN_INSIDE}
    for key, inside in _TAKEN_INSIDE.items():
        if key in kept:
            kept[key] = {name: setting for name, setting in kept[key].items() if name in inside}
    return kept


def _derived(config: RunConfig, layout: ParallelLayout) -> dict[str, tuple[Any, str]]:
    """Keys that follow from the run, each with its value and where that comes from."""
    train = config.train
    batch = (
        f"train.micro_batch {train.micro_batch} x accumulation {layout.accumulation} x {layout.data} data-parallel "
        f"process{'es' if layout.data > 1 else ''}"
    )
    return {
        "train_micro_batch_size_per_gpu": (train.micro_batch, "train.micro_batch"),
        "gradient_accumulation_steps": (layout.accumulation, f"train.global_batch {train.global_batch} = {batch}"),
        "train_batch_size": (train.global_batch, f"train.global_batch = {batch}"),
        "gradient_clipping": (train.clip, "train.clip"),
        "zero_optimization.stage": (config.deepspeed.stage, "deepspeed.stage"),
        "bf16.enabled": (train.precision == "bf16", f"train.precision {train.precision}"),
        "fp16.enabled": (train.precision == "fp16", f"train.precision {train.precision}"),
    }


def _refuse_unsupported(given: Mapping[str, Any], derived: Mapping[str, Any], source: str) -> None:
    for key, value in given.items():
        inside = _TAKEN_INSIDE.get(key)
        if inside is None:
            if key not in _TAKEN and key not in derived and not _changes_nothing(key, value):
                raise _unsupported(key, source)
        elif not isinstance(value, dict):
            raise ConfigError(f"{key} in {source} is {value!r}: write an object with settings")
        else:
            for name, setting in value.items():
                if name not in inside and not _changes_nothing(f"{key}.{name}", setting):
                    raise _unsupported(f"{key}.{name}", source)


def _changes_nothing(key: str, setting: Any) -> bool:
    """Whether DeepSpeed does the same without the setting."""
    return setting is True if key in _ON_BY_DEFAULT else _switched_off(setting)


def _switched_off(setting: Any) -> bool:
    off = isinstance(setting, dict) and (setting.get("enabled") is False or setting.get("device") == "none")
    return setting is None or setting is False or off


def _unsupported(key: str, source: str) -> ConfigError:
    reason = _REASONS.get(key, "it is not tested together with growing ranks")
    return ConfigError(f"{key} in {source} is not supported: {reason}; remove it from {source}")


def _refuse_conflicts(given: Mapping[str, Any], derived: Mapping[str, tuple[Any, str]], source: str) -> None:
    for key, (value, origin) in derived.items():
        section, dot, name = key.partition(".")
        found = given.get(section, {}).get(name, value) if dot else given.get(key, value)
        if found not in (value, "auto"):
            raise ConfigError(f"{key} is {found} in {source}, and {value} follows from {origin}: change one of them")


def _check_precision(given: Mapping[str, Any], config: RunConfig, source: str) -> None:
    if given.get("bf16", {}).get("check_grad_overflow") is False:
        raise ConfigError(
            f"bf16.check_grad_overflow false in {source} is not supported: one non-finite gradient would poison the "
            f"weights; remove it from {source}"
        )
    accumulation = given.get("data_types", {}).get("grad_accum_dtype")
    if accumulation not in (None, config.train.precision):
        raise ConfigError(
            f"data_types.grad_accum_dtype {accumulation} in {source} is not supported with train.precision "
            f"{config.train.precision}: it switches to a DeepSpeed optimizer whose state cannot be grown yet; "
            f"remove it from {source}"
        )


def _check_offload(given: Mapping[str, Any], config: RunConfig, source: str) -> None:
    """ConfigError if the file says whether to offload: it may only say how, the run's config says whether."""
    offload = given.get("zero_optimization", {}).get("offload_optimizer")
    if _switched_off(offload):
        if offload is not None and config.deepspeed.offload_optimizer:
            raise ConfigError(
                f"zero_optimization.offload_optimizer is switched off in {source}, and deepspeed.offload_optimizer is "
                "true: change one of them"
            )
        return
    if (
        not isinstance(offload, dict)
        or offload.get("device") != "cpu"
        or not offload.keys() <= {"device", "pin_memory"}
    ):
        raise ConfigError(
            f"zero_optimization.offload_optimizer in {source} is {offload!r}: masters and moments can be offloaded to "
            '{"device": "cpu"}, with or without pin_memory; change it'
        )
    if not config.deepspeed.offload_optimizer:
        raise ConfigError(
            f"zero_optimization.offload_optimizer is on in {source}, and deepspeed.offload_optimizer is false: change "
            "one of them"
        )
