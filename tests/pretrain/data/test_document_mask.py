"""Attention stays inside documents: the model computes the same as for every document alone, on every layout, with
recomputation and for both objectives. A run of blended corpora with held-out sets resumes as if it had not stopped."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model.config import Recompute, factored_projections
from model.gpt import build_model
from model.process_groups import initialize_process_groups
from pretrain.data.document_mask import outside_mask, positions_within
from pretrain.disk import JsonLines
from tests.support.distributed import run
from tests.support.parallel_model import load_logical, positions_of, small_config, some_tokens
from tests.support.reference import random_tensors
from tests.support.training_runs import curve, make_corpus, train_in_workers, write_config
from tools.preprocess_corpus import preprocess

END = 299


def losses_and_gradient(family: str, tensor: int, recompute: Recompute, *, apart: bool) -> tuple[Tensor, Tensor]:
    """Token losses of one sample of three documents, together or each alone, and the gradient of the embedding."""
    initialize_process_groups(tensor)
    config = small_config(family)

    ranks = {projection.name: 4 for projection in factored_projections(config)}
    model = build_model(config, ranks, seed=1, recompute=recompute)
    load_logical(model, random_tensors(config, ranks, seed=3))
    tokens, labels = some_tokens(config, sequences=1)
    tokens[0, [5, 11]] = END
    if apart:
        cuts = [slice(0, 5), slice(5, 11), slice(11, 16)]
        losses = torch.cat(
            [model(tokens[:, cut], positions_of(tokens[:, cut]), None, labels=labels[:, cut]) for cut in cuts], dim=1
        )
    else:
        positions = positions_within(tokens, END)
        losses = model(tokens, positions, outside_mask(positions, torch.float32, causal=True), labels=labels)
    losses.mean().backward()
    gradient = model.embedding.word_embeddings.weight.grad
    assert gradient is not None
    return losses.detach(), gradient


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize(("tensor", "recompute"), [(1, "none"), (2, "factors"), (2, "layers")])
def test_documents_are_seen_one_by_one(family: str, tensor: int, recompute: Recompute) -> None:
    together = run(losses_and_gradient, tensor, family, tensor, recompute, apart=False)
    apart = run(losses_and_gradient, tensor, family, tensor, "none", apart=True)
    for (losses, gradient), (expected, expected_gradient) in zip(together, apart, strict=True):
        torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the corpora `corpus`, `other` and `held_out`, all of one tokenizer."""
    folder = tmp_path_factory.mktemp("corpora")
    make_corpus(folder)
    texts = sorted((folder / "text").glob("*.py"))
    preprocess(texts[:4], folder / "other", folder / "tokenizer.model")
    preprocess(texts[4:6], folder / "held_out", folder / "tokenizer.model")
    return folder


@pytest.mark.parametrize("objective", ["causal", pytest.param("mlm", marks=pytest.mark.slow)])
def test_a_blended_run_within_documents_is_the_same_on_every_layout_and_after_a_resume(
    corpora: Path, tmp_path: Path, objective: str
) -> None:
    if objective == "mlm":
        corpora = tmp_path / "masked"
        make_corpus(corpora, mask_token=True)
        texts = sorted((corpora / "text").glob("*.py"))
        preprocess(texts[:4], corpora / "other", corpora / "tokenizer.model")
        preprocess(texts[4:6], corpora / "held_out", corpora / "tokenizer.model")
    data: dict[str, Any] = {
        "prefix": None,
        "blend": {str(corpora / "corpus"): 3.0, str(corpora / "other"): 1.0},
        "validation": {"held-out": str(corpora / "held_out"), "other": str(corpora / "other")},
        "split": None,
        "within_documents": True,
    }
    sections: dict[str, dict[str, Any]] = {
        "data": data,
        "train": {"objective": objective, "validate_every": 6, "validation_sequences": 8},
        "checkpoint": {"every": 6},
        "schedule": {"shape": "constant", "warmup_steps": 0},
    }

    def trained(name: str, processes: int, *overrides: str) -> Path:
        config = write_config(tmp_path / f"{name}.yaml", corpora, tmp_path / name, **sections)
        run(train_in_workers, processes, str(config), list(overrides))
        return tmp_path / name

    whole = trained("whole", 1)
    trained("parted", 2, "parallel.tensor=2", "train.steps=6", "rank.schedule=[{step: 4, rank: 6}]")
    parted = trained("parted", 4, "parallel.tensor=2", "deepspeed.stage=2")
    expected, found = curve(whole), curve(parted)
    assert [line["step"] for line in found] == [line["step"] for line in expected] == list(range(1, 13))
    for mine, other in zip(found, expected, strict=True):
        assert mine["lm_loss"] == pytest.approx(other["lm_loss"], rel=2e-5)
    for folder in (whole, parted):
        validations = [line for line in JsonLines(folder / "events.jsonl").read() if line["event"] == "validation"]
        assert [line["step"] for line in validations] == [6, 12]
        assert list(validations[0]["sets"]) == ["held-out", "other"]
        assert validations[0]["lm_loss"] == validations[0]["sets"]["held-out"]["lm_loss"]
        assert validations[0]["lm_loss"] != validations[0]["sets"]["other"]["lm_loss"]
