"""Manifests and fragments that contradict each other are refused before anything is allocated or written."""

from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from model.sharding import TensorLayout
from pretrain.checkpoint.format import (
    FORMAT_VERSION,
    KEYS,
    Manifest,
    ParameterRecord,
    ShardRecord,
    check_coverage,
    decode_manifest,
    encode_manifest,
    write_tensors,
)
from pretrain.disk import file_checksum
from pretrain.errors import CheckpointError

Piece = tuple[int, str, str, int, int]


def pieces_of(name: str, *spans: tuple[int, int, int]) -> list[Piece]:
    """Pieces of all keys of one parameter, each with the same spans (tensor index, start, length)."""
    return [(index, name, key, start, length) for key in KEYS for index, start, length in spans]


@pytest.mark.parametrize(
    ("layout", "tensor_size", "spans"),
    [
        (TensorLayout((4, 6)), 1, [(0, 0, 24)]),
        (TensorLayout((4, 6)), 3, [(0, 5, 19), (0, 0, 5)]),
        (TensorLayout((4, 6), dim=1), 2, [(0, 0, 12), (1, 0, 7), (1, 7, 5)]),
        (TensorLayout((4, 6), dim=0, stride=2), 2, [(1, 0, 12), (0, 0, 12)]),
    ],
)
def test_tilings(layout: TensorLayout, tensor_size: int, spans: list[tuple[int, int, int]]) -> None:
    check_coverage({"w": layout}, tensor_size, pieces_of("w", *spans))


def test_a_frozen_parameter_has_a_master_alone() -> None:
    layouts, pieces = {"w": TensorLayout((4,))}, pieces_of("w", (0, 0, 4))
    check_coverage(layouts, 1, pieces[:1], {"w"})
    with pytest.raises(CheckpointError, match=r"exp_avg of w .* belongs to no parameter"):
        check_coverage(layouts, 1, pieces, {"w"})
    with pytest.raises(CheckpointError, match=r"master of w .* has 0 numbers"):
        check_coverage(layouts, 1, [], {"w"})


@pytest.mark.parametrize(
    ("layout", "tensor_size", "pieces", "words"),
    [
        (TensorLayout((4,)), 1, [], "has 0 numbers and should have 4"),
        (TensorLayout((4,)), 1, pieces_of("w", (0, 0, 3)), "has 3 numbers and should have 4"),
        (TensorLayout((4,)), 1, pieces_of("w", (0, 0, 5)), "has 5 numbers and should have 4"),
        (TensorLayout((4,)), 1, pieces_of("w", (0, 1, 3)), "the numbers from 0 to 1 are missing"),
        (TensorLayout((4,)), 1, pieces_of("w", (0, 0, 3), (0, 2, 2)), "the numbers from 2 to 3 are there twice"),
        (TensorLayout((4,)), 1, pieces_of("w", (0, 0, 4), (0, 0, 4)), "the numbers from 0 to 4 are there twice"),
        (TensorLayout((4,)), 1, pieces_of("w", (0, 0, 4))[:2], "exp_avg_sq of w"),
        (TensorLayout((4,)), 2, pieces_of("w", (0, 0, 4), (1, 0, 4)), "index 1) belongs to no parameter"),
        (
            TensorLayout((4,), dim=0),
            2,
            pieces_of("w", (0, 0, 2)),
            "master of w (tensor-parallel index 1) has 0 numbers",
        ),
        (TensorLayout((4,)), 1, pieces_of("w", (0, 0, 4)) + pieces_of("v", (0, 0, 4)), "of v "),
        (TensorLayout((4,), dim=1), 1, pieces_of("w", (0, 0, 4)), "has no dimension 1"),
        (TensorLayout((6,), dim=0, stride=2), 2, pieces_of("w", (0, 0, 3), (1, 0, 3)), "does not divide into 2 blocks"),
        (TensorLayout((10**9, 10**9)), 10**9, pieces_of("w", (0, 0, 4)), f"should have {10**18}"),
    ],
)
def test_what_is_no_tiling(layout: TensorLayout, tensor_size: int, pieces: list[Piece], words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        check_coverage({"w": layout}, tensor_size, pieces)
    assert words in str(caught.value)


def some_manifest() -> Manifest:
    fragments = [{"parameter": "w", "key": key, "start": 0, "length": 4} for key in KEYS]
    shard = {"file": "shard_000_00000.safetensors", "bytes": 100, "checksum": "0" * 32, "tensor_index": 0}
    return Manifest(
        format_version=FORMAT_VERSION,
        step=3,
        tensor_size=1,
        parameters={"w": ParameterRecord(shape=[2, 2], dim=None, stride=1)},
        shards=[ShardRecord.model_validate(shard | {"fragments": fragments})],
        extra_files=[],
        state={"rates": [0.1, 1e-300, -0.0, 3e300, 2**70], "text": "é\ud800", "none": None},
    )


def test_manifest_round_trip() -> None:
    manifest = some_manifest()
    assert decode_manifest(encode_manifest(manifest)) == manifest


def test_every_changed_digit_is_noticed() -> None:
    data = encode_manifest(some_manifest())
    digits = [position for position, byte in enumerate(data) if chr(byte).isdigit()]
    assert len(digits) > 50
    for position in digits:
        changed = bytearray(data)
        changed[position] = ord("1") if data[position] != ord("1") else ord("2")
        with pytest.raises(CheckpointError):
            decode_manifest(bytes(changed))


def test_write_tensors(tmp_path: Any) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {"a": torch.randn(3, 2).T, "é": torch.randn(0), "c": torch.randn(5, requires_grad=True)}
    size, checksum = write_tensors(path, {name: tuple(t.shape) for name, t in tensors.items()}, tensors.values())
    assert size == path.stat().st_size
    assert checksum == file_checksum(path)
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("tensor", [torch.zeros(3), torch.zeros(2).half(), torch.zeros(2, dtype=torch.int32)])
def test_write_tensors_keeps_its_promise(tmp_path: Any, tensor: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="and not float32"):
        write_tensors(tmp_path / "x.safetensors", {"a": (2,)}, [tensor])
