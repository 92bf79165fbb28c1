"""Samples are the corpus's own tokens, in an order that depends on nothing but the seed and the length of the run."""

import os
import pickle
import shutil
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from model.config import ModelConfig
from pretrain.config.data import DataConfig
from pretrain.data.corpus import Corpus, batch_at, micro_batch_start, open_corpus
from pretrain.data.index_cache import INDEX_FOLDER
from pretrain.data.index_check import files_of
from pretrain.errors import DataError
from tests.support.distributed import run
from tests.support.small_corpus import SmallCorpus, small_corpus, small_tokenizer

MODEL = ModelConfig(sequence_length=64, vocabulary=600)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> SmallCorpus:
    return small_corpus(tmp_path_factory.mktemp("corpus"))


def opened(data: DataConfig, cache: Path, **settings: Any) -> Corpus:
    defaults: dict[str, Any] = {"training_samples": 100, "validation_samples": 10, "seed": 1, "model": MODEL}
    return open_corpus(data, cache=cache, **(defaults | settings))


def stream_of(files: SmallCorpus, documents: slice) -> list[list[int]]:
    end = files.tokenizer.end_of_document
    return [[*files.tokenizer.encode(text), end] for text in files.texts[documents]]


def test_one_epoch_holds_every_training_token_once(files: SmallCorpus, tmp_path: Path) -> None:
    """The samples, put in order, are the shuffled documents one behind the other."""
    training = stream_of(files, slice(0, round(0.8 * len(files.texts))))
    total = sum(map(len, training))
    samples = (total - 1) // MODEL.sequence_length
    corpus = opened(files.data, tmp_path, training_samples=samples)
    assert len(corpus.train) == samples
    order = corpus.train.document_index
    assert sorted(order) == list(range(len(training)))
    stream = np.concatenate([training[document] for document in order])
    place = np.argsort(corpus.train.shuffle_index)
    batch = batch_at(corpus.train, 0, samples)
    tokens, labels = batch["tokens"].numpy()[place], batch["labels"].numpy()[place]
    used = samples * MODEL.sequence_length
    np.testing.assert_array_equal(tokens.reshape(-1), stream[:used])
    np.testing.assert_array_equal(labels.reshape(-1), stream[1 : used + 1])


def test_batch(files: SmallCorpus, tmp_path: Path) -> None:
    corpus = opened(files.data, tmp_path)
    batch = batch_at(corpus.train, 3, 5)
    assert {key: tuple(values.shape) for key, values in batch.items()} == dict.fromkeys(
        ("tokens", "labels", "loss_mask", "position_ids"), (5, 64)
    )
    assert batch["tokens"].dtype == batch["labels"].dtype == batch["position_ids"].dtype == torch.int64
    assert batch["loss_mask"].dtype == torch.float32
    assert bool((batch["loss_mask"] == 1).all())  # the end-of-document token and token 0 count as any other
    assert torch.equal(batch["tokens"][:, 1:], batch["labels"][:, :-1])
    assert torch.equal(batch["position_ids"], torch.arange(64).expand(5, 64))
    assert torch.equal(batch["tokens"][2], corpus.train[5]["tokens"])


def test_order_of_samples_does_not_depend_on_the_layout(files: SmallCorpus, tmp_path: Path) -> None:
    """All processes together see the same samples in a step, whether there are 1, 2 or 4; also after a batch ramp."""
    corpus = opened(files.data, tmp_path)
    for consumed, global_batch in ((0, 16), (16, 32)):
        seen = []
        for processes, micro_batch in ((1, 4), (1, 16), (2, 4), (4, 2), (4, 4)):
            starts = [
                micro_batch_start(consumed, micro_step, micro_batch, index, processes)
                for micro_step in range(global_batch // (micro_batch * processes))
                for index in range(processes)
            ]
            seen.append(torch.cat([batch_at(corpus.train, start, micro_batch)["tokens"] for start in starts]))
        assert all(torch.equal(tokens, seen[0]) for tokens in seen)
        assert len(seen[0]) == global_batch


def test_seed_decides_the_order(files: SmallCorpus, tmp_path: Path) -> None:
    first, again, other = (
        batch_at(opened(files.data, tmp_path / str(n), seed=seed).train, 0, 20)["tokens"]
        for n, seed in enumerate((1, 1, 2))
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_validation_comes_from_its_own_documents(files: SmallCorpus, tmp_path: Path) -> None:
    corpus = opened(files.data, tmp_path)
    first = round(0.8 * len(files.texts))
    held_out, held_out_again = corpus.validation[""], opened(files.data, tmp_path).validation[""]
    assert set(corpus.train.indices.tolist()) == set(range(first))
    assert set(held_out.indices.tolist()) == set(range(first, len(files.texts)))
    assert len(held_out) >= 10
    assert torch.equal(batch_at(held_out, 0, 10)["tokens"], batch_at(held_out_again, 0, 10)["tokens"])


def test_no_validation(files: SmallCorpus, tmp_path: Path) -> None:
    assert opened(files.data, tmp_path, validation_samples=0).validation == {}
    whole = files.data.model_copy(update={"split": "1,0,0"})
    assert opened(whole, tmp_path).validation == {}


def test_several_epochs(files: SmallCorpus, tmp_path: Path) -> None:
    samples = 3 * files.facts.tokens // MODEL.sequence_length
    corpus = opened(files.data, tmp_path, training_samples=samples)
    assert len(corpus.train) >= samples
    assert batch_at(corpus.train, samples - 2, 2)["tokens"].shape == (2, 64)


def test_opened_corpus_tells_what_it_is(files: SmallCorpus, tmp_path: Path) -> None:
    corpus = opened(files.data, tmp_path)
    assert corpus.fingerprint == files.facts.fingerprint
    assert corpus.tokenizer.fingerprint == files.tokenizer.fingerprint


def test_too_small_a_share(files: SmallCorpus, tmp_path: Path) -> None:
    long = MODEL.model_copy(update={"sequence_length": 10**6})
    with pytest.raises(DataError, match=r"training share of data\.split 80,20,0 is \d+ of \d+ documents .* 1000001"):
        opened(files.data, tmp_path, model=long)
    few = files.data.model_copy(update={"split": "99.9,0.1,0"})
    with pytest.raises(DataError, match=r"validation share of data\.split 99\.9,0\.1,0 is 0 of \d+ documents with 0"):
        opened(few, tmp_path)


def test_vocabulary_and_tokenizer_must_fit(files: SmallCorpus, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has 600 tokens, and model\.vocabulary is 599"):
        opened(files.data, tmp_path, model=MODEL.model_copy(update={"vocabulary": 599}))
    other = small_tokenizer(tmp_path / "other.model", 610)
    data = files.data.model_copy(update={"tokenizer": str(other.path)})
    with pytest.raises(DataError, match=r"600 tokens .* data\.tokenizer has 610"):
        opened(data, tmp_path, model=MODEL.model_copy(update={"vocabulary": 0}))


class _Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, int]]:
        return os.mkdir, (str(self.path), 0o700)


def test_nothing_in_the_cache_is_trusted(files: SmallCorpus, tmp_path: Path) -> None:
    """megatron-core would unpickle files that are found in the cache."""
    expected = batch_at(opened(files.data, tmp_path).train, 0, 4)["tokens"]
    folder = tmp_path / INDEX_FOLDER
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    planted = list(folder.glob("*.npy"))
    assert len(planted) == 6
    for path in planted:
        path.write_bytes(pickle.dumps(_Canary(tmp_path / "canary")))
    assert torch.equal(batch_at(opened(files.data, tmp_path).train, 0, 4)["tokens"], expected)
    assert not (tmp_path / "canary").exists()


def test_a_link_in_place_of_the_cache_is_replaced(files: SmallCorpus, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "kept").touch()
    (tmp_path / INDEX_FOLDER).symlink_to(elsewhere)
    opened(files.data, tmp_path)
    assert not (tmp_path / INDEX_FOLDER).is_symlink()
    assert [path.name for path in elsewhere.iterdir()] == ["kept"]


def test_cache_that_cannot_be_made(files: SmallCorpus, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"data\.cache"):
        opened(files.data, tmp_path / "file")


@pytest.mark.parametrize("split", ["", "98", "98,2", "98;2;0", "98,2,0,0", "-1,2,0", "0,100,0", "nan,1,1", "inf,1,1"])
def test_bad_split(split: str) -> None:
    with pytest.raises(ValidationError, match=r"data\.split is .* such as 98,2,0"):
        DataConfig(prefix="p", tokenizer="t", split=split)


def _tokens_in_process(data: DataConfig, cache: Path) -> tuple[int, list[int]]:
    corpus = opened(data, cache)
    return len(corpus.train), batch_at(corpus.train, 0, 8)["tokens"].flatten().tolist()


def test_several_processes(files: SmallCorpus, tmp_path: Path) -> None:
    """Several processes open the corpus, also if an older run's files are in the cache."""
    opened(files.data, tmp_path, seed=5)
    alone = _tokens_in_process(files.data, tmp_path / "alone")
    assert run(_tokens_in_process, 2, files.data, tmp_path) == [alone, alone]


def _message_in_process(data: DataConfig, cache: Path) -> tuple[str, bool]:
    with pytest.raises(DataError) as raised:
        opened(data, cache)
    return str(raised.value), raised.value.agreed


def test_a_fault_is_raised_by_all_processes(files: SmallCorpus, tmp_path: Path) -> None:
    for source, target in zip(files_of(files.prefix), files_of(tmp_path / "corpus"), strict=True):
        shutil.copyfile(source, target)
    with files_of(tmp_path / "corpus")[0].open("ab") as file:
        file.write(b"\0")
    damaged = files.data.model_copy(update={"prefix": str(tmp_path / "corpus")})
    for data in (damaged, files.data.model_copy(update={"tokenizer": "none"})):
        (first, first_agreed), (second, second_agreed) = run(_message_in_process, 2, data, tmp_path)
        assert first == second
        assert first_agreed
        assert second_agreed
