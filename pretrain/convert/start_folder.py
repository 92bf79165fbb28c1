"""Writes any model that can be read as a dense one into a consolidated folder, from which a run can start.

`training.yaml` beside the model holds the settings that belong to it, so a run needs only a corpus and a folder.
"""

from collections.abc import Mapping
from pathlib import Path

import yaml

from model.config import ModelConfig, factored_projections
from model.huggingface.dense import FromDense, parameter_shapes
from pretrain.convert.consolidated import FORMAT_VERSION, TRAINING_NAME, ConsolidatedModel, Facts, write_model
from pretrain.convert.source import DenseSource
from pretrain.errors import ConfigError


def check_rank(config: ModelConfig, rank: int | None) -> None:
    """ConfigError if layers of `config` cannot have this rank, or need one and none is given."""
    layers = factored_projections(config)
    if not layers:
        if rank is not None:
            raise ConfigError("--rank is for factors, and a dense model has none: leave it out")
        return
    if rank is None:
        raise ConfigError(f"--parametrization {config.parametrization} needs the rank of its factors: give --rank")
    narrowest = min(layers, key=lambda layer: layer.break_even_rank)
    if not 1 <= rank <= narrowest.break_even_rank:
        raise ConfigError(
            f"--rank is {rank}, and above {narrowest.break_even_rank} the factors of {narrowest.label} "
            f"({narrowest.out_features} x {narrowest.in_features}) cost more than its dense weight: give --rank from 1 "
            f"to {narrowest.break_even_rank}"
        )


def write_import(
    source: DenseSource, config: ModelConfig, rank: int | None, folder: Path, *, seed: int, max_shard_bytes: int
) -> tuple[ConsolidatedModel, Mapping[str, float]]:
    """Fills the empty `folder` with the model of `source`, converted to the architecture of `config`. Returns the share
    of its energy that each truncated layer keeps, by `Projection.name`."""
    ranks = {projection.name: rank for projection in factored_projections(config) if rank is not None}
    facts = Facts(
        format_version=FORMAT_VERSION,
        model=config,
        ranks=ranks,
        growth=[],
        train={"step": 0, "consumed_samples": 0, "consumed_tokens": 0, "skipped_steps": 0},
        tokenizer={"fingerprint": source.tokenizer.fingerprint, "vocabulary": source.tokenizer.vocabulary},
    )
    conversion = FromDense(config, ranks, source.read, seed)
    shapes = parameter_shapes(config, ranks)
    write_model(folder, facts, source.tokenizer.files(), shapes, conversion.tensors(), max_shard_bytes)
    return ConsolidatedModel(folder), conversion.kept_energy


def write_training_settings(config: ModelConfig, rank: int | None, tokenizer: str, folder: Path, output: Path) -> None:
    """Writes `training.yaml` into `folder`, which will be called `output`: a config to launch a run with, or to
    extend."""
    settings = {
        "model": config.model_dump(mode="json"),
        **({} if rank is None else {"rank": {"initial": rank}}),
        **({"train": {"objective": "mlm"}} if config.bidirectional else {}),
        "data": {"tokenizer": str(output / tokenizer)},
        "checkpoint": {"start_from": str(output)},
    }
    text = "# Settings of a run that starts from this model: name it as --config, or as `extends:` in a config.\n"
    text += yaml.safe_dump(settings, sort_keys=False, width=120)
    (folder / TRAINING_NAME).write_text(text, encoding="utf-8")
