"""The masked objective: what it hides, and whole runs with it, against plain PyTorch and across layouts."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from model.config import ModelConfig
from pretrain.checkpoint.format import KEYS
from pretrain.checkpoint.reader import CheckpointReader
from pretrain.config.run import dump_config, load_config, parse_config
from pretrain.convert.consolidated import ConsolidatedModel
from pretrain.data.corpus import batch_at, micro_batch_start, open_corpus
from pretrain.data.masked_lm import MaskedSamples, corpus_for, mask_token
from pretrain.errors import CheckpointError, ConfigError, DataError
from pretrain.tokenizer.base import Tokenizer
from pretrain.tokenizer.load import open_tokenizer
from tests.support.distributed import run
from tests.support.reference import reference_logits
from tests.support.training_runs import curve, make_corpus, train_in_workers, write_config
from tools import consolidate_checkpoint, densify_checkpoint, generate, inspect_checkpoint

LENGTH = 32
MASKED = round(0.15 * LENGTH)
MLM: dict[str, dict[str, Any]] = {
    "model": {"hidden_dropout": 0.1, "attention_dropout": 0.1},
    "train": {"objective": "mlm", "validate_every": 6, "validation_sequences": 24},
    "checkpoint": {"every": 3},
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    make_corpus(folder, mask_token=True)
    return folder


@pytest.fixture(scope="module")
def tokenizer(corpus: Path) -> Tokenizer:
    return open_tokenizer(corpus / "tokenizer.model")


@pytest.fixture(scope="module")
def samples(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Training or validation samples of a masked run, by probability and seed."""
    path = tmp_path_factory.mktemp("samples")
    config = load_config(str(write_config(path / "run.yaml", corpus, path / "run", **MLM)))
    model = config.model.model_copy(update={"sequence_length": LENGTH})
    opened = open_corpus(config.data, model, training_samples=2000, validation_samples=24, seed=1, cache=path / "cache")

    def of(name: str = "train", probability: float = 0.15, seed: int = 1) -> Any:
        train = config.train.model_copy(update={"mask_probability": probability})
        return getattr(corpus_for(train, opened, seed), name)

    return of


# What is hidden -------------------------------------------------------------------------------------------------------


def test_proportions_are_those_of_the_paper(samples: Callable[..., Any], tokenizer: Tokenizer) -> None:
    """15 % of the tokens are chosen, the same number in every sample; of them 80 % are hidden, 10 % random, 10 %
    kept."""
    batch = batch_at(samples(), 0, 2000)
    tokens, labels, chosen = batch["tokens"], batch["labels"], batch["loss_mask"].bool()
    assert (chosen.sum(dim=1) == MASKED).all()
    assert torch.equal(tokens[~chosen], labels[~chosen])
    found, wanted = tokens[chosen], labels[chosen]
    hidden, same = found.eq(mask_token(tokenizer)), found.eq(wanted)
    total = len(found)
    assert hidden.sum() == pytest.approx(0.8 * total, abs=4 * (0.16 * total) ** 0.5)
    assert same.sum() == pytest.approx(0.1 * total, abs=4 * (0.09 * total) ** 0.5)
    random_tokens = found[~hidden & ~same]
    assert tokenizer.ordinary_tokens()[random_tokens].all()
    assert len(random_tokens.unique()) > 200  # drawn from all of the vocabulary
    places = chosen.sum(dim=0)
    assert places.double().std() < 3 * (2000 * 0.15 * 0.85) ** 0.5  # every place as often as any other
    assert (samples(probability=0.5)[3]["loss_mask"].sum(), samples(probability=0.001)[3]["loss_mask"].sum()) == (16, 1)


def test_labels_are_the_samples_own_tokens(samples: Callable[..., Any]) -> None:
    masked = samples()
    for index in range(50):
        sample, original = masked[index], masked._samples[index]
        assert torch.equal(sample["labels"], original["tokens"])
        assert torch.equal(sample["position_ids"], original["position_ids"])
        assert sample["tokens"].dtype == sample["labels"].dtype == torch.int64
        assert sample["loss_mask"].dtype == torch.float32


def test_choice_depends_on_seed_and_place_alone(samples: Callable[..., Any]) -> None:
    """It does not depend on the samples read before, or on the layout; other samples and other seeds hide other
    places."""
    masked, again = samples(), samples()
    expected = batch_at(masked, 0, 32)["tokens"]
    for processes, micro_batch in ((2, 4), (4, 2), (1, 16)):
        starts = [
            micro_batch_start(0, micro_step, micro_batch, index, processes)
            for micro_step in reversed(range(32 // (micro_batch * processes)))
            for index in range(processes)
        ]
        pieces = {start: batch_at(again, start, micro_batch)["tokens"] for start in starts}
        assert torch.equal(torch.cat([pieces[start] for start in sorted(pieces)]), expected)
    assert not torch.equal(batch_at(samples(seed=2), 0, 32)["tokens"], expected)
    chosen = batch_at(masked, 0, 32)["loss_mask"]
    assert len({tuple(row.tolist()) for row in chosen}) == 32
    assert not torch.equal(batch_at(samples("validation")[""], 0, 24)["loss_mask"], chosen[:24])


def test_another_epoch_hides_other_tokens(samples: Callable[..., Any]) -> None:
    """The same text comes back at another place in the order of samples."""
    masked = samples()
    text: dict[tuple[int, ...], list[int]] = {}
    for index in range(len(masked)):
        text.setdefault(tuple(masked[index]["labels"].tolist()), []).append(index)
    repeated = [places for places in text.values() if len(places) > 1]
    assert repeated
    assert any(not torch.equal(masked[a]["loss_mask"], masked[b]["loss_mask"]) for a, b, *_ in repeated)


def test_ends_of_documents_are_chosen_last(tokenizer: Tokenizer) -> None:
    end = tokenizer.end_of_document
    assert not tokenizer.ordinary_tokens()[[end, mask_token(tokenizer)]].any()
    ordinary = int(np.flatnonzero(tokenizer.ordinary_tokens())[100])
    texts = torch.full((200, LENGTH), end)
    texts[:100, ::4] = ordinary  # 8 of 32: more than are chosen
    texts[100:, 0] = ordinary
    masked = MaskedSamples([{"tokens": text} for text in texts], tokenizer, 0.15, "test")
    batch = [masked[index] for index in range(200)]
    assert all(int(sample["loss_mask"].sum()) == MASKED for sample in batch)
    assert all(sample["labels"][sample["loss_mask"].bool()].eq(ordinary).all() for sample in batch[:100])
    assert all(sample["loss_mask"][0] == 1 for sample in batch[100:])


# Settings -------------------------------------------------------------------------------------------------------------


def _settings(**sections: dict[str, Any]) -> dict[str, Any]:
    return {"data": {"prefix": "p", "tokenizer": "t"}, **sections}


def test_objective_decides_the_attention(tmp_path: Path) -> None:
    config = parse_config(_settings(train={"objective": "mlm"}))
    assert config.model.bidirectional
    assert config.with_vocabulary(300).model.bidirectional
    (tmp_path / "resolved.yaml").write_text(dump_config(config))
    assert load_config(str(tmp_path / "resolved.yaml")) == config
    assert not parse_config(_settings()).model.bidirectional
    with pytest.raises(ConfigError, match=r"model\.bidirectional is true.* set train\.objective=mlm"):
        parse_config(_settings(model={"bidirectional": True}))
    with pytest.raises(ConfigError, match=r"mask_probability is 0\.2.* set train\.objective=mlm"):
        parse_config(_settings(train={"mask_probability": 0.2}))
    with pytest.raises(ConfigError, match=r"train\.mask_probability"):
        parse_config(_settings(train={"objective": "mlm", "mask_probability": 1.0}))


def test_a_tokenizer_without_mask_token_is_one_sentence(tmp_path: Path) -> None:
    make_corpus(tmp_path / "corpus")
    config = write_config(tmp_path / "run.yaml", tmp_path / "corpus", tmp_path / "run", **MLM)
    with pytest.raises(DataError, match=r"tokenizer\.model has no mask token: .*train_tokenizer\.py --mask-token") as e:
        run(train_in_workers, 2, str(config), [])
    assert "\n" not in str(e.value)
    assert not (tmp_path / "run").exists()


# Runs -----------------------------------------------------------------------------------------------------------------


def _train(corpus: Path, folder: Path, processes: int, *overrides: str, **sections: dict[str, Any]) -> Path:
    merged = {name: {**MLM.get(name, {}), **sections.get(name, {})} for name in {*MLM, *sections}}
    config = write_config(folder.with_suffix(".yaml"), corpus, folder, **merged)
    run(train_in_workers, processes, str(config), list(overrides))
    return folder


def _events(folder: Path, kind: str) -> list[dict[str, Any]]:
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [{k: v for k, v in event.items() if k != "time"} for event in events if event["event"] == kind]


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run of twelve masked steps on two tensor-parallel processes; ranks grow after steps 4 and 8."""
    return _train(corpus, tmp_path_factory.mktemp("trained") / "run", 2, "parallel.tensor=2")


def test_a_masked_run_learns_grows_and_shows_its_accuracy(trained: Path) -> None:
    lines = curve(trained)
    losses = [line["lm_loss"] for line in lines]
    assert sum(losses[-3:]) / 3 < sum(losses[:3]) / 3 - 0.1
    assert [line["mean_rank"] for line in lines] == [4.0] * 4 + [6.0] * 4 + [10.0] * 4
    validations = _events(trained, "validation")
    assert [event["step"] for event in validations] == [6, 12]
    assert all(event.keys() == {"step", "event", "lm_loss", "ppl", "accuracy"} for event in validations)
    summary = json.loads((trained / "summary.json").read_text())
    assert (summary["objective"], summary["accuracy"]) == ("mlm", validations[-1]["accuracy"])


def test_a_resumed_masked_run_is_the_same_to_the_bit(corpus: Path, trained: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    shutil.copytree(trained, again)
    for step in (9, 12):
        shutil.rmtree(again / "checkpoints" / f"step_{step:09d}")
    _train(corpus, again, 2, "parallel.tensor=2")
    assert curve(again) == curve(trained)
    assert _events(again, "validation")[-1] == _events(trained, "validation")[-1]
    final = [CheckpointReader(folder / "checkpoints" / "step_000000012") for folder in (trained, again)]
    for name in final[0].layouts:
        for key in KEYS:
            assert torch.equal(final[0].read(name, key), final[1].read(name, key)), f"{key} of {name}"


NO_DROPOUT = {"hidden_dropout": 0.0, "attention_dropout": 0.0}  # dropout masks depend on the layout
DENSE = {"policy": "fixed", "schedule": []}
VARIANTS = [
    ("llama", "factored"),
    pytest.param(("gpt2", "factored"), marks=pytest.mark.matrix),
    pytest.param(("gpt2", "additive"), marks=pytest.mark.matrix),
    pytest.param(("llama", "dense"), marks=pytest.mark.matrix),
]
LAYOUTS = [(2, 1, 2, 2), (2, 2, 4, 1), pytest.param((4, 4, 8, 2), marks=pytest.mark.matrix)]
"""Layouts: processes, tensor-parallel size, micro-batch, ZeRO stage."""


def _in_layout(corpus: Path, folder: Path, variant: tuple[str, str], layout: tuple[int, int, int, int]) -> Path:
    (family, parametrization), (processes, tensor, micro_batch, stage) = variant, layout
    sections: dict[str, dict[str, Any]] = {"model": {"family": family, "parametrization": parametrization}}
    sections["model"] |= NO_DROPOUT
    if parametrization == "dense":
        sections["rank"] = DENSE
    overrides = [f"parallel.tensor={tensor}", f"train.micro_batch={micro_batch}", f"deepspeed.stage={stage}"]
    return _train(corpus, folder, processes, *overrides, **sections)


@pytest.fixture(scope="module")
def alone(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Folders of the runs of one process without accumulation, by variant."""
    folder = tmp_path_factory.mktemp("alone")

    def of(*variant: str) -> Path:
        run_folder = folder / "_".join(variant)
        if not run_folder.exists():
            _in_layout(corpus, run_folder, variant, (1, 1, 8, 1))  # type: ignore[arg-type]
        return run_folder

    return of


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("variant", VARIANTS, ids="-".join)
def test_every_layout_gives_the_same_masked_curve(
    corpus: Path,
    tmp_path: Path,
    alone: Callable[..., Path],
    variant: tuple[str, str],
    layout: tuple[int, int, int, int],
) -> None:
    """Losses and gradient norms of every step and the validations are the same."""
    found, expected = _in_layout(corpus, tmp_path / "run", variant, layout), alone(*variant)
    for mine, other in zip(curve(found), curve(expected), strict=True):
        assert mine["lm_loss"] == pytest.approx(other["lm_loss"], rel=1e-5)
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)
    for mine, other in zip(_events(found, "validation"), _events(expected, "validation"), strict=True):
        assert mine["lm_loss"] == pytest.approx(other["lm_loss"], rel=1e-5)
        assert mine["accuracy"] == pytest.approx(other["accuracy"], abs=0.5 / (24 * MASKED))  # the same count


@pytest.mark.parametrize("variant", VARIANTS, ids="-".join)
def test_validation_is_what_plain_pytorch_computes(
    tmp_path: Path, alone: Callable[..., Path], trained: Path, variant: tuple[str, str]
) -> None:
    """Loss and accuracy of a checkpoint are right on one process and on two tensor-parallel ones."""
    folders = [alone(*variant)] + ([trained] if variant == ("llama", "factored") else [])
    for folder in folders:
        loss, accuracy = _plain_validation(folder, tmp_path)
        validation = _events(folder, "validation")[-1]
        assert validation["lm_loss"] == pytest.approx(loss, rel=1e-5)
        assert validation["accuracy"] == pytest.approx(accuracy, abs=1e-9)
        assert 0.0 < accuracy < 1.0


def _plain_validation(folder: Path, scratch: Path) -> tuple[float, float]:
    """Loss and accuracy of a run's last checkpoint, without any of the training code but the samples."""
    reader = CheckpointReader(folder / "checkpoints" / "step_000000012")
    config = load_config(str(folder / "config.yaml"))
    model = ModelConfig.model_validate(reader.state["model"])
    assert model.bidirectional
    opened = open_corpus(
        config.data, model, training_samples=96, validation_samples=24, seed=config.run.seed, cache=scratch
    )
    batch = batch_at(corpus_for(config.train, opened, config.run.seed).validation[""], 0, 24)
    tensors = {name: reader.read(name, "master") for name in reader.layouts}
    logits = reference_logits(model, reader.state["ranks"], tensors, batch["tokens"])
    chosen = batch["loss_mask"].bool()
    loss = torch.nn.functional.cross_entropy(logits[chosen], batch["labels"][chosen])
    return float(loss), float((logits.argmax(-1) == batch["labels"])[chosen].double().mean())


# Tools ----------------------------------------------------------------------------------------------------------------


def test_tools_know_masked_models(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tools consolidate and inspect masked models; densify and generate refuse them and leave nothing behind."""

    def call(tool: ModuleType, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [tool.__name__, *map(str, arguments)])
        tool.main()
        return capsys.readouterr().out

    merged = tmp_path / "merged"
    assert "densify" not in call(consolidate_checkpoint, "--checkpoint", trained, "--output", merged)
    assert ConsolidatedModel(merged).config.bidirectional
    for folder in (trained, merged):
        assert "llama factored, bidirectional, 2 layers" in call(inspect_checkpoint, "--checkpoint", folder)
    for tool, arguments in (
        (densify_checkpoint, ("--input", merged, "--output", tmp_path / "dense")),
        (generate, ("--model", merged, "--prompt", "def")),
    ):
        with pytest.raises(CheckpointError, match=r"was trained with train\.objective=mlm") as refusal:
            call(tool, *arguments)
        assert "\n" not in str(refusal.value)
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]
