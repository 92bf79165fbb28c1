"""Parameters, fragments and damage for tests of checkpoints: what a ZeRO run over tensor-parallel processes would give.

Values are functions of name, key and step, so that every process, and the test itself, knows the logical tensors.
"""

import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor

from model.config import ModelConfig, factored_projections
from model.sharding import TensorLayout
from pretrain.checkpoint.format import KEYS, MANIFEST_NAME, Fragment
from pretrain.checkpoint.reader import CheckpointReader
from pretrain.checkpoint.retention import Retention
from pretrain.checkpoint.writer import write_checkpoint
from tests.support.reference import frozen_names, random_tensors

LAYOUTS = {
    "embedding.weight": TensorLayout((16, 6), dim=0),
    "fc1.A": TensorLayout((3, 8), dim=1),
    "fc1.B": TensorLayout((16, 3), dim=0, stride=2),
    "fc1.norm_weight": TensorLayout((5,)),
    "fc1.bias": TensorLayout((8,), dim=0),
    "cube.weight": TensorLayout((2, 8, 3), dim=1, stride=2),
}
STATE: dict[str, Any] = {"note": "ünïcode", "numbers": [1, 2.5, -1e-300, None, True], "deep": {"a": {"b": []}}}


def logical(name: str, key: str, step: int, layouts: Mapping[str, TensorLayout] = LAYOUTS) -> Tensor:
    """The full tensor of a parameter and key at a step."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name}|{key}|{step}".encode()))
    return torch.randn(layouts[name].full_shape, generator=generator)


def flat_fragments(tensors: Mapping[tuple[str, str], Tensor], part: int, parts: int) -> Iterator[Fragment]:
    """Fragments as ZeRO makes them: per key, all shards lie in one flat tensor, which is cut into equal parts
    regardless of borders."""
    for key in KEYS:
        shards = {name: tensor.reshape(-1) for (name, k), tensor in tensors.items() if k == key}
        flat = torch.cat(list(shards.values()))
        begin, end = len(flat) * part // parts, len(flat) * (part + 1) // parts
        position = 0
        for name, shard in shards.items():
            first, last = max(begin, position), min(end, position + len(shard))
            if first < last:
                yield Fragment(name, key, first - position, flat[first:last])
            position += len(shard)


def tokenizer_file(folder: Path) -> Path:
    """A file that nothing reads as a tokenizer."""
    path = folder / "bpe.model"
    path.write_bytes(b"a tokenizer")
    return path


def place(tensor_size: int) -> tuple[int, int, int]:
    """This process's tensor index, data index and the number of data-parallel processes."""
    process, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return process % tensor_size, process // tensor_size, processes // tensor_size


def own_fragments(step: int, tensor_size: int) -> Iterator[Fragment]:
    """The fragments of this process."""
    tensor_index, data_index, data_size = place(tensor_size)
    tensors = {
        (name, key): layout.shard(logical(name, key, step), tensor_index, tensor_size)
        for name, layout in LAYOUTS.items()
        for key in KEYS
    }
    yield from flat_fragments(tensors, data_index, data_size)


def save(root: Path, step: int, tensor_size: int = 1, /, **changes: Any) -> Path:
    """Writes the checkpoint of a step; `changes` replace arguments of `write_checkpoint`."""
    arguments: dict[str, Any] = {
        "fragments": own_fragments(step, tensor_size),
        "layouts": LAYOUTS,
        "state": STATE | {"step": step},
        "tensor_index": place(tensor_size)[0],
        "tensor_size": tensor_size,
        "retention": Retention(2),
        "extra_files": {},
    }
    return write_checkpoint(root, step, **(arguments | changes))


def model_state(config: ModelConfig, ranks: dict[str, int], step: int) -> dict[str, Any]:
    """The state a trainer would give."""
    before = {name: rank // 2 for name, rank in ranks.items()}
    growth = [{"step": 5, "before": before, "after": ranks, "seconds": 0.25}] if ranks else []
    return {
        "model": config.model_dump(mode="json"),
        "ranks": ranks,
        "growth": growth,
        "train": {"step": step, "consumed_samples": step * 8, "consumed_tokens": step * 8 * 16, "skipped_steps": 0},
        "config": {"train": {"precision": "bf16"}, "deepspeed": {"stage": 1}},
        "tokenizer": {"fingerprint": "0" * 64, "vocabulary": config.vocabulary},
    }


def save_model(root: Path, config: ModelConfig, ranks: dict[str, int], tokenizer: Path, step: int = 10) -> Path:
    """A checkpoint of a whole model from one process that stands for a tensor-parallel run of one."""
    tensors = random_tensors(config, ranks, seed=3)
    gated = {f"{projection.name}.B" for projection in factored_projections(config) if projection.kind == "fc1"}
    layouts = {
        name: TensorLayout(
            tuple(tensor.shape),
            dim=None if tensor.dim() == 1 else int(name.endswith(".A")),
            stride=2 if name in gated and config.gated else 1,
        )
        for name, tensor in tensors.items()
    }
    frozen = frozen_names(config)
    states = {
        (name, key): tensor + KEYS.index(key)
        for name, tensor in tensors.items()
        for key in KEYS
        if key == "master" or name not in frozen
    }
    return write_checkpoint(
        root,
        step,
        flat_fragments(states, 0, 1),
        layouts,
        model_state(config, ranks, step),
        tensor_index=0,
        tensor_size=1,
        retention=Retention(2),
        extra_files={"tokenizer.model": tokenizer},
        frozen=frozen,
    )


def sign(content: dict[str, Any]) -> bytes:
    """A manifest file of this content whose own checksum is right."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return json.dumps(content | {"checksum": xxhash.xxh3_128_hexdigest(text.encode())}).encode()


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the manifest and signs it again, as somebody would who means to deceive."""
    path = folder / MANIFEST_NAME
    content = json.loads(path.read_bytes())
    del content["checksum"]
    change(content)
    path.write_bytes(sign(content))


def flip_bit(path: Path, position: int) -> None:
    """Changes one bit of the byte at `position` (negative: from the end)."""
    data = bytearray(path.read_bytes())
    data[position] ^= 4
    path.write_bytes(data)


def hidden_names(root: Path) -> list[str]:
    """What saves leave behind that is neither a checkpoint nor the pointer."""
    return sorted(path.name for path in root.iterdir() if path.name.startswith("."))


def assert_holds(folder: Path, step: int) -> None:
    """The checkpoint is whole, and every logical tensor and every shard of other layouts has the right bits."""
    reader = CheckpointReader(folder)
    reader.verify()
    assert reader.step == step
    assert reader.state == STATE | {"step": step}
    assert reader.layouts == LAYOUTS
    for name, layout in LAYOUTS.items():
        for key in KEYS:
            expected = logical(name, key, step)
            assert torch.equal(reader.read(name, key), expected)
            for processes in (1, 2, 4):
                for index in range(processes):
                    shard = reader.read_shard(name, key, index, processes)
                    assert shard.is_contiguous()
                    assert torch.equal(shard, layout.shard(expected, index, processes))
