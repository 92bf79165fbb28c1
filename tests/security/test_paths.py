"""Names and links in checkpoints, and what headers claim: nothing outside the folder is read, written or removed."""

import os
import re
import shutil
import struct
import subprocess
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from pretrain.checkpoint.format import MANIFEST_NAME
from pretrain.checkpoint.reader import CheckpointReader, locate_checkpoint
from pretrain.config.run import load_config
from pretrain.convert.consolidated import ConsolidatedModel, facts_of
from pretrain.convert.huggingface_import import open_source
from pretrain.data.index_check import HEADER, MAGIC, scan_index
from pretrain.disk import file_checksum
from pretrain.errors import EspalierError
from tests.pretrain.convert.test_consolidated import edit_json
from tests.security.planting import STEP, refusal
from tests.support.checkpoint_cases import edit_manifest, save

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def step(world: Path, tmp_path: Path) -> Path:
    """A step's folder in `run/checkpoints`, and `secret`, a file beside the run."""
    shutil.copytree(world / "checkpoints", tmp_path / "run" / "checkpoints")
    (tmp_path / "secret").write_text("what others must not have")
    return tmp_path / "run" / "checkpoints" / STEP


@pytest.mark.faults
@pytest.mark.parametrize(
    "name",
    [
        "../../../secret",
        "{outside}/secret",
        "..",
        ".",
        "",
        "/",
        "a/../secret",
        "a\\secret",
        ".secret",
        "secret\n",
        "a\0b",
    ],
)
def test_extra_files_have_plain_names(name: str, step: Path, tmp_path: Path) -> None:
    """Also where size and checksum are those of the file that the name leads to."""
    secret = tmp_path / "secret"
    record = {"file": name.format(outside=tmp_path), "bytes": secret.stat().st_size, "checksum": file_checksum(secret)}
    edit_manifest(step, lambda manifest: manifest["extra_files"].append(record))
    with pytest.raises(EspalierError, match=re.escape(str(step / MANIFEST_NAME))) as refused:
        CheckpointReader(step)
    assert "file: String should match pattern" in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.faults
@pytest.mark.parametrize("file", ["tokenizer.model", "shard_000_00000.safetensors"])
def test_a_link_to_the_very_bytes_is_refused(file: str, step: Path, tmp_path: Path) -> None:
    shutil.move(step / file, tmp_path / file)
    (step / file).symlink_to(tmp_path / file)
    with pytest.raises(EspalierError, match=f"{file} is not a regular file"):
        CheckpointReader(step)


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.faults
@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("part", "file", "read"),
    [
        (f"checkpoints/{STEP}", "manifest.json", CheckpointReader),
        (f"checkpoints/{STEP}", "tokenizer.model", CheckpointReader),
        (f"checkpoints/{STEP}", "shard_000_00000.safetensors", CheckpointReader),
        ("consolidated", "espalier.json", ConsolidatedModel),
        ("consolidated", "model-00001-of-*", ConsolidatedModel),
        ("consolidated", "tokenizer.model", ConsolidatedModel),
        ("dense", "config.json", open_source),
        ("dense", "tokenizer.model", open_source),
        ("dense", "model.safetensors", open_source),
        ("settings", "base.yaml", lambda folder: load_config(str(folder / "run.yaml"))),
    ],
)
def test_a_pipe_is_no_file_and_nobody_waits_for_it(
    part: str, file: str, read: Callable[[Path], object], world: Path, tmp_path: Path
) -> None:
    shutil.copytree(world / part, tmp_path / "copy")
    fifo(next((tmp_path / "copy").glob(file)))
    refusal(read, tmp_path / "copy")


@pytest.mark.faults
def test_a_linked_step_is_neither_found_nor_read(step: Path, tmp_path: Path) -> None:
    run = step.parents[1]
    shutil.move(step, tmp_path / "elsewhere")
    step.symlink_to(tmp_path / "elsewhere")
    for path in (run, run / "checkpoints"):
        with pytest.raises(EspalierError, match="symbolic link"):
            locate_checkpoint(path)
    with pytest.raises(EspalierError, match="symbolic link"):
        CheckpointReader(locate_checkpoint(step))


@pytest.mark.faults
@pytest.mark.parametrize("name", ["step_0000000010", "step_10", "step_000000010 ", "step_00000001٠", "STEP_000000010"])
def test_only_step_names_count(name: str, step: Path) -> None:
    step.rename(step.with_name(name))
    with pytest.raises(EspalierError, match=re.escape(str(step.parent))):
        locate_checkpoint(step.parent)


@pytest.mark.faults
def test_saving_and_pruning_stay_inside(tmp_path: Path) -> None:
    """`latest` and old steps may be links: the links go, what they lead to stays as it is."""
    root, treasure = tmp_path / "checkpoints", tmp_path / "treasure"
    shutil.move(save(tmp_path / "other", 1), treasure)
    root.mkdir()
    (root / "step_000000001").symlink_to(treasure)
    (tmp_path / "file").write_text("mine")
    (root / "latest").symlink_to(tmp_path / "file")
    before = {path: path.read_bytes() for path in treasure.iterdir()}
    for step in (2, 3, 4, 5):
        save(root, step)
    save(root, 1)
    assert (root / "latest").read_text().strip().startswith("step_")
    assert not (root / "latest").is_symlink()
    assert (tmp_path / "file").read_text() == "mine"
    assert {path: path.read_bytes() for path in treasure.iterdir()} == before


@pytest.mark.faults
def test_names_of_checkpoints_are_no_arithmetic(tmp_path: Path) -> None:
    """The quickstart counts checkpoints, and bash runs what stands in a subscript."""
    loop = re.search(r"^reached=0\n.*?^done\n", (ROOT / "launch" / "quickstart.sh").read_text(), re.M | re.S)
    assert loop
    for name in ("step_000000009", "step_000000010", "step_0+out[$(mkdir canary)]", "step_x"):
        (tmp_path / "out" / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "out" / "checkpoints" / name / "manifest.json").touch()
    script = f"set -euo pipefail\nout=$PWD/out\n{loop[0]}echo $reached"
    answer = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert not (tmp_path / "canary").exists()
    assert (answer.stdout, answer.stderr) == ("10\n", "")


# Headers --------------------------------------------------------------------------------------------------------------


def _index(sequences: int, documents: int) -> bytes:
    return HEADER.pack(MAGIC, 1, 8, sequences, documents) + bytes(64)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("part", "file", "content", "read"),
    [
        ("corpus", "corpus.idx", _index(2**60, 2**60), lambda folder: scan_index(folder / "corpus", 500)),
        ("corpus", "corpus.idx", _index(10**9, 10**9), lambda folder: scan_index(folder / "corpus", 500)),
        ("consolidated", "model-00001-of-*", struct.pack("<Q", 2**63) + b"{}", ConsolidatedModel),
        ("consolidated", "model-00001-of-*", struct.pack("<Q", 90_000_000) + b"{}", ConsolidatedModel),
        (
            "consolidated",
            "model-00001-of-*",
            struct.pack("<Q", 80)
            + b'{"x":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4000000000000]}}'.ljust(80),
            ConsolidatedModel,
        ),
    ],
)
def test_what_a_header_claims_is_checked_before_memory_is_taken(
    part: str, file: str, content: bytes, read: Callable[[Path], object], world: Path, tmp_path: Path
) -> None:
    shutil.copytree(world / part, tmp_path / "copy")
    next((tmp_path / "copy").glob(file)).write_bytes(content)
    tracemalloc.start()
    try:
        refusal(read, tmp_path / "copy")
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.faults
def test_a_model_of_endless_layers_is_refused_before_they_are_listed(world: Path, tmp_path: Path) -> None:
    for part in ("checkpoints", "consolidated"):
        shutil.copytree(world / part, tmp_path / part)
    edit_manifest(tmp_path / "checkpoints" / STEP, lambda manifest: manifest["state"]["model"].update(layers=20_000))
    edit_json(tmp_path / "consolidated" / "espalier.json", lambda facts: facts["model"].update(layers=20_000))
    readers = {
        "checkpoints": lambda folder: facts_of(CheckpointReader(folder / STEP)),
        "consolidated": ConsolidatedModel,
    }
    for part, read in readers.items():
        tracemalloc.start()
        try:
            assert "too few for 20000 layers" in refusal(read, tmp_path / part)
            assert tracemalloc.get_traced_memory()[1] < 2**21
        finally:
            tracemalloc.stop()
