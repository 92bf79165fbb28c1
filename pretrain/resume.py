"""Finds the newest whole checkpoint of a run, and checks that it suits the present settings."""

import sys
from functools import partial
from pathlib import Path

import torch.distributed as dist
from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from pretrain.checkpoint.format import first_validation_error
from pretrain.checkpoint.reader import CheckpointReader, step_folders
from pretrain.config.data import DataConfig
from pretrain.config.run import RunConfig, check_same_architecture
from pretrain.convert.consolidated import facts_of
from pretrain.data.corpus import Corpus
from pretrain.distributed import is_first_process, together
from pretrain.errors import CheckpointError
from pretrain.growth.initial_values import check_ranks, check_same_start, check_start
from pretrain.tokenizer.base import Tokenizer
from pretrain.train_state import saved_progress


class _Counters(BaseModel):
    """What `OptimizerState.counters` gave."""

    model_config = ConfigDict(extra="forbid", strict=True)

    adam_step: float
    loss_scaler: dict[str, bool | int | float | None] = {}


class _Settings(BaseModel):
    """Sections of the saved run's settings that a resume compares with the present ones."""

    model_config = ConfigDict(strict=True)

    run: dict[str, JsonValue]
    data: dict[str, JsonValue]
    model: dict[str, JsonValue]
    rank: dict[str, JsonValue]
    train: dict[str, JsonValue]
    checkpoint: dict[str, JsonValue]


class _State(BaseModel):
    """What `Trainer` writes beside the model's facts (`pretrain/convert/consolidated.py`), which are checked by
    themselves."""

    model_config = ConfigDict(strict=True)

    optimizer: _Counters
    corpus: str
    config: _Settings


def open_newest(checkpoints: Path, config: RunConfig) -> CheckpointReader | None:
    """The newest whole checkpoint, the same on all processes; None in a new run.

    Damaged ones are passed over with a warning. Raises CheckpointError if there are checkpoints, but none is whole: a
    run never starts over by itself. Raises ConfigError if the checkpoint has another architecture.
    """
    folders = [step_folders(checkpoints)]
    dist.broadcast_object_list(folders, src=0)
    errors = []
    for folder in folders[0]:
        try:
            reader = together(partial(_verified, folder))
        except CheckpointError as error:
            errors.append(error)
            if is_first_process():
                print(f"warning: {error}; trying the one before", file=sys.stderr)
            continue
        together(partial(check_same_architecture, reader.state["model"], config))
        return reader
    if errors:
        raise errors[0]
    return None


def _verified(folder: Path) -> CheckpointReader:
    """The checkpoint, with this process's share of its files read and compared with their checksums."""
    reader = CheckpointReader(folder)
    reader.verify(dist.get_rank(), dist.get_world_size())
    facts_of(reader)
    try:
        _State.model_validate(reader.state)
        saved_progress(reader.state)
    except ValidationError as error:
        raise CheckpointError(f"the state in {folder} is wrong at {first_validation_error(error)}") from error
    return reader


def check_origin(reader: CheckpointReader | None, config: RunConfig, tokenizer: Tokenizer) -> None:
    """An `EspalierError` if the folder that a new run starts from, or the checkpoint that a run continues, does not
    suit its settings."""
    if reader is None:
        check_start(config, tokenizer)
    else:
        check_ranks(config, reader.state["ranks"], str(reader.folder))
        check_same_start(reader.state["config"], config)


def progress_of(reader: CheckpointReader | None) -> tuple[int, int]:
    """Steps taken and sequences consumed when the run begins."""
    return (0, 0) if reader is None else (reader.step, saved_progress(reader.state).consumed_samples)


def check_same_samples(reader: CheckpointReader | None, config: RunConfig, corpus: Corpus) -> None:
    """CheckpointError if the run continues with other samples: the number of consumed samples means something only in
    the same text, split and shuffled in the same way."""
    if reader is None:
        return
    if reader.state["corpus"] != corpus.fingerprint:
        named = "data.prefix names" if config.data.blend is None else "data.blend names, or with other weights,"
        raise CheckpointError(
            f"{reader.folder} was trained on another corpus or tokenizer than {named} now: "
            "use that one, or another run.folder"
        )
    saved = reader.state["config"]
    for name, before, now in (
        ("run.seed", saved["run"]["seed"], config.run.seed),
        ("data.split", DataConfig.model_validate(saved["data"]).shares, config.data.shares),
    ):
        if before != now:
            raise CheckpointError(
                f"{reader.folder} was trained with {name} {before}, and now it is {now}, which changes the order of "
                f"the samples: set {name} back, or use another run.folder"
            )
