"""A consolidated folder equals the checkpoint's logical tensors, and writing it never replaces anything else."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from model.config import ModelConfig, factored_projections
from pretrain.checkpoint.reader import CheckpointReader
from pretrain.convert.consolidated import ConsolidatedModel, facts_of, plan_files, write_consolidated
from pretrain.errors import CheckpointError
from tests.support.checkpoint_cases import edit_manifest, hidden_names, save, save_model, tokenizer_file
from tests.support.reference import random_tensors

CONFIG = ModelConfig(layers=2, hidden=16, heads=2, ffn=24, sequence_length=8, vocabulary=100, vocabulary_multiple=16)
RANKS = {projection.name: 4 + 2 * projection.layer for projection in factored_projections(CONFIG)}
GPT2 = ModelConfig(
    family="gpt2", layers=1, hidden=16, heads=2, sequence_length=8, vocabulary=100, vocabulary_multiple=16,
    factored_layers="mlp",
)  # fmt: skip
GPT2_RANKS = {projection.name: 3 for projection in factored_projections(GPT2)}
ADDITIVE = CONFIG.model_copy(update={"parametrization": "additive"})


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    return tokenizer_file(tmp_path)


@pytest.fixture
def reader(tmp_path: Path, tokenizer: Path) -> CheckpointReader:
    return CheckpointReader(save_model(tmp_path / "checkpoints", CONFIG, RANKS, tokenizer))


def contents(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(("config", "ranks"), [(CONFIG, RANKS), (GPT2, GPT2_RANKS), (ADDITIVE, RANKS)])
def test_equals_the_logical_tensors(
    tmp_path: Path, tokenizer: Path, config: ModelConfig, ranks: dict[str, int]
) -> None:
    reader = CheckpointReader(save_model(tmp_path / "checkpoints", config, ranks, tokenizer))
    output = tmp_path / "deep" / "merged"
    reported: list[str] = []
    write_consolidated(reader, output, 10**9, on_parameter=reported.append)
    assert contents(output) == ["espalier.json", "model.safetensors", "tokenizer.model"]
    assert hidden_names(output.parent) == []
    expected = random_tensors(config, ranks, seed=3)
    assert sorted(reported) == sorted(expected)
    model = ConsolidatedModel(output)
    assert model.config == config
    assert model.ranks == ranks
    assert set(model.names) == expected.keys()
    assert model.parameters == sum(tensor.numel() for tensor in expected.values())
    assert all(torch.equal(model.read(name), tensor) for name, tensor in expected.items())
    assert model.tokenizer_path.read_bytes() == b"a tokenizer"
    assert model.facts == {
        "format_version": 1,
        **{key: reader.state[key] for key in ("model", "ranks", "growth", "train", "tokenizer")},
    }


def test_shards(tmp_path: Path, reader: CheckpointReader) -> None:
    output = tmp_path / "merged"
    write_consolidated(reader, output, 3000)
    index = json.loads((output / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 3
    assert files == [name for name in contents(output) if name.startswith("model-")]
    total = 0
    for file in files:
        tensors = load_file(output / file)
        assert tensors.keys() == {name for name, place in index["weight_map"].items() if place == file}
        size = sum(tensor.nbytes for tensor in tensors.values())
        assert size <= 3000 or len(tensors) == 1
        total += size
    assert index["metadata"]["total_size"] == total
    model = ConsolidatedModel(output)
    assert all(torch.equal(model.read(name), reader.read(name)) for name in reader.layouts)


@pytest.mark.parametrize(
    ("sizes", "groups"),
    [
        ([5], [[0]]),
        ([5, 5], [[0, 1]]),
        ([5, 6], [[0], [1]]),
        ([50, 1, 50, 4, 6, 1], [[0], [1], [2], [3, 4], [5]]),
    ],
)
def test_plan_files(sizes: list[int], groups: list[list[int]]) -> None:
    plan = plan_files({str(place): size for place, size in enumerate(sizes)}, 10)
    assert [[int(name) for name in names] for names in plan.values()] == groups
    if len(groups) > 1:
        assert list(plan) == [f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]


# What may be replaced -------------------------------------------------------------------------------------------------


def test_an_empty_folder_may_be_filled(tmp_path: Path, reader: CheckpointReader) -> None:
    output = tmp_path / "merged"
    output.mkdir()
    write_consolidated(reader, output, 10**9)
    assert ConsolidatedModel(output).config == CONFIG


def test_others_files_are_never_touched(tmp_path: Path, reader: CheckpointReader) -> None:
    output = tmp_path / "merged"
    output.mkdir()
    (output / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match=r"it has no espalier\.json\): give another --output"):
        write_consolidated(reader, output, 10**9, overwrite=True)
    (output / "espalier.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"thesis\.tex"):
        write_consolidated(reader, output, 10**9, overwrite=True)
    assert contents(output) == ["espalier.json", "thesis.tex"]
    with pytest.raises(CheckpointError, match="is not a folder"):
        write_consolidated(reader, output / "thesis.tex", 10**9, overwrite=True)


def test_overwrite(tmp_path: Path, reader: CheckpointReader) -> None:
    output = tmp_path / "merged"
    write_consolidated(reader, output, 3000)
    with pytest.raises(CheckpointError, match="or --overwrite"):
        write_consolidated(reader, output, 10**9)
    assert len(contents(output)) > 4
    write_consolidated(reader, output, 10**9, overwrite=True)
    assert contents(output) == ["espalier.json", "model.safetensors", "tokenizer.model"]
    assert hidden_names(tmp_path) == []


@pytest.mark.faults
def test_a_failure_leaves_the_earlier_model(tmp_path: Path, reader: CheckpointReader) -> None:
    output = tmp_path / "merged"
    write_consolidated(reader, output, 10**9)
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    path = reader.folder / "shard_000_00000.safetensors"
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(b"\0" * len(data))
    (tmp_path / ".merged.partial").mkdir()  # left by a kill
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        write_consolidated(CheckpointReader(reader.folder), output, 10**9, overwrite=True)
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before
    assert hidden_names(tmp_path) == []


# What contradicts itself ----------------------------------------------------------------------------------------------


def swap_ranks(manifest: dict[str, Any]) -> None:
    """Exchanges the ranks of two layers of equal shape, so that sizes and totals stay the same."""
    ranks = manifest["state"]["ranks"]
    first, second = "decoder.layers.0.mlp.linear_fc2", "decoder.layers.1.mlp.linear_fc2"
    ranks[first], ranks[second] = ranks[second], ranks[first]


@pytest.mark.faults
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (swap_ranks, r"linear_fc2.A is (4, 24), and its rank 6 asks for (6, 24)"),
        (lambda m: m["state"]["ranks"].popitem(), "the ranks and the factored layers differ"),
        (lambda m: m["state"]["model"].update(hidden=8, heads=1), "asks for"),
        (lambda m: m["state"]["model"].update(vocabulary=150), "parameters, and a model with these ranks has"),
        (lambda m: m["state"]["model"].update(colour="red"), "model.colour: Extra inputs"),
        (lambda m: m["state"]["ranks"].update({"decoder.layers.0.mlp.linear_fc1": "4"}), "valid integer"),
        (lambda m: m["state"].pop("tokenizer"), "lacks tokenizer"),
    ],
)
def test_checkpoints_that_contradict_themselves(
    reader: CheckpointReader, tmp_path: Path, change: Callable[[dict[str, Any]], object], words: str
) -> None:
    edit_manifest(reader.folder, change)
    with pytest.raises(CheckpointError) as caught:
        write_consolidated(CheckpointReader(reader.folder), tmp_path / "merged", 10**9)
    assert words in str(caught.value)
    assert not (tmp_path / "merged").exists()


def test_a_checkpoint_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="lacks model, ranks, growth, train, tokenizer"):
        facts_of(CheckpointReader(save(tmp_path, 1)))


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.faults
@pytest.mark.parametrize(
    ("file", "damage", "words"),
    [
        ("espalier.json", Path.unlink, "is no consolidated model"),
        ("espalier.json", lambda p: p.write_text(""), "not valid JSON"),
        ("espalier.json", lambda p: edit_json(p, lambda c: c.update(format_version=9)), "format_version is 9"),
        ("espalier.json", lambda p: edit_json(p, lambda c: c.update(kind="dense")), "kind: Extra inputs"),
        ("espalier.json", lambda p: edit_json(p, lambda c: c["ranks"].popitem()), "factored layers differ"),
        ("tokenizer.model", Path.unlink, "tokenizer.model is missing"),
        ("model.safetensors.index.json", lambda p: p.write_text("[]"), "not a JSON object"),
        (
            "model.safetensors.index.json",
            lambda p: edit_json(p, lambda c: c["weight_map"].update({"x": "../../x"})),
            "not the name of a weight file",
        ),
        (
            "model.safetensors.index.json",
            lambda p: edit_json(p, lambda c: c["weight_map"].popitem()),
            "does not hold the tensors",
        ),
        ("model-00002-of-00002.safetensors", Path.unlink, "model-00002-of-00002.safetensors is missing"),
        ("model-00002-of-00002.safetensors", lambda p: p.write_bytes(p.read_bytes()[:-4]), "not a whole safetensors"),
    ],
)
def test_damaged_consolidated_folders(
    reader: CheckpointReader, tmp_path: Path, file: str, damage: Callable[[Path], object], words: str
) -> None:
    output = tmp_path / "merged"
    write_consolidated(reader, output, 15_000)
    damage(output / file)
    with pytest.raises(CheckpointError) as caught:
        ConsolidatedModel(output)
    assert words in str(caught.value)


def test_unknown_parameter(reader: CheckpointReader, tmp_path: Path) -> None:
    write_consolidated(reader, tmp_path / "merged", 10**9)
    with pytest.raises(CheckpointError, match="holds no parameter nothing"):
        ConsolidatedModel(tmp_path / "merged").read("nothing")
