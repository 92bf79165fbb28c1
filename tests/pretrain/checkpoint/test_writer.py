"""Saving: what was saved can be read back in any parallel layout."""

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from model.sharding import TensorLayout
from pretrain.checkpoint.format import KEYS, Fragment
from pretrain.checkpoint.reader import CheckpointReader
from pretrain.checkpoint.retention import Retention
from pretrain.checkpoint.saver import Saver
from pretrain.checkpoint.writer import CheckpointWrite, Content
from pretrain.errors import CheckpointError
from tests.support.checkpoint_cases import LAYOUTS, STATE, assert_holds, hidden_names, logical, own_fragments, save
from tests.support.distributed import run


@pytest.mark.parametrize(("processes", "tensor_size"), [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)])
def test_round_trip(tmp_path: Path, processes: int, tensor_size: int) -> None:
    folders = run(save, processes, tmp_path, 7, tensor_size)
    assert folders == [tmp_path / "step_000000007"] * processes
    assert_holds(folders[0], 7)
    reader = CheckpointReader(folders[0])
    assert reader.tensor_size == tensor_size
    assert len(reader.manifest.shards) == processes
    assert (tmp_path / "latest").read_text() == "step_000000007\n"
    assert hidden_names(tmp_path) == []


def _saved_beside(root: Path, values: torch.Tensor) -> list[dict[str, Any]]:
    """What a save beside the training reports, whose one fragment is `values`."""
    reported: list[dict[str, Any]] = []

    def begin(resources: contextlib.ExitStack) -> tuple[CheckpointWrite, list[Fragment]]:
        write = CheckpointWrite(Content(root, 1, LAYOUTS, STATE, 0, 1, {}), Retention(2))
        return write, [Fragment("embedding.weight", "master", 0, values)]

    saver = Saver(beside=True, failures=2, report=lambda kind, step, **facts: reported.append({"kind": kind, **facts}))
    saver.save(begin, 1)
    saver.finish()
    return reported


def test_a_copy_for_which_there_is_no_memory_is_a_failed_save(tmp_path: Path) -> None:
    (failed,) = _saved_beside(tmp_path, torch.zeros(1).expand(2**48))
    assert failed["kind"] == "save_failed"
    assert "host memory does not hold a copy (" in failed["error"]
    assert "set checkpoint.background=false" in failed["error"]


def test_a_copy_that_fails_in_another_way_is_no_lack_of_memory(tmp_path: Path) -> None:
    """As when a device has failed; what cannot be copied here is a tensor without numbers."""
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        _saved_beside(tmp_path, torch.zeros(4, device="meta"))


def test_a_write_counts_its_fragments(tmp_path: Path) -> None:
    write = CheckpointWrite(Content(tmp_path, 1, LAYOUTS, STATE, 0, 1, {}), Retention(2))
    write.write(own_fragments(1, 1))
    assert write.fragments_written == len(KEYS) * len(LAYOUTS)
    assert CheckpointReader(write.commit()).layouts == LAYOUTS


def test_without_a_process_group(tmp_path: Path) -> None:
    tokenizer = tmp_path / "bpe.model"
    tokenizer.write_bytes(bytes(range(256)))
    folder = save(tmp_path / "new" / "checkpoints", 3, extra_files={"tokenizer.model": tokenizer})
    assert_holds(folder, 3)
    assert CheckpointReader(folder).extra_file("tokenizer.model").read_bytes() == tokenizer.read_bytes()


def test_replicated_parameters_are_kept_once(tmp_path: Path) -> None:
    folder = run(save, 4, tmp_path, 1, 2)[0]
    pieces = [
        (shard.tensor_index, piece.length)
        for shard in CheckpointReader(folder).manifest.shards
        for piece in shard.fragments
        if piece.parameter == "fc1.norm_weight" and piece.key == "master"
    ]
    assert {index for index, _ in pieces} == {0}
    assert sum(length for _, length in pieces) == 5


def test_files_are_plain_safetensors_with_the_usual_permissions(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    path = folder / "shard_000_00000.safetensors"
    with safe_open(path, framework="pt") as file:
        assert torch.equal(file.get_tensor("fc1.bias|exp_avg|0"), logical("fc1.bias", "exp_avg", 1))
    other = tmp_path / "other"
    other.touch()
    assert path.stat().st_mode == other.stat().st_mode


def test_a_fragment_may_be_a_strided_view(tmp_path: Path) -> None:
    wide = torch.arange(12.0).view(6, 2)
    layouts = {"w": TensorLayout((6,))}
    fragments = [Fragment("w", key, 0, wide[:, column]) for key, column in zip(KEYS, (0, 1, 0), strict=True)]
    reader = CheckpointReader(save(tmp_path, 1, fragments=fragments, layouts=layouts))
    assert torch.equal(reader.read("w", "exp_avg"), wide[:, 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_frozen_parameter_is_kept_without_moments(tmp_path: Path, dtype: torch.dtype) -> None:
    values = torch.linspace(-1, 1, 6).to(dtype)
    layouts = {"w": TensorLayout((6,)), "trained": TensorLayout((2,))}
    trained = [Fragment("trained", key, 0, torch.zeros(2)) for key in KEYS]
    frozen = Fragment("w", "master", 0, values)
    reader = CheckpointReader(save(tmp_path, 1, fragments=[*trained, frozen], layouts=layouts, frozen={"w"}))
    reader.verify()
    assert reader.frozen == {"w"}
    assert torch.equal(reader.read("w"), values.float())
    with pytest.raises(CheckpointError, match="holds no exp_avg of w, which was frozen"):
        reader.read("w", "exp_avg")
    with pytest.raises(CheckpointError, match=r"exp_avg of w .* has 0 numbers and should have 6"):
        save(tmp_path, 2, fragments=[*trained, frozen], layouts=layouts)
