"""The reader names damage and false manifests, and finds the newest checkpoint that can be trusted."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pretrain.checkpoint.format import FORMAT_VERSION, MANIFEST_NAME, fragment_name
from pretrain.checkpoint.reader import CheckpointReader, find_checkpoint, locate_checkpoint
from pretrain.errors import CheckpointError
from tests.support.checkpoint_cases import LAYOUTS, edit_manifest, flip_bit, logical, save, sign

SHARD = "shard_000_00000.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Folder of a checkpoint of step 20, beside one of step 10."""
    save(tmp_path / "checkpoints", 10)
    return save(tmp_path / "checkpoints", 20)


def test_imports_no_training_stack() -> None:
    code = (
        "import sys, pretrain.checkpoint.reader, pretrain.convert.consolidated\n"
        "print(sorted({name.split('.')[0] for name in sys.modules} & {'deepspeed', 'megatron', 'transformers'}))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


def test_tensors_are_ones_own(folder: Path) -> None:
    reader = CheckpointReader(folder)
    reader.read("fc1.norm_weight").zero_()
    reader.read_shard("fc1.bias", "master", 0, 1).zero_()
    reader.read_shard("fc1.bias", "master", 1, 2).zero_()
    for name in ("fc1.norm_weight", "fc1.bias"):
        assert torch.equal(reader.read(name), logical(name, "master", 20))
    reader.verify()


def test_unknown_requests(folder: Path) -> None:
    reader = CheckpointReader(folder)
    with pytest.raises(CheckpointError, match=r"holds no parameter fc2\.A"):
        reader.read("fc2.A")
    with pytest.raises(CheckpointError, match=r"holds no tokenizer\.model"):
        reader.extra_file("tokenizer.model")
    with pytest.raises(CheckpointError, match=r"over 3 tensor-parallel processes: change parallel\.tensor"):
        reader.read_shard("fc1.B", "master", 0, 3)
    with pytest.raises(ValueError, match="no tensor-parallel index 2 among 2"):
        reader.read_shard("fc1.B", "master", 2, 2)
    with pytest.raises(ValueError, match="momentum"):
        reader.read("fc1.B", "momentum")


# Damage ---------------------------------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def lengthen(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\0")


def link(path: Path) -> None:
    shutil.move(path, path.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent / "elsewhere")


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.faults
@pytest.mark.parametrize("damage", [truncate, empty, lengthen, link, make_folder, Path.unlink])
@pytest.mark.parametrize("file", [SHARD, MANIFEST_NAME])
def test_damage_that_shows_at_once(folder: Path, damage: Callable[[Path], object], file: str) -> None:
    damage(folder / file)
    words = "not valid JSON" if (damage, file) == (lengthen, MANIFEST_NAME) else file
    with pytest.raises(CheckpointError) as caught:
        CheckpointReader(folder)
    assert str(folder / file) in str(caught.value)
    assert words in str(caught.value)
    assert find_checkpoint(folder.parent) == folder.parent / "step_000000010"


@pytest.mark.faults
@pytest.mark.parametrize("position", [100, -1, -800])
def test_a_flipped_bit_shows_in_verify(folder: Path, position: int) -> None:
    flip_bit(folder / SHARD, position)
    with pytest.raises(CheckpointError, match=f"{SHARD} is damaged"):
        CheckpointReader(folder).verify()
    assert find_checkpoint(folder.parent) == folder
    assert find_checkpoint(folder.parent, verify=True) == folder.parent / "step_000000010"


@pytest.mark.faults
def test_readers_can_share_the_verification(tmp_path: Path) -> None:
    tokenizer = tmp_path / "t"
    tokenizer.write_bytes(b"tokenizer")
    folder = save(tmp_path / "checkpoints", 1, extra_files={"tokenizer.model": tokenizer})
    flip_bit(folder / "tokenizer.model", 0)
    reader = CheckpointReader(folder)
    reader.verify(0, 2)
    with pytest.raises(CheckpointError, match=r"tokenizer\.model is damaged"):
        reader.verify(1, 2)


@pytest.mark.faults
def test_a_flipped_bit_in_the_manifest(folder: Path) -> None:
    text = (folder / MANIFEST_NAME).read_text()
    (folder / MANIFEST_NAME).write_text(text.replace("-1e-300", "-1e-301"))
    with pytest.raises(CheckpointError, match=r"manifest\.json cannot be used: .*its own checksum"):
        CheckpointReader(folder)


# Lies -----------------------------------------------------------------------------------------------------------------

Manifest = dict[str, Any]


def first_shard(manifest: Manifest) -> dict[str, Any]:
    return manifest["shards"][0]


def set_shape(manifest: Manifest, shape: list[Any]) -> None:
    manifest["parameters"]["fc1.norm_weight"]["shape"] = shape


def claim_everything(manifest: Manifest, with_bytes: bool) -> None:
    """Adds a huge parameter to the manifest, which claims that all its fragments exist."""
    set_shape(manifest, [10**12])
    for piece in first_shard(manifest)["fragments"]:
        if piece["parameter"] == "fc1.norm_weight":
            piece["length"] = 10**12
    if with_bytes:
        first_shard(manifest)["bytes"] = 10**14


def set_piece(manifest: Manifest, **fields: object) -> None:
    first_shard(manifest)["fragments"][0].update(fields)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("lie", "words"),
    [
        (lambda m: m.update(format_version=FORMAT_VERSION + 1), f"format_version is {FORMAT_VERSION + 1}"),
        (lambda m: m.pop("format_version"), "format_version is None"),
        (lambda m: m.pop("tensor_size"), "tensor_size: Field required"),
        (lambda m: m.update(surprise=1), "surprise: Extra inputs"),
        (lambda m: m.update(step=True), "step: Input should be a valid integer"),
        (lambda m: m.update(step=-1), "step: Input should be greater than or equal to 0"),
        (lambda m: m.update(step=30), "is of step 30"),
        (lambda m: m.update(tensor_size=10**15), "does not divide"),
        (lambda m: m.update(tensor_size=0), "tensor_size"),
        (lambda m: m.update(shards=[]), "has 0 numbers"),
        (lambda m: set_shape(m, [10**12, 10**12]), f"should have {10**24}"),
        (lambda m: set_shape(m, [-5]), "greater than or equal to 1"),
        (lambda m: set_shape(m, [0]), "greater than or equal to 1"),
        (lambda m: set_shape(m, []), "at least 1 item"),
        (lambda m: set_shape(m, [1] * 100), "at most 8 items"),
        (lambda m: set_shape(m, [5.0]), "valid integer"),
        (lambda m: claim_everything(m, with_bytes=False), "should hold"),
        (lambda m: claim_everything(m, with_bytes=True), f"bytes and should have {10**14}"),
        (lambda m: set_piece(m, start=-1), "greater than or equal to 0"),
        (lambda m: set_piece(m, start=1), "are missing"),
        (lambda m: set_piece(m, length=0), "greater than or equal to 1"),
        (lambda m: set_piece(m, length=95), "has 95 numbers and should have 96"),
        (lambda m: set_piece(m, key="momentum"), "key: Input should be 'master'"),
        (lambda m: set_piece(m, parameter="fc9"), "has 0 numbers"),
        (lambda m: first_shard(m)["fragments"].append(first_shard(m)["fragments"][0]), "are there twice"),
        (lambda m: first_shard(m).update(tensor_index=1), "has 0 numbers"),
        (lambda m: first_shard(m).update(file="../step_000000010/" + SHARD), "file: String should match"),
        (lambda m: first_shard(m).update(file="/etc/passwd"), "file: String should match"),
        (lambda m: first_shard(m).update(file=".."), "file: String should match"),
        (lambda m: first_shard(m).update(file="shard_000_00001.safetensors"), "shard_000_00001.safetensors is missing"),
        (lambda m: first_shard(m).update(checksum="x"), "checksum: String should match"),
        (lambda m: m["extra_files"].append({"file": SHARD, "bytes": 1, "checksum": "0" * 32}), f"file {SHARD} twice"),
        (lambda m: m["parameters"]["fc1.A"].update(dim=2), "has no dimension 2"),
        (lambda m: m["parameters"]["fc1.A"].update(dim=-1), "greater than or equal to 0"),
        (lambda m: m["parameters"]["fc1.A"].update(stride=0), "greater than or equal to 1"),
        (lambda m: m["parameters"]["fc1.A"].update(stride=3), "does not divide into 3 blocks"),
    ],
)
def test_lies_of_the_manifest(folder: Path, lie: Callable[[Manifest], object], words: str) -> None:
    edit_manifest(folder, lie)
    with pytest.raises(CheckpointError) as caught:
        CheckpointReader(folder)
    assert words in str(caught.value)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.faults
def test_a_file_that_is_not_what_the_manifest_says(folder: Path) -> None:
    """Sizes and checksums are right, but the header has other names or another type, or the file is a pickle."""
    path = folder / SHARD
    header = path.read_bytes()
    for old, new in ((b"fc1.bias|master", b"fc1.bias|mastex"), (b'"dtype":"F32"', b'"dtype":"I32"')):
        path.write_bytes(header.replace(old, new))
        with pytest.raises(CheckpointError, match=SHARD):
            CheckpointReader(folder).read("fc1.bias")
    canary = folder.parent / "canary"
    path.write_bytes(pickle.dumps(Opens(str(canary))).ljust(len(header), b"."))
    with pytest.raises(CheckpointError, match=f"{SHARD} is not a whole safetensors file"):
        CheckpointReader(folder).read("fc1.bias")
    assert not canary.exists()


class Opens:
    """An object whose pickle writes a file when it is loaded."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.path, "w")


@pytest.mark.faults
def test_two_tensors_of_equal_size_that_changed_places(folder: Path) -> None:
    """The header decides where a tensor is, not the order in the file."""
    reader = CheckpointReader(folder)
    tensors = {
        fragment_name(name, key, 0): reader.read(name, key).flatten()
        for name in LAYOUTS
        for key in ("master", "exp_avg", "exp_avg_sq")
    }
    (folder / SHARD).unlink()
    save_file(dict(reversed(tensors.items())), folder / SHARD)
    edit_manifest(folder, lambda m: first_shard(m).update(bytes=(folder / SHARD).stat().st_size))
    again = CheckpointReader(folder)
    for name in LAYOUTS:
        assert torch.equal(again.read(name, "exp_avg"), logical(name, "exp_avg", 20))
    with pytest.raises(CheckpointError, match="damaged"):
        again.verify()


# Finding --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [None, "", "garbage\n", "../x\n", "/etc\n", "step_000000010\n", "step_000000099\n"])
def test_latest_is_not_believed(folder: Path, content: str | None) -> None:
    root = folder.parent
    (root / "latest").unlink()
    if content is not None:
        (root / "latest").write_text(content)
    assert find_checkpoint(root) == folder


def test_newest_by_number(tmp_path: Path) -> None:
    for step in (999_999_999, 1_000_000_000):
        save(tmp_path, step)
    assert find_checkpoint(tmp_path) == tmp_path / "step_1000000000"


def test_nothing_to_find(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path / "nowhere") is None
    (tmp_path / ".staging_step_000000001").mkdir()
    (tmp_path / "step_1").mkdir()
    (tmp_path / "xstep_000000001").mkdir()
    assert find_checkpoint(tmp_path) is None


@pytest.mark.faults
def test_never_silently_from_scratch(folder: Path) -> None:
    root = folder.parent
    (folder / MANIFEST_NAME).unlink()
    truncate(root / "step_000000010" / SHARD)
    with pytest.raises(CheckpointError) as caught:
        find_checkpoint(root)
    assert str(folder / MANIFEST_NAME) in str(caught.value)
    assert str(root / "step_000000010" / SHARD) in str(caught.value)
    assert "none of the 2 checkpoints" in str(caught.value)


@pytest.mark.faults
def test_links_and_aliases_are_passed_over(folder: Path, tmp_path: Path) -> None:
    root = folder.parent
    shutil.copytree(folder, root / "step_000000077")
    shutil.copytree(folder, root / "step_0000000020")
    shutil.move(folder, tmp_path / "elsewhere")
    (root / "step_000000088").symlink_to(tmp_path / "elsewhere")
    assert find_checkpoint(root) == root / "step_000000010"
    with pytest.raises(CheckpointError, match="symbolic link"):
        CheckpointReader(root / "step_000000088")
    assert CheckpointReader(tmp_path / "elsewhere").step == 20


def test_locate(folder: Path) -> None:
    assert locate_checkpoint(folder) == folder
    assert locate_checkpoint(folder.parent) == folder
    assert locate_checkpoint(folder.parent.parent) == folder
    assert locate_checkpoint(folder.parent / "step_000000010") == folder.parent / "step_000000010"
    flip_bit(folder / SHARD, -1)
    assert locate_checkpoint(folder.parent.parent, verify=True) == folder.parent / "step_000000010"
    with pytest.raises(CheckpointError, match="damaged"):
        locate_checkpoint(folder, verify=True)
    with pytest.raises(CheckpointError, match="there is no checkpoint in"):
        locate_checkpoint(folder.parent / "nowhere")


def test_huge_manifest_is_not_read(folder: Path) -> None:
    with (folder / MANIFEST_NAME).open("ab") as file:
        file.truncate(2**40)
    with pytest.raises(CheckpointError, match="is the most such a file can have"):
        CheckpointReader(folder)


def test_signing_as_the_format_does(folder: Path) -> None:
    """The tests sign manifests as the writer does, so the false ones above fail for their own reasons."""
    content = json.loads((folder / MANIFEST_NAME).read_bytes())
    checksum = content.pop("checksum")
    assert json.loads(sign(content))["checksum"] == checksum
