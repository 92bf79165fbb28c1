"""The corpus of a run: checked, split by documents, cut into samples.

A sample is `sequence_length + 1` consecutive tokens of the shuffled documents, one behind the other: `tokens` without
the last, `labels` without the first. megatron-core draws the samples (`GPTDataset`), in an order that follows from the
seed and the length of the run, not from the number of processes. Positions and attention run over ends of documents.
"""

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor

from model.config import ModelConfig
from pretrain.errors import DataError
from pretrain.index_check import CorpusFacts, check_index
from pretrain.tokenizer import Tokenizer

Result = TypeVar("Result")
BATCH_KEYS = ("tokens", "labels", "loss_mask", "position_ids")
INDEX_FOLDER = "sample_indices"


class DataConfig(BaseModel):
    """The text a run learns from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prefix: str = Field(min_length=1, description="corpus written by tools/preprocess_corpus.py, without .bin or .idx")
    tokenizer: str = Field(min_length=1, description="tokenizer model the corpus was written with")
    split: str = Field("98,2,0", description="shares of the documents for training, validation and test")
    cache: str | None = Field(
        None, description="folder for sample indices, one run's alone, made anew at every start; none: in run.folder"
    )

    @field_validator("split")
    @classmethod
    def _split_is_three_shares(cls, split: str) -> str:
        try:
            shares = [float(share) for share in split.split(",")]
        except ValueError:
            shares = []
        if len(shares) != 3 or not all(0.0 <= share < math.inf for share in shares) or not shares[0]:
            raise ValueError(
                f"data.split is {split!r}: set it to three shares such as 98,2,0 (training, validation, test), "
                "none negative, the first above 0"
            )
        return split


@dataclass(frozen=True)
class Corpus:
    """An opened corpus. `train` and `validation` are `GPTDataset`s: `len()` samples, each a dictionary of tensors."""

    train: Any
    validation: Any | None
    tokenizer: Tokenizer
    facts: CorpusFacts

    @property
    def fingerprint(self) -> str:
        """Tells this corpus from any other, and from a changed one."""
        return self.facts.fingerprint


def open_corpus(
    data: DataConfig, model: ModelConfig, *, training_samples: int, validation_samples: int, seed: int, cache: Path
) -> Corpus:
    """Checks and opens the corpus; called by all processes of the default process group, if there is one.

    `train` has at least `training_samples` samples, over as many epochs as that takes. `validation` has at least
    `validation_samples`, always the same ones; it is None when they are 0 or `data.split` leaves it no documents.
    The first process writes the order of the samples into `cache`, a folder that all processes see.
    """
    # megatron-core takes seconds to import, which reading a config should not.
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    prefix = Path(data.prefix)
    tokenizer = _together(lambda: _fitting_tokenizer(data, model))
    facts = _check_on_every_node(prefix, tokenizer)
    indices = cache.absolute() / INDEX_FOLDER
    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=model.sequence_length,
        blend=([str(prefix)], None),
        split=data.split,
        path_to_cache=str(indices),
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    shares = config.split_matrix
    shares[2] = None  # the test documents belong to evaluation alone
    if validation_samples == 0:
        shares[1] = None
    index = IndexedDataset(str(prefix))
    lengths = index.sequence_lengths.copy()  # its memory is unmapped with `index`
    for name, share in zip(("training", "validation"), shares[:2], strict=True):
        if share is not None:
            _together(partial(_check_share, data, model, name, share, lengths))
    _together(lambda: _make_index_folder(indices, 16 * (training_samples + validation_samples + len(lengths)) + 2**20))
    train, validation, _ = BlendedMegatronDatasetBuilder(
        GPTDataset, [training_samples, validation_samples, 0], lambda: True, config
    ).build()
    return Corpus(train, validation, tokenizer, facts)


def batch_at(dataset: Any, first_sample: int, micro_batch: int) -> dict[str, Tensor]:
    """The `micro_batch` samples from `first_sample` on: tokens, labels, loss_mask (fp32) and position_ids, each
    (micro_batch, sequence_length)."""
    samples = [dataset[index] for index in range(first_sample, first_sample + micro_batch)]
    return {key: torch.stack([sample[key] for sample in samples]) for key in BATCH_KEYS}


def micro_batch_start(consumed_samples: int, micro_step: int, micro_batch: int, data_index: int, data_size: int) -> int:
    """First sample of one process's micro-batch. All processes together take the samples in order, so the samples of a
    step do not depend on the number of processes."""
    return consumed_samples + micro_step * micro_batch * data_size + data_index * micro_batch


def _fitting_tokenizer(data: DataConfig, model: ModelConfig) -> Tokenizer:
    tokenizer = Tokenizer(data.tokenizer)
    if model.vocabulary not in (0, tokenizer.vocabulary):
        raise DataError(
            f"{data.tokenizer} has {tokenizer.vocabulary} tokens, and model.vocabulary is {model.vocabulary}: "
            "leave model.vocabulary out or change data.tokenizer"
        )
    return tokenizer


def _check_on_every_node(prefix: Path, tokenizer: Tokenizer) -> CorpusFacts:
    """The corpus's facts, checked by one process of every node, for each node may see files of its own."""
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


def _check_share(
    data: DataConfig, model: ModelConfig, name: str, share: tuple[float, float], lengths: np.ndarray
) -> None:
    """DataError if the documents of one share of the split do not fill a single sample."""
    # The rounding is megatron-core's.
    first, last = (round(bound * float(len(lengths))) for bound in share)
    tokens = int(lengths[first:last].sum(dtype=np.int64))
    if tokens <= model.sequence_length:
        raise DataError(
            f"the {name} share of data.split {data.split} is {last - first} of {len(lengths)} documents with {tokens} "
            f"tokens, and one sample takes {model.sequence_length + 1}: use a larger corpus, another data.split or a "
            f"shorter model.sequence_length"
        )


def _make_index_folder(folder: Path, needed_bytes: int) -> None:
    """An empty folder that only this user can enter, with room for the indices.

    megatron-core unpickles what it finds in its cache: so nothing found there is ever used.
    """
    if dist.is_initialized() and dist.get_rank() != 0:
        return
    try:
        if folder.is_symlink() or folder.is_file():
            folder.unlink()
        elif folder.exists():
            shutil.rmtree(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700)
        free_bytes = shutil.disk_usage(folder).free
    except OSError as error:
        raise DataError(
            f"{error.filename or folder} cannot be made anew ({error.strerror}): set data.cache to a folder of your own"
        ) from error
    if free_bytes < needed_bytes:
        raise DataError(
            f"{folder} has no space left for the order of the samples: {free_bytes:,} bytes are free and about "
            f"{needed_bytes:,} are needed; free some or set data.cache"
        )


def _is_first_of_node() -> bool:
    return not dist.is_initialized() or dist.get_node_local_rank(fallback_rank=0) == 0


def _together(action: Callable[[], Result]) -> Result:
    """Runs `action`; with a process group, an error in one process is raised in all."""
    if not dist.is_initialized():
        return action()
    # Brings DeepSpeed, which a corpus without a process group does not need.
    from pretrain.processes import together

    return together(action)
