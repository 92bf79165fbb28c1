"""The format of a checkpoint folder as checked data: names, fragments and the manifest; and how tensors are written.

    checkpoints/
        latest                                   name of the newest step: for people and scripts, never trusted
        step_000001000/
            manifest.json                        everything else by name, size and checksum, and the run's state
            shard_000_00002.safetensors          the fragments of process 2, which had tensor-parallel index 0
            tokenizer.model                      extra files, as they were given (or tokenizer.json)

A parameter is split over tensor-parallel processes (`TensorLayout`), each shard is flattened, and a fragment is the
numbers [start, start + length) of it. The fragments of one parameter, key and tensor-parallel index tile its shard:
sorted by start, start_0 = 0, start_(i+1) = start_i + length_i, and the last one ends at the shard's size.
"""

import json
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import xxhash
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.sharding import TensorLayout
from pretrain.disk import decode_json, plain_file_bytes, write_blocks
from pretrain.errors import CheckpointError

FORMAT_VERSION = 2
KEYS = ("master", "exp_avg", "exp_avg_sq")
"""Keys of what is kept of every parameter: the fp32 master and Adam's two moments; of a frozen one the master alone."""

MANIFEST_NAME = "manifest.json"
LATEST_NAME = "latest"
STEP_PATTERN = re.compile(r"step_([0-9]{9,12})")
FILE_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,200}$"
LARGEST_STEP = 10**12 - 1
MANIFEST_LIMIT_BYTES = 512 * 2**20
FP32_BYTES = 4
_TYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
"""Safetensors' names of types."""


@dataclass(frozen=True)
class Fragment:
    """Numbers [start, start + len(values)) of parameter `name` in the writing process's flattened tensor-parallel
    shard; `values (length,)` is fp32, or 16-bit and stored as fp32, and may be a view of a larger tensor, on any
    device."""

    name: str
    key: str
    start: int
    values: Tensor


def step_name(step: int) -> str:
    """Name of the folder of one step's checkpoint."""
    return f"step_{step:09d}"


def shard_name(tensor_index: int, process: int) -> str:
    """Name of the file of one process's fragments."""
    return f"shard_{tensor_index:03d}_{process:05d}.safetensors"


def fragment_name(parameter: str, key: str, start: int) -> str:
    """Name of a fragment inside its file."""
    return f"{parameter}|{key}|{start}"


class _Record(BaseModel):
    """Part of a manifest: exact types, no unknown fields."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class FragmentRecord(_Record):
    """One fragment of the file that lists it."""

    parameter: str
    key: Literal["master", "exp_avg", "exp_avg_sq"]
    start: int = Field(ge=0)
    length: int = Field(ge=1)


class FileRecord(_Record):
    """One file beside the manifest; a plain name, so that it cannot lie outside the folder."""

    file: str = Field(pattern=FILE_PATTERN)
    bytes: int = Field(ge=0)
    checksum: str = Field(pattern=r"^[0-9a-f]{32}$", description="xxh3_128 of the whole file")


class ShardRecord(FileRecord):
    """The fragments of one process, all of one tensor-parallel index."""

    tensor_index: int = Field(ge=0)
    fragments: list[FragmentRecord]


class ParameterRecord(_Record):
    """`TensorLayout` of one parameter, and whether it is frozen; a frozen parameter has no moments."""

    shape: list[Annotated[int, Field(ge=1)]] = Field(min_length=1, max_length=8)
    dim: int | None = Field(ge=0)
    stride: int = Field(ge=1)
    frozen: bool = False

    @property
    def layout(self) -> TensorLayout:
        return TensorLayout(tuple(self.shape), self.dim, self.stride)


class Manifest(_Record):
    """The content of `manifest.json`, apart from the checksum over itself."""

    format_version: int
    step: int = Field(ge=0, le=LARGEST_STEP)
    tensor_size: int = Field(ge=1, description="tensor-parallel processes of the run that wrote it")
    parameters: dict[str, ParameterRecord] = Field(min_length=1)
    shards: list[ShardRecord]
    extra_files: list[FileRecord]
    state: dict[str, JsonValue]

    @property
    def layouts(self) -> dict[str, TensorLayout]:
        return {name: record.layout for name, record in self.parameters.items()}

    @property
    def frozen(self) -> set[str]:
        """Names of the frozen parameters, which are kept without moments."""
        return {name for name, record in self.parameters.items() if record.frozen}

    @property
    def files(self) -> list[FileRecord]:
        """Every file the folder must hold beside the manifest."""
        return [*self.shards, *self.extra_files]


def _canonical_checksum(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return xxhash.xxh3_128_hexdigest(text.encode())


def encode_manifest(manifest: Manifest) -> bytes:
    """The file's bytes, with a checksum over the content, so that a changed number in the state is noticed too."""
    content = manifest.model_dump(mode="python")
    try:
        content["checksum"] = _canonical_checksum(content)
    except ValueError as error:
        raise CheckpointError(f"the run's state holds NaN or an infinity, which JSON cannot keep: {error}") from error
    return json.dumps(content, allow_nan=False).encode()


def decode_manifest(data: bytes) -> Manifest:
    """The manifest in `data`; `CheckpointError` if it is not valid."""
    try:
        content = decode_json(data)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    version = content.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"its format_version is {version!r} and this version of Espalier reads {FORMAT_VERSION}: use the version "
            "of Espalier that wrote it"
        )
    checksum = content.pop("checksum", None)
    if checksum != _canonical_checksum(content):
        raise CheckpointError("its content does not match its own checksum, so it was damaged or edited")
    try:
        manifest = Manifest.model_validate(content)
    except ValidationError as error:
        raise CheckpointError(first_validation_error(error)) from error
    names = [record.file for record in manifest.files]
    if len(set(names)) < len(names):
        raise CheckpointError(f"it names the file {next(n for n in names if names.count(n) > 1)} twice")
    check_coverage(
        manifest.layouts,
        manifest.tensor_size,
        (
            (shard.tensor_index, piece.parameter, piece.key, piece.start, piece.length)
            for shard in manifest.shards
            for piece in shard.fragments
        ),
        manifest.frozen,
    )
    for shard in manifest.shards:
        needed = FP32_BYTES * sum(piece.length for piece in shard.fragments)
        if shard.bytes <= needed:
            raise CheckpointError(f"{shard.file} has {shard.bytes} bytes and should hold {needed} bytes of fragments")
    return manifest


def first_validation_error(error: ValidationError) -> str:
    """Pydantic's first complaint in one line: where and what."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    return f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"


def check_coverage(
    layouts: Mapping[str, TensorLayout],
    tensor_size: int,
    pieces: Iterable[tuple[int, str, str, int, int]],
    frozen: Collection[str] = (),
) -> None:
    """CheckpointError unless `pieces` (tensor index, parameter, key, start, length) tile every parameter: no gap, no
    overlap, nothing else.

    A replicated parameter is kept once, under tensor index 0; a `frozen` one is kept without moments. Nothing is
    allocated, and the work is bounded by the number of pieces, whatever shapes are claimed.
    """
    spans: dict[tuple[str, str, int], list[tuple[int, int]]] = {}
    for index, name, key, start, length in pieces:
        spans.setdefault((name, key, index), []).append((start, length))
    for name, layout in layouts.items():
        if layout.dim is not None:
            if layout.dim >= len(layout.full_shape):
                raise CheckpointError(f"{name} has the shape {layout.full_shape}, which has no dimension {layout.dim}")
            if layout.full_shape[layout.dim] % (layout.stride * tensor_size):
                raise CheckpointError(
                    f"dimension {layout.dim} of {name} {layout.full_shape} does not divide into {layout.stride} blocks "
                    f"over {tensor_size} tensor-parallel processes"
                )
        size = math.prod(layout.shard_shape(tensor_size))
        for index in range(1 if layout.dim is None else tensor_size):
            for key in ("master",) if name in frozen else KEYS:
                position = 0
                for start, length in sorted(spans.pop((name, key, index), [])):
                    if start != position:
                        fault = f"from {position} to {start} are missing"
                        if start < position:
                            fault = f"from {start} to {min(position, start + length)} are there twice"
                        raise CheckpointError(f"{key} of {name} (tensor-parallel index {index}): the numbers {fault}")
                    position = start + length
                if position != size:
                    raise CheckpointError(
                        f"{key} of {name} (tensor-parallel index {index}) has {position} numbers and should have {size}"
                    )
    for name, key, index in spans:
        raise CheckpointError(f"{key} of {name} (tensor-parallel index {index}) belongs to no parameter of the model")


def write_tensors(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterable[Tensor],
    dtype: torch.dtype = torch.float32,
    metadata: Mapping[str, str] | None = None,
) -> tuple[int, str]:
    """Writes `tensors` of this `dtype`, in the order of `shapes`, as one safetensors file; its size and checksum.

    Tensors are copied to the host one at a time. `safetensors.torch.save_file` would hold host copies of all tensors of
    a GPU at once, read the file again for the checksum, hide why a write failed, and ignore the umask.
    """
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _TYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def blocks() -> Iterator[bytes | memoryview]:
        yield len(text).to_bytes(8, "little") + text
        for (name, shape), tensor in zip(shapes.items(), tensors, strict=True):
            if tensor.dtype != dtype or tensor.shape != shape:
                found = f"{tensor.dtype} {tuple(tensor.shape)}".removeprefix("torch.")
                raise ValueError(f"{name} is {found} and not {str(dtype).removeprefix('torch.')} {shape}")
            yield tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data

    return write_blocks(path, blocks())


def open_tensors(path: Path) -> tuple[Any, dict[str, tuple[int, ...]]]:
    """A handle of a safetensors file, and the shapes of its tensors, all fp32; only the header is read."""
    plain_file_bytes(path)
    try:
        handle = safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a whole safetensors file: {error}") from error
    shapes = {}
    for name in handle.keys():  # noqa: SIM118 (it is no dictionary)
        header = handle.get_slice(name)
        if header.get_dtype() != "F32":
            raise CheckpointError(f"{path} holds {name!r} as {header.get_dtype()} and not as F32")
        shapes[name] = tuple(header.get_shape())
    return handle, shapes
