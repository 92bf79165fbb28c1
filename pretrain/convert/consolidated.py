"""One model in one folder: a checkpoint without parallel layout, optimizer and run.

    model.safetensors            fp32 logical tensors by name; or model-00001-of-00003.safetensors ... and
                                 model.safetensors.index.json, which says which file holds which tensor
    espalier.json                architecture, ranks, growth history, steps and tokens, tokenizer
    tokenizer.model              or Hugging Face's tokenizer.json and tokenizer_config.json
    training.yaml                an imported model's only: settings of a run that starts from the folder

`write_consolidated` makes it from a checkpoint with one parameter in memory at a time; `ConsolidatedModel` reads it.
"""

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import islice
from math import prod
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator
from torch import Tensor

from model.config import ModelConfig, factored_projections
from model.costs.arithmetic import total_parameters
from pretrain.checkpoint.format import FP32_BYTES, first_validation_error, open_tensors, write_tensors
from pretrain.checkpoint.reader import CheckpointReader
from pretrain.disk import CHUNK_BYTES, new_folder, plain_file_bytes, read_json, write_blocks
from pretrain.errors import CheckpointError
from pretrain.tokenizer.base import FILE_NAMES, MODEL_NAME, main_file

FORMAT_VERSION = 1
FACTS_NAME = "espalier.json"
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
FACTS_LIMIT_BYTES = 64 * 2**20
TRAINING_NAME = "training.yaml"
SHARD_PATTERN = re.compile(r"model-[0-9]{5}-of-[0-9]{5}\.safetensors")


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


class Facts(BaseModel):
    """The content of `espalier.json`."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    format_version: int
    model: ModelConfig
    ranks: dict[str, int]
    growth: list[dict[str, JsonValue]]
    train: dict[str, JsonValue]
    tokenizer: dict[str, JsonValue]

    @model_validator(mode="after")
    def _history_is_whole(self) -> "Facts":
        """Checks the parts of the history that are shown; the rest is kept as it is."""
        for key in ("step", "consumed_tokens"):
            if not _is_count(self.train.get(key)):
                raise ValueError(f"{key} in train is {self.train.get(key)!r} and not a number from 0 on")
        for event in self.growth:
            ranks = [event.get(side) for side in ("before", "after")]
            known = all(isinstance(side, dict) and side and all(map(_is_count, side.values())) for side in ranks)
            if not (known and _is_count(event.get("step")) and isinstance(event.get("seconds"), int | float)):
                raise ValueError("a record in growth lacks its step, its seconds, or the ranks before and after")
        return self


class Index(BaseModel):
    """The content of `model.safetensors.index.json`: the file of every tensor."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    metadata: dict[str, JsonValue]
    weight_map: dict[str, str] = Field(min_length=1)


def check_model(config: ModelConfig, ranks: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """`CheckpointError` unless the tensors are those of a model of this architecture and these ranks."""
    if config.layers > len(shapes):  # before a table of that size is made
        raise CheckpointError(f"there are {len(shapes)} tensors, which is too few for {config.layers} layers")
    names = [projection.name for projection in factored_projections(config)]
    if set(names) != ranks.keys():
        raise CheckpointError(f"the ranks and the factored layers differ, such as in {min(ranks.keys() ^ set(names))}")
    for projection in factored_projections(config):
        rank = ranks[projection.name]
        expected = {"A": (rank, projection.in_features), "B": (projection.out_features, rank)}
        if projection.additive:
            expected["weight"] = (projection.out_features, projection.in_features)
        for leaf, shape in expected.items():
            name = f"{projection.name}.{leaf}"
            if shapes.get(name) != shape:
                raise CheckpointError(f"{name} is {shapes.get(name)}, and its rank {rank} asks for {shape}")
    found, needed = sum(prod(shape) for shape in shapes.values()), total_parameters(config, ranks)
    if found != needed:
        raise CheckpointError(f"the tensors hold {found} parameters, and a model with these ranks has {needed}")


def facts_of(reader: CheckpointReader) -> Facts:
    """What a checkpoint's state says about its model, checked against its tensors."""
    state = reader.state
    needed = ("model", "ranks", "growth", "train", "tokenizer")
    if missing := [key for key in needed if key not in state]:
        raise CheckpointError(
            f"the state in {reader.folder} lacks {', '.join(missing)}: it is not a training checkpoint"
        )
    try:
        facts = Facts.model_validate({"format_version": FORMAT_VERSION, **{key: state[key] for key in needed}})
        check_model(facts.model, facts.ranks, {name: layout.full_shape for name, layout in reader.layouts.items()})
    except ValidationError as error:
        raise CheckpointError(f"the state in {reader.folder} is wrong at {first_validation_error(error)}") from error
    except CheckpointError as error:
        raise CheckpointError(f"{reader.folder} contradicts itself: {error}") from error
    return facts


def check_output(output: Path, overwrite: bool) -> None:
    """CheckpointError if `output` holds anything but an earlier consolidated model, or holds one and `overwrite` is
    false."""
    if not os.path.lexists(output):
        return
    if output.is_symlink() or not output.is_dir():
        raise CheckpointError(f"{output} is not a folder: give another --output")
    names = {path.name for path in output.iterdir()}
    if not names:
        return
    if FACTS_NAME not in names:
        raise CheckpointError(
            f"{output} exists and is no consolidated model (it has no {FACTS_NAME}): give another --output"
        )
    ours = {FACTS_NAME, *FILE_NAMES, WEIGHTS_NAME, INDEX_NAME, TRAINING_NAME}
    foreign = {name for name in names - ours if not SHARD_PATTERN.fullmatch(name)}
    if foreign:
        raise CheckpointError(
            f"{output} holds {min(foreign)}, which replacing the model would remove: give another --output"
        )
    if not overwrite:
        raise CheckpointError(f"{output} already holds a consolidated model: give another --output, or --overwrite")


def plan_files(sizes: Mapping[str, int], max_shard_bytes: int) -> dict[str, list[str]]:
    """Names of the tensors of each file, by file name: in order, as many as fit into `max_shard_bytes`, at least
    one."""
    groups: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not groups or size > room:
            groups.append([])
            room = max_shard_bytes
        groups[-1].append(name)
        room -= size
    if len(groups) == 1:
        return {WEIGHTS_NAME: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, start=1)}


def write_consolidated(
    reader: CheckpointReader,
    output: Path,
    max_shard_bytes: int,
    *,
    overwrite: bool = False,
    on_parameter: Callable[[str], object] | None = None,
) -> None:
    """Writes the fp32 masters as one model into `output`, which appears only when it is complete.

    A file holds at most `max_shard_bytes` of numbers; a single larger tensor gets a file of its own. `on_parameter` is
    called with each name after the tensor was written. The caller verifies the reader's checksums.
    """
    output = Path(output)
    check_output(output, overwrite)
    facts = facts_of(reader)
    tokenizer = reader.tokenizer_files()

    def masters() -> Iterator[Tensor]:
        for name in reader.layouts:
            yield reader.read(name)
            if on_parameter is not None:
                on_parameter(name)

    with new_folder(output) as folder:
        shapes = {name: layout.full_shape for name, layout in reader.layouts.items()}
        write_model(folder, facts, tokenizer, shapes, masters(), max_shard_bytes)


def write_model(
    folder: Path,
    facts: Facts,
    tokenizer: Mapping[str, Path],
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterator[Tensor],
    max_shard_bytes: int,
) -> None:
    """Fills the empty `folder`. `tokenizer`: the tokenizer's files by name; `tensors`: in fp32 and in the order of
    `shapes`, taken one at a time."""
    files = plan_files({name: FP32_BYTES * prod(shape) for name, shape in shapes.items()}, max_shard_bytes)
    for file, names in files.items():
        write_tensors(folder / file, {name: shapes[name] for name in names}, islice(tensors, len(names)))
    if next(tensors, None) is not None:
        raise ValueError("there are more tensors than shapes")
    if len(files) > 1:
        index = {
            "metadata": {"total_size": FP32_BYTES * sum(prod(shape) for shape in shapes.values())},
            "weight_map": {name: file for file, names in files.items() for name in names},
        }
        write_blocks(folder / INDEX_NAME, [json.dumps(index, indent=2).encode()])
    for name, path in tokenizer.items():
        with path.open("rb") as kept:
            write_blocks(folder / name, iter(partial(kept.read, CHUNK_BYTES), b""))
    write_blocks(folder / FACTS_NAME, [json.dumps(facts.model_dump(), indent=2, allow_nan=False).encode()])


def weight_files(folder: Path, pattern: re.Pattern[str]) -> dict[str, set[str] | None]:
    """The weight files of a folder, each with the tensors that it must hold by the index, or None without an index.
    File names in the index must match `pattern`."""
    path = folder / INDEX_NAME
    if not path.exists():
        return {WEIGHTS_NAME: None}
    try:
        # A model cache of Hugging Face keeps links.
        index = Index.model_validate(read_json(path.resolve(), FACTS_LIMIT_BYTES))
    except ValidationError as error:
        raise CheckpointError(f"{path} is wrong at {first_validation_error(error)}") from error
    files: dict[str, set[str] | None] = {}
    for file in dict.fromkeys(index.weight_map.values()):
        if not pattern.fullmatch(file):
            raise CheckpointError(f"{path} names the file {file!r}, which is not the name of a weight file")
        files[file] = {name for name, place in index.weight_map.items() if place == file}
    return files


class ConsolidatedModel:
    """A consolidated folder, open for reading; one that contradicts itself is refused with a `CheckpointError`."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        path = self.folder / FACTS_NAME
        if not path.exists():
            raise CheckpointError(f"{self.folder} is no consolidated model: it has no {FACTS_NAME}")
        self.facts = read_json(path, FACTS_LIMIT_BYTES)
        try:
            if self.facts.get("format_version") != FORMAT_VERSION:
                raise CheckpointError(
                    f"its format_version is {self.facts.get('format_version')!r} and this version of Espalier reads "
                    f"{FORMAT_VERSION}: use the version of Espalier that wrote it"
                )
            checked = Facts.model_validate(self.facts)
        except CheckpointError as error:
            raise CheckpointError(f"{path} cannot be used: {error}") from error
        except ValidationError as error:
            raise CheckpointError(f"{path} is wrong at {first_validation_error(error)}") from error
        self.config, self.ranks = checked.model, checked.ranks
        held = {path.name for path in self.folder.iterdir()}
        self.tokenizer_path = self.folder / (main_file(held) or MODEL_NAME)
        for name in {self.tokenizer_path.name, *held & set(FILE_NAMES)}:
            plain_file_bytes(self.folder / name)
        self._handles: dict[str, Any] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for file, names in weight_files(self.folder, SHARD_PATTERN).items():
            handle, shapes = open_tensors(self.folder / file)
            if names is not None and names != shapes.keys():
                raise CheckpointError(f"{self.folder / file} does not hold the tensors that {INDEX_NAME} names")
            self._handles.update(dict.fromkeys(shapes, handle))
            self.shapes.update(shapes)
        try:
            check_model(self.config, self.ranks, self.shapes)
        except CheckpointError as error:
            raise CheckpointError(f"{self.folder} contradicts itself: {error}") from error

    def check_causal(self) -> None:
        """CheckpointError if this is a masked model, which cannot generate text or be exported."""
        if self.config.bidirectional:
            raise CheckpointError(
                f"{self.folder} was trained with train.objective=mlm: it attends in both directions and cannot "
                f"continue a text, and transformers' {self.config.family} class attends to the left only; give a model "
                "of a run with train.objective=causal"
            )

    @property
    def names(self) -> list[str]:
        """Names of all parameters."""
        return list(self.shapes)

    @property
    def parameters(self) -> int:
        """Count of numbers in all parameters."""
        return sum(prod(shape) for shape in self.shapes.values())

    def read(self, name: str) -> Tensor:
        """A whole parameter, fp32, in memory of its own."""
        if name not in self._handles:
            raise CheckpointError(f"{self.folder} holds no parameter {name}")
        return self._handles[name].get_tensor(name).clone()
