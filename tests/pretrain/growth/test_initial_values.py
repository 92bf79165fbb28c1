"""Runs that start from a consolidated folder: its values on every layout, trained from step 0, and what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.config import ModelConfig, factored_projections
from model.process_groups import initialize_process_groups
from pretrain.checkpoint.reader import CheckpointReader, find_checkpoint
from pretrain.config.run import load_config
from pretrain.errors import CheckpointError, ConfigError
from pretrain.growth.initial_values import check_start, initial_model
from pretrain.tokenizer.load import open_tokenizer
from tests.support.consolidated_folder import write_consolidated
from tests.support.distributed import run
from tests.support.parallel_model import gather_logical
from tests.support.training_runs import SMALL, curve, train_in_workers, write_config

MODELS: dict[str, dict[str, Any]] = {
    "llama additive": {"family": "llama", "query_groups": 2, "parametrization": "additive"},
    "gpt2 factored": {"family": "gpt2", "parametrization": "factored"},
    "gpt2 dense": {"family": "gpt2", "parametrization": "dense"},
}
RANK = 4


def _make_start(folder: Path, corpus: Path, model: dict[str, Any]) -> dict[str, Tensor]:
    """Writes a consolidated folder with random numbers, and returns them."""
    tokenizer = open_tokenizer(corpus / "tokenizer.model")
    config = ModelConfig.model_validate({**SMALL["model"], **model, "vocabulary": tokenizer.vocabulary})
    ranks = {projection.name: RANK for projection in factored_projections(config)}
    return write_consolidated(folder, tokenizer, config, ranks)


def _config(path: Path, corpus: Path, start: Path, model: dict[str, Any], **sections: dict[str, Any]) -> Path:
    rank = {"policy": "fixed", "initial": RANK, "schedule": []} if model["parametrization"] == "dense" else {}
    sections = {"model": model, "rank": rank, "checkpoint": {"start_from": str(start)}, **sections}
    return write_config(path, corpus, path.with_suffix(""), **sections)


def _first_values(config: str, tensor: int, vocabulary: int) -> dict[str, Tensor]:
    initialize_process_groups(tensor)
    model = initial_model(load_config(config).with_vocabulary(vocabulary))
    return gather_logical(model, {name: parameter.detach() for name, parameter in model.named_parameters()})


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_every_layout_starts_from_the_folders_values(name: str, tensor: int, corpus: Path, tmp_path: Path) -> None:
    expected = _make_start(tmp_path / "start", corpus, MODELS[name])
    config = _config(tmp_path / "run.yaml", corpus, tmp_path / "start", MODELS[name])
    vocabulary = open_tokenizer(corpus / "tokenizer.model").vocabulary
    for found in run(_first_values, 2, str(config), tensor, vocabulary):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize(
    ("name", "other_layout"),
    [
        ("llama additive", (2, 2, 2)),
        *(pytest.param(name, (2, 2, 1), marks=pytest.mark.matrix) for name in MODELS),
        *(pytest.param(name, (2, 1, 2), marks=pytest.mark.matrix) for name in MODELS),
    ],
)
def test_whole_run_from_a_folder(name: str, other_layout: tuple[int, int, int], corpus: Path, tmp_path: Path) -> None:
    """The curve is the same on every layout, ranks grow, frozen weights stay the folder's, and a resume needs no
    folder."""
    model, start = MODELS[name], tmp_path / "start"
    first = _make_start(start, corpus, model)
    curves, checkpoints = [], []
    for label, (processes, tensor, stage) in (("plain", (1, 1, 0)), ("split", other_layout)):
        config = _config(tmp_path / f"{label}.yaml", corpus, start, model, deepspeed={"stage": stage})
        run(train_in_workers, processes, str(config), [f"parallel.tensor={tensor}", "train.steps=10"])
        curves.append([line["lm_loss"] for line in curve(tmp_path / label)])
        checkpoints.append(tmp_path / label / "checkpoints")
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)
    assert curves[0][-1] < curves[0][0]
    found = find_checkpoint(checkpoints[1])
    assert found is not None
    reader = CheckpointReader(found)
    frozen = {
        key for key in first if key.endswith(".weight") and model["parametrization"] == "additive" and ".linear_" in key
    }
    assert reader.frozen == frozen
    for key in frozen:
        assert torch.equal(reader.read(key), first[key])
    if model["parametrization"] != "dense":
        assert set(reader.state["ranks"].values()) == {10}
    shutil.rmtree(start)
    processes, tensor, stage = other_layout
    config = _config(tmp_path / "split.yaml", corpus, start, model, deepspeed={"stage": stage})
    run(train_in_workers, processes, str(config), [f"parallel.tensor={tensor}"])
    assert len(curve(tmp_path / "split")) == 12


def _lose_a_tensor(start: Path) -> None:
    tensors = load_file(start / "model.safetensors")
    tensors["decoder.renamed.weight"] = tensors.pop("decoder.final_layernorm.weight")
    save_file(tensors, start / "model.safetensors")


def _other_tokenizer(start: Path) -> None:
    facts = json.loads((start / "espalier.json").read_text())
    facts["tokenizer"]["fingerprint"] = "0" * 64
    (start / "espalier.json").write_text(json.dumps(facts))


@pytest.mark.parametrize(
    ("damage", "sections", "error", "words"),
    [
        (lambda start: None, {}, None, ""),
        (lambda start: None, {"model": {"trained": "factors"}}, None, ""),
        (
            lambda start: None,
            {"model": {"layers": 3}},
            ConfigError,
            r"model\.layers is 2 there and 3 here; use its sett",
        ),
        (lambda start: None, {"model": {"parametrization": "factored"}}, ConfigError, "is additive there and factored"),
        (lambda start: None, {"rank": {"initial": 6}}, ConfigError, r"have rank 4: set rank\.initial=4"),
        (_other_tokenizer, {}, ConfigError, r"set data\.tokenizer=.*start/tokenizer\.model"),
        (
            _lose_a_tensor,
            {},
            CheckpointError,
            r"holds decoder\.final_layernorm\.weight as None, and its settings ask for",
        ),
        (shutil.rmtree, {}, CheckpointError, "is no consolidated model"),
    ],
)
def test_folders_that_do_not_fit(
    damage: Callable[[Path], object],
    sections: dict[str, dict[str, Any]],
    error: type[Exception] | None,
    words: str,
    corpus: Path,
    tmp_path: Path,
) -> None:
    model, start = MODELS["llama additive"], tmp_path / "start"
    _make_start(start, corpus, model)
    damage(start)
    rank = {"policy": "fixed", "initial": RANK, "schedule": [], **sections.get("rank", {})}
    path = _config(tmp_path / "run.yaml", corpus, start, model | sections.get("model", {}), rank=rank)
    config = load_config(str(path))
    tokenizer = open_tokenizer(corpus / "tokenizer.model")
    if error is None:
        check_start(config.with_vocabulary(tokenizer.vocabulary), tokenizer)
        return
    with pytest.raises(error, match=words):
        check_start(config.with_vocabulary(tokenizer.vocabulary), tokenizer)


def test_refused_run_leaves_nothing(corpus: Path, tmp_path: Path) -> None:
    config = _config(tmp_path / "run.yaml", corpus, tmp_path / "nowhere", MODELS["gpt2 dense"])
    with pytest.raises(CheckpointError, match="nowhere is no consolidated model"):
        run(train_in_workers, 2, str(config), [])
    assert not (tmp_path / "run").exists()
