"""The text of a run: one corpus or a blend of several, checked and cut into samples, and the held-out sets.

A sample is `sequence_length + 1` consecutive tokens of the shuffled documents, without padding: `tokens` without the
last, `labels` without the first. megatron-core draws the samples (`GPTDataset`); from a blend it draws in proportion to
the weights (`BlendedDataset`). Their order follows from the seed and the length of the run, not from the number of
processes. With `data.within_documents` positions begin anew at every document and attention
stays inside it (`pretrain/data/document_mask.py`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
import xxhash
from torch import Tensor

from model.config import ModelConfig
from model.costs.arithmetic import packs_documents
from model.process_groups import device
from pretrain.config.data import DataConfig
from pretrain.config.run import RunConfig
from pretrain.data.document_mask import NUMBER_TYPES, WithinDocuments, document_bounds, outside_mask
from pretrain.data.index_cache import build_in_order
from pretrain.data.index_check import CorpusFacts, check_index
from pretrain.distributed import together
from pretrain.errors import DataError
from pretrain.tokenizer.base import Tokenizer
from pretrain.tokenizer.load import open_tokenizer

Result = TypeVar("Result")
ONLY_VALIDATION = "0,100,0"
BATCH_KEYS = ("tokens", "labels", "loss_mask", "position_ids")


@dataclass(frozen=True)
class Corpus:
    """An opened corpus: datasets of `len()` samples, each a dictionary of tensors."""

    train: Any
    validation: dict[str, Any]
    """Held-out sets by name; empty if there are none. A run is judged by the first one. A share of the corpus itself
    has the empty name."""
    tokenizer: Tokenizer
    fingerprint: str
    """Checksum of the text that a run trains on, which differs for any other or changed text."""


def open_corpus(
    data: DataConfig,
    model: ModelConfig,
    *,
    training_samples: int,
    validation_samples: int,
    seed: int,
    cache: Path,
    tokenizer: Tokenizer | None = None,
) -> Corpus:
    """Checks and opens the corpora; called by all processes of the default process group. A single corpus can be opened
    without a group.

    `train` has at least `training_samples` samples, over as many epochs as that takes. A held-out set has at least
    `validation_samples` samples, always the same ones. There is no held-out set if `validation_samples` is 0, or if
    `data.split` leaves no documents and `data.validation` names no corpora. The first process writes the order of the
    samples into `cache`; a node that does not see that folder gets a copy in its own. `tokenizer`: that of
    `data.tokenizer`, if it is open already.
    """
    tokenizer = _together(lambda: _fitting_tokenizer(data, model, tokenizer))
    weights = data.weights()
    facts = {prefix: _check_on_every_node(Path(prefix), tokenizer) for prefix in (*weights, *data.validation.values())}
    if data.within_documents:
        for prefix, known in facts.items():
            _refuse_without_ends(prefix, known)
    opener = _Opener(data, model, tokenizer, seed)
    named = data.validation if validation_samples else {}
    sets = [_Set(weights, data.shares, training_samples, validation_samples)]
    sets += [_Set({prefix: 1.0}, ONLY_VALIDATION, 0, validation_samples) for prefix in named.values()]
    for wanted in sets:
        _together(partial(opener.check, wanted))
    numbers = sum(known.documents for known in facts.values()) + sum(wanted.samples for wanted in sets)

    def build(folder: Path, builds_here: Callable[[], bool]) -> list[tuple[Any, Any]]:
        return [opener.open(wanted, folder, builds_here) for wanted in sets]

    (train, held_out), *others = build_in_order(cache.absolute(), 16 * numbers + 2**20, build)
    validation = {} if held_out is None else {"": held_out}
    validation |= {name: samples for name, (_, samples) in zip(named, others, strict=True)}
    return Corpus(train, validation, tokenizer, _fingerprint(weights, facts))


@dataclass(frozen=True)
class _Set:
    """Weights of corpora by prefix, and the samples that are wanted of them."""

    weights: dict[str, float]
    split: str
    training_samples: int
    validation_samples: int

    @property
    def samples(self) -> int:
        return self.training_samples + self.validation_samples


@dataclass(frozen=True)
class _Opener:
    """Opens megatron-core's datasets of one run."""

    data: DataConfig
    model: ModelConfig
    tokenizer: Tokenizer
    seed: int

    def check(self, wanted: _Set) -> None:
        """DataError if the documents of a share do not fill a single sample."""
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        for prefix in wanted.weights:
            index = IndexedDataset(prefix)
            lengths = index.sequence_lengths  # memory that is unmapped when `index` is freed
            for name, share in zip(("training", "validation"), self._config(wanted, None).split_matrix, strict=False):
                if share is None:
                    continue
                # Rounded as megatron-core does.
                first, last = (round(bound * float(len(lengths))) for bound in share)
                tokens = int(lengths[first:last].sum(dtype=np.int64))
                if tokens <= self.model.sequence_length:
                    raise DataError(
                        f"the {name} share of data.split {wanted.split} is {last - first} of {len(lengths)} documents "
                        f"with {tokens} tokens of {prefix}, and one sample takes {self.model.sequence_length + 1}: use "
                        "a larger corpus, another data.split or a shorter model.sequence_length"
                    )

    def open(self, wanted: _Set, folder: Path, builds_here: Callable[[], bool]) -> tuple[Any, Any]:
        """The training and the validation share; None if the split or the number of samples leaves none, or if this
        process builds none."""
        from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
        from megatron.core.datasets.gpt_dataset import GPTDataset

        sizes = [wanted.training_samples, wanted.validation_samples, 0]
        train, validation, _ = BlendedMegatronDatasetBuilder(
            GPTDataset, sizes, builds_here, self._config(wanted, folder)
        ).build()
        return self._as_wanted(train), self._as_wanted(validation)

    def _config(self, wanted: _Set, folder: Path | None) -> Any:
        # megatron-core takes seconds to import, which reading a config should not.
        from megatron.core.datasets.gpt_dataset import GPTDatasetConfig

        weights = wanted.weights
        config = GPTDatasetConfig(
            random_seed=self.seed,
            sequence_length=self.model.sequence_length,
            blend=(list(weights), list(weights.values()) if len(weights) > 1 else None),
            split=wanted.split,
            path_to_cache=None if folder is None else str(folder),
            tokenizer=self.tokenizer,
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        # The test documents belong to evaluation alone.
        for place, samples in enumerate((wanted.training_samples, wanted.validation_samples, 0)):
            if samples == 0:
                config.split_matrix[place] = None
        return config

    def _as_wanted(self, samples: Any) -> Any:
        if samples is None or not self.data.within_documents:
            return samples
        return WithinDocuments(samples, self.tokenizer.end_of_document)


def batch_at(dataset: Any, first_sample: int, micro_batch: int) -> dict[str, Tensor]:
    """The `micro_batch` samples from `first_sample` on: tokens, labels, loss_mask (fp32) and position_ids, each
    (micro_batch, sequence_length), and within documents document_bounds (documents + 1,)."""
    samples = [dataset[index] for index in range(first_sample, first_sample + micro_batch)]
    batch = {key: torch.stack([sample[key] for sample in samples]) for key in BATCH_KEYS}
    if "document_starts" in samples[0]:
        batch["document_bounds"] = document_bounds(torch.stack([sample["document_starts"] for sample in samples]))
    return batch


def model_inputs(config: RunConfig, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Tokens, positions and mask of a batch, as the model's forward takes them, on its device. Where a GPU needs no
    mask, it gets the bounds of documents instead."""
    tokens, positions = batch["tokens"].to(device()), batch["position_ids"].to(device())
    if not config.data.within_documents:
        return tokens, positions, None
    kind = NUMBER_TYPES[config.train.precision]
    if device().type == "cuda" and packs_documents(config.model, kind.itemsize):
        return tokens, positions, batch["document_bounds"].to(device())
    return tokens, positions, outside_mask(positions, kind, causal=not config.model.bidirectional)


def micro_batch_start(consumed_samples: int, micro_step: int, micro_batch: int, data_index: int, data_size: int) -> int:
    """First sample of one process's micro-batch. All processes together take the samples in order, so the samples of a
    step do not depend on the number of processes."""
    return consumed_samples + micro_step * micro_batch * data_size + data_index * micro_batch


def _fitting_tokenizer(data: DataConfig, model: ModelConfig, tokenizer: Tokenizer | None) -> Tokenizer:
    tokenizer = tokenizer or open_tokenizer(data.tokenizer)
    if 0 < model.vocabulary < tokenizer.vocabulary:
        raise DataError(
            f"{data.tokenizer} has {tokenizer.vocabulary} tokens, and model.vocabulary is {model.vocabulary}: "
            "leave model.vocabulary out or change data.tokenizer"
        )
    return tokenizer


def _check_on_every_node(prefix: Path, tokenizer: Tokenizer) -> CorpusFacts:
    """The corpus's facts, checked by one process of every node, since each node may see other files."""
    checked = _together(
        lambda: check_index(prefix, tokenizer.vocabulary, tokenizer.fingerprint) if _is_first_of_node() else None
    )
    if not dist.is_initialized():
        assert checked is not None
        return checked
    gathered: list[CorpusFacts | None] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, checked)
    found = [facts for facts in gathered if facts is not None]
    fingerprints = sorted({facts.fingerprint for facts in found})
    if len(fingerprints) > 1:
        error = DataError(
            f"the nodes see {len(fingerprints)} different corpora under data.prefix {prefix} (fingerprints "
            f"{', '.join(fingerprints)}): copy one to all nodes, or use a shared folder"
        )
        error.agreed = True
        raise error
    return found[0]


def _refuse_without_ends(prefix: str, facts: CorpusFacts) -> None:
    if not facts.end_of_document:
        raise DataError(
            f"data.within_documents is true, and the corpus {prefix} has no ends of documents: write it anew with "
            "tools/preprocess_corpus.py --append-eod, or leave data.within_documents out"
        )


def _fingerprint(weights: dict[str, float], facts: dict[str, CorpusFacts]) -> str:
    """Checksum of a blend: of its corpora (not their paths), their weights and their order."""
    if len(weights) == 1:
        return facts[next(iter(weights))].fingerprint
    whole = sum(weights.values())
    text = " ".join(f"{facts[prefix].fingerprint}:{weight / whole!r}" for prefix, weight in weights.items())
    return xxhash.xxh3_128(text.encode()).hexdigest()


def _is_first_of_node() -> bool:
    return not dist.is_initialized() or dist.get_node_local_rank(fallback_rank=0) == 0


def _together(action: Callable[[], Result]) -> Result:
    """Runs `action`. With a process group, an error on one process is raised on all."""
    if not dist.is_initialized():
        return action()
    return together(action)
