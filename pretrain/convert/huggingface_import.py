"""Reads a model to start from as a dense one of ours, from a Hugging Face folder or any consolidated folder.

A Hugging Face folder was written by others. Nothing in it is run or unpickled: `config.json` is data, and weights come
from safetensors files alone. Names, shapes and types in their headers are compared with the settings before a weight is
read. Then weights are read one at a time, in fp32 whatever the stored type.
"""

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.config import ModelConfig
from model.huggingface.config import dense_config
from model.huggingface.tensors import (
    OUTPUT_LAYER,
    WORD_EMBEDDINGS,
    correspondences,
    huggingface_shapes,
    tensor_from_theirs,
)
from pretrain.convert.consolidated import (
    FACTS_LIMIT_BYTES,
    FACTS_NAME,
    INDEX_NAME,
    WEIGHTS_NAME,
    ConsolidatedModel,
    weight_files,
)
from pretrain.convert.logit_comparison import load_transformers, training_logits, transformers_logits
from pretrain.convert.source import DenseSource, dense_source
from pretrain.disk import read_json
from pretrain.errors import CheckpointError
from pretrain.tokenizer.base import JSON_NAME, MODEL_NAME, Tokenizer
from pretrain.tokenizer.load import open_tokenizer
from pretrain.tokenizer.sentencepiece import is_exact

SETTINGS_NAME, ADAPTER_NAME = "config.json", "adapter_config.json"
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_TYPES = {"F32", "F16", "BF16"}
_PREFIX = "transformer."
"""What names of GPT-2's tensors begin with, unless the model was saved without its output layer."""
_WEIGHT_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors")
# Constants that older versions of transformers stored beside the weights.
_BUFFERS = re.compile(
    r"(transformer\.)?h\.[0-9]+\.attn\.(masked_)?bias|model\.layers\.[0-9]+\.self_attn\.rotary_emb\.inv_freq"
)


def open_source(folder: Path, *, sequence_length: int | None = None, tokenizer: Path | None = None) -> DenseSource:
    """The model in `folder`, checked; `CheckpointError` if it cannot be imported.

    `sequence_length`: another longest sequence; `tokenizer`: a file to use in place of the folder's tokenizer.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder: give the folder of a model as --input")
    if (folder / SETTINGS_NAME).is_file():
        return _huggingface_source(folder, sequence_length, tokenizer)
    if (folder / FACTS_NAME).is_file():
        return _consolidated_source(folder, sequence_length, tokenizer)
    raise CheckpointError(
        f"{folder} is neither a Hugging Face folder, for it has no {SETTINGS_NAME}, nor a consolidated one, for it has "
        f"no {FACTS_NAME}"
    )


def _consolidated_source(folder: Path, sequence_length: int | None, tokenizer: Path | None) -> DenseSource:
    if tokenizer is not None:
        raise CheckpointError(f"{folder} has the tokenizer it was trained with: leave --tokenizer out")
    return _of_length(dense_source(ConsolidatedModel(folder)), sequence_length)


def huggingface_settings(folder: Path) -> tuple[dict[str, Any], ModelConfig]:
    """The content of `config.json` and the dense model it describes.

    Raises `CheckpointError` if that is no model of ours, or if it would make transformers use anything but its own code
    and the folder's safetensors weights.
    """
    path = folder / SETTINGS_NAME
    settings = read_json(path.resolve(), FACTS_LIMIT_BYTES)  # in a cache it is a link
    if os.path.lexists(folder / ADAPTER_NAME):
        raise CheckpointError(
            f"{folder} holds an adapter beside its model ({ADAPTER_NAME}), which transformers would add: merge it into "
            "the weights, or take it away"
        )
    try:
        return settings, dense_config(settings)
    except ValueError as error:
        raise CheckpointError(
            f"{folder} cannot be used: {error}: give a model of Llama or GPT-2 type, as docs/adaptation.md describes it"
        ) from error


def _huggingface_source(folder: Path, sequence_length: int | None, tokenizer: Path | None) -> DenseSource:
    settings, config = huggingface_settings(folder)
    weights = _Weights(folder)
    tied = settings.get("tie_word_embeddings", config.tied_embeddings)
    weights.check(config, tied)
    notes = []
    if tied and not config.tied_embeddings:
        notes.append("the output layer is tied to the embedding there; here it is a copy, trained on its own")
    if settings.get("embd_pdrop", config.hidden_dropout) != config.hidden_dropout:
        notes.append(f"resid_pdrop {config.hidden_dropout:g} becomes the dropout of the embedding as well")
    rows = {row.ours: row for row in correspondences(config)}

    def read(name: str) -> Tensor:
        tensor = tensor_from_theirs(config, rows[name], tuple(map(weights.read, rows[name].theirs)))
        if not tensor.isfinite().all():
            raise CheckpointError(f"{folder} holds NaN or an infinity in {rows[name].theirs[0]}: it cannot be trained")
        return tensor

    fitting = _fitting_tokenizer(folder, config, tokenizer)
    if fitting.vocabulary < config.vocabulary:
        notes.append(f"the embedding has {config.vocabulary} rows, and {fitting.path} {fitting.vocabulary} tokens")
    source = DenseSource(config, read, fitting, tuple(notes))
    return _of_length(source, sequence_length)


def _of_length(source: DenseSource, length: int | None) -> DenseSource:
    """The model with the longest sequence `length`: rotary positions have no limit, a table of positions is cut."""
    config, positions = source.config, source.config.sequence_length
    if length is None or length == positions:
        return source
    if length < 2 or (config.learned_positions and length > positions):
        most = f"2 to {positions}, its learned positions" if config.learned_positions else "2 or more"
        raise CheckpointError(f"--sequence-length is {length}, and this model allows {most}")

    def cut(name: str) -> Tensor:
        tensor = source.read(name)
        return tensor[:length] if name == "embedding.position_embeddings.weight" else tensor

    return replace(source, config=config.model_copy(update={"sequence_length": length}), read=cut)


def _fitting_tokenizer(folder: Path, config: ModelConfig, path: Path | None) -> Tokenizer:
    """The tokenizer, whose ids must be rows of the embedding; published models often have more rows than ids."""
    path = path or _own_tokenizer(folder)
    if not path.exists():
        raise CheckpointError(
            f"{path} is missing, and corpora are made with it: give the tokenizer that the model's tokens come from "
            "with --tokenizer"
        )
    tokenizer = open_tokenizer(path)
    if tokenizer.vocabulary > config.vocabulary:
        raise CheckpointError(
            f"the tokenizer {path} has {tokenizer.vocabulary} tokens, and the vocab_size of {folder} is "
            f"{config.vocabulary}: give the tokenizer that the model was trained with as --tokenizer"
        )
    return tokenizer


def _own_tokenizer(folder: Path) -> Path:
    """The folder's tokenizer file. If there are a sentencepiece model and its JSON form, the model, if it is exact."""
    model, other = folder / MODEL_NAME, folder / JSON_NAME
    return other if other.is_file() and not (model.is_file() and is_exact(model)) else model


class _Weights:
    """The safetensors files of a Hugging Face folder; opening them reads only their headers."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._handles: dict[str, Any] = {}
        self._stored: dict[str, str] = {}
        """Names in the files, by names in the table."""
        self._refuse_pickled()
        for file, names in weight_files(folder, _WEIGHT_FILE).items():
            handle = _open(folder / file)
            for name in handle.keys():  # noqa: SIM118 (it is no dictionary)
                if name in self._handles:
                    raise CheckpointError(f"{folder} holds {name} in two files")
                self._handles[name] = handle
            if names is not None and names != set(handle.keys()):
                raise CheckpointError(f"{folder / file} does not hold the tensors that {INDEX_NAME} names")

    def _refuse_pickled(self) -> None:
        """CheckpointError if the folder has no safetensors weights."""
        folder = self._folder
        if (folder / INDEX_NAME).is_file() or (folder / WEIGHTS_NAME).is_file():
            return
        pickled = sorted(path.name for pattern in PICKLED for path in folder.glob(pattern))
        if pickled:
            raise CheckpointError(
                f"the weights of {folder} are pickled ({pickled[0]}), which can run code when it is read: give a "
                "folder with safetensors weights, as save_pretrained of transformers writes it"
            )
        raise CheckpointError(f"{folder} holds no {WEIGHTS_NAME}: give a folder with safetensors weights as --input")

    def check(self, config: ModelConfig, tied: bool) -> None:
        """CheckpointError unless names, shapes and types of the tensors are those of a model of these settings."""
        if config.layers > len(self._handles):  # before a table of that size is made
            raise CheckpointError(
                f"{self._folder} holds {len(self._handles)} tensors, and its {SETTINGS_NAME} asks for {config.layers} "
                "layers"
            )
        shapes = huggingface_shapes(config)
        present = {name for name in self._handles if not _BUFFERS.fullmatch(name)}
        bare = not any(name.startswith(_PREFIX) for name in present)
        self._stored = {name: name.removeprefix(_PREFIX) if bare else name for name in shapes}
        if tied:
            self._unite_tied(config, present)
        expected = {self._stored[name]: shape for name, shape in shapes.items()}
        odd = present ^ expected.keys()
        if odd:
            name = min(odd)
            verb = "lacks" if name in expected else "holds"
            raise CheckpointError(
                f"{self._folder} {verb} {name} ({len(odd)} such names), and its {SETTINGS_NAME} describes a model "
                f"{'with' if name in expected else 'without'} it: give a folder whose files belong together"
            )
        for name, shape in expected.items():
            header = self._handles[name].get_slice(name)
            found, dtype = tuple(header.get_shape()), header.get_dtype()
            if found != shape:
                raise CheckpointError(
                    f"{self._folder} holds {name} as {found}, and its {SETTINGS_NAME} asks for {shape}: give a folder "
                    "whose files belong together"
                )
            if dtype not in _TYPES:
                raise CheckpointError(
                    f"{self._folder} holds {name} as {dtype}, and only {', '.join(_TYPES)} can be read: save the model "
                    "in one of them"
                )

    def _unite_tied(self, config: ModelConfig, present: set[str]) -> None:
        """Accepts a tied output layer that is stored or not; either way the embedding holds its numbers."""
        words = self._stored[WORD_EMBEDDINGS[config.family]]
        if OUTPUT_LAYER in present and words in present:
            if not self.tensor(OUTPUT_LAYER).equal(self.tensor(words)):
                raise CheckpointError(
                    f"{self._folder} holds {OUTPUT_LAYER} and {words} with different numbers, and its {SETTINGS_NAME} "
                    "says that they are one (tie_word_embeddings)"
                )
            present.remove(OUTPUT_LAYER)
        if OUTPUT_LAYER in self._stored:
            self._stored[OUTPUT_LAYER] = words

    def tensor(self, stored_name: str) -> Tensor:
        """A tensor as it is stored."""
        return self._handles[stored_name].get_tensor(stored_name)

    def read(self, name: str) -> Tensor:
        """The tensor with this name in the table; call `check` before."""
        return self.tensor(self._stored[name])


def _open(path: Path) -> Any:
    """A handle of a safetensors file, or of what it links to."""
    try:
        return safe_open(path.resolve(strict=True), framework="pt", device="cpu")
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a whole safetensors file ({error}): copy it again") from error


def source_logits(folder: Path, tokens: Tensor) -> Tensor:
    """Logits of the model in `folder` for `tokens (sequences, length)`, computed by transformers."""
    if (folder / SETTINGS_NAME).is_file():
        return transformers_logits(load_transformers(folder, foreign=True), tokens)
    return training_logits(ConsolidatedModel(folder), tokens)
