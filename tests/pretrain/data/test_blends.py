"""Blends of corpora, held-out corpora by name, documents inside samples, and nodes that see different folders."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pydantic import ValidationError

from model.config import ModelConfig
from pretrain.config.data import DataConfig
from pretrain.data.corpus import Corpus, batch_at, open_corpus
from pretrain.data.document_mask import outside_mask, positions_within
from pretrain.errors import DataError
from tests.support.distributed import run
from tests.support.small_corpus import SmallCorpus, small_corpus
from tools.corpus.documents import find_files
from tools.preprocess_corpus import preprocess

MODEL = ModelConfig(sequence_length=64, vocabulary=600)
SAMPLES = 300


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> SmallCorpus:
    return small_corpus(tmp_path_factory.mktemp("corpora"))


@pytest.fixture(scope="module")
def other(files: SmallCorpus) -> str:
    """A second corpus of the same tokenizer, in which every token is a digit or an end of a document."""
    folder = files.prefix.parent
    digits = folder / "digits.txt"
    digits.write_text("".join(str(number % 7) for number in range(5000)), encoding="utf-8")
    preprocess([digits], folder / "digits", files.tokenizer.path)
    return str(folder / "digits")


def data_of(files: SmallCorpus, **settings: Any) -> DataConfig:
    defaults: dict[str, Any] = {"tokenizer": str(files.tokenizer.path)}
    if "blend" not in settings:
        defaults["prefix"] = str(files.prefix)
    return DataConfig(**(defaults | settings))


def open_in_process(data: DataConfig, cache: Path, training_samples: int = SAMPLES) -> Corpus:
    return open_corpus(
        data,
        MODEL,
        training_samples=training_samples,
        validation_samples=10,
        seed=1,
        cache=cache / str(dist.get_rank()),
    )


def blended_tokens(data: DataConfig, cache: Path, samples: int) -> tuple[torch.Tensor, str]:
    corpus = open_corpus(data, MODEL, training_samples=samples, validation_samples=0, seed=1, cache=cache)
    return batch_at(corpus.train, 0, samples)["tokens"], corpus.fingerprint


@pytest.mark.parametrize("share", [0.25, 3.0])
def test_a_blend_takes_its_shares_of_the_samples(files: SmallCorpus, other: str, tmp_path: Path, share: float) -> None:
    blend = {str(files.prefix): 1.0, other: share}
    data = data_of(files, blend=blend, split="100,0,0")
    (tokens, _), (again, _) = run(blended_tokens, 2, data, tmp_path, SAMPLES)
    assert torch.equal(tokens, again)
    digits = [token for text in "0123456" for token in files.tokenizer.encode(text)]
    allowed = torch.tensor([*digits, files.tokenizer.end_of_document, *files.tokenizer.encode("01234560123456")])
    from_other = int(torch.isin(tokens, allowed).all(dim=1).sum())
    assert from_other == pytest.approx(SAMPLES * share / (1.0 + share), abs=1.0)


def test_weights_and_order_make_the_fingerprint(files: SmallCorpus, other: str, tmp_path: Path) -> None:
    blends = [
        {str(files.prefix): 1.0, other: 1.0},
        {str(files.prefix): 2.0, other: 2.0},
        {str(files.prefix): 1.0, other: 2.0},
    ]
    found = [
        run(blended_tokens, 1, data_of(files, blend=blend, split="100,0,0"), tmp_path, 20)[0][1] for blend in blends
    ]
    assert found[0] == found[1] != found[2]
    assert files.facts.fingerprint not in found


def validation_tokens(data: DataConfig, cache: Path) -> dict[str, torch.Tensor]:
    found = open_in_process(data, cache).validation
    return {name: batch_at(samples, 0, 10)["tokens"] for name, samples in found.items()}


def test_held_out_corpora_come_by_name_and_in_order(files: SmallCorpus, other: str, tmp_path: Path) -> None:
    data = data_of(files, validation={"digits": other, "code": str(files.prefix)})
    (found,) = run(validation_tokens, 1, data, tmp_path)
    assert list(found) == ["digits", "code"]
    assert found["digits"].unique().numel() < 60 < found["code"].unique().numel()
    assert data.shares == "100,0,0"  # nothing is held out twice


def test_nodes_that_do_not_see_the_first_folder_get_a_copy(files: SmallCorpus, other: str, tmp_path: Path) -> None:
    """Each process has a cache folder of its own, as on nodes without a shared file system."""
    data = data_of(files, blend={str(files.prefix): 1.0, other: 1.0}, validation={"digits": other})
    first, second = run(train_tokens, 2, data, tmp_path)
    assert torch.equal(first, second)
    assert (tmp_path / "0" / "sample_indices").is_dir()
    assert [path.name for path in (tmp_path / "1").iterdir()] == ["sample_indices_of_process_1"]
    copied = {path.name: path.read_bytes() for path in (tmp_path / "1" / "sample_indices_of_process_1").iterdir()}
    made = {path.name: path.read_bytes() for path in (tmp_path / "0" / "sample_indices").iterdir()}
    assert {name for name in made if name.endswith(".npy")} <= copied.keys()
    assert all(copied[name] == content for name, content in made.items() if name.endswith(".npy"))


def train_tokens(data: DataConfig, cache: Path) -> torch.Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_RANK", "0")  # each process is the first of its node
        return batch_at(open_in_process(data, cache).train, 0, 50)["tokens"]


def test_positions_begin_anew_at_every_document() -> None:
    tokens = torch.tensor([[5, 6, 9, 7, 8, 4, 9, 5], [9, 9, 1, 2, 3, 4, 5, 9]])
    assert positions_within(tokens, 9).tolist() == [[0, 1, 0, 1, 2, 3, 0, 1], [0, 0, 1, 2, 3, 4, 5, 0]]


def test_mask_hides_other_documents_and_the_future() -> None:
    positions = torch.tensor([[0, 1, 0, 1]])
    assert outside_mask(positions, torch.float32, causal=True)[0, 0].exp().int().tolist() == [
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [0, 0, 1, 0],
        [0, 0, 1, 1],
    ]
    assert outside_mask(positions, torch.float32, causal=False)[0, 0].exp().int().tolist() == [
        [1, 1, 0, 0],
        [1, 1, 0, 0],
        [0, 0, 1, 1],
        [0, 0, 1, 1],
    ]


def test_samples_within_documents(files: SmallCorpus, tmp_path: Path) -> None:
    (places,) = run(train_positions, 1, data_of(files, within_documents=True), tmp_path)
    tokens, found, bounds = places
    ends = tokens == files.tokenizer.end_of_document
    assert ends.any()
    assert torch.equal((found == 0)[:, 1:], ends[:, 1:])
    assert bounds.tolist() == [*(found.flatten() == 0).nonzero().flatten().tolist(), found.numel()]


def train_positions(data: DataConfig, cache: Path) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch = batch_at(open_in_process(data, cache).train, 0, SAMPLES)
    return batch["tokens"], batch["position_ids"], batch["document_bounds"]


def test_within_documents_needs_their_ends(files: SmallCorpus, tmp_path: Path) -> None:
    preprocess(find_files(["stdlib"])[::40], tmp_path / "endless", files.tokenizer.path, append_eod=False)
    data = data_of(files, prefix=str(tmp_path / "endless"), within_documents=True)
    with pytest.raises(DataError, match=r"has no ends of documents: write it anew .* --append-eod"):
        open_corpus(data, MODEL, training_samples=5, validation_samples=0, seed=1, cache=tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "neither data.prefix nor data.blend is set"),
        ({"prefix": "a", "blend": {"a": 1, "b": 1}}, "data.prefix and data.blend are set"),
        ({"blend": {"a": 1.0, "b": 0.0}}, "gives b the weight 0.0"),
        ({"blend": {"a": 1.0}}, "at least 2"),
        (
            {"prefix": "a", "validation": {"x": "b"}, "split": "90,10,0"},
            "data.split 90,10,0 holds documents out as well",
        ),
        ({"prefix": "a", "validation": {"x/y": "b"}}, "names a set 'x/y'"),
    ],
)
def test_contradictions(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message.replace(".", r"\.")):
        DataConfig(tokenizer="t", **settings)
