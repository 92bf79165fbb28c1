"""Writes a consolidated model as a Hugging Face folder, and compares the logits of the two.

The weights are streamed: shapes are known beforehand, so a file's header is written first. Then one product W = B A at
a time is computed in fp32, rounded and written. The written folder is then loaded with transformers and compared with
the model that was trained.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig

from model.huggingface.config import huggingface_config
from model.huggingface.tensors import huggingface_shapes, huggingface_tensors
from pretrain.checkpoint.format import write_tensors
from pretrain.convert.consolidated import INDEX_NAME, ConsolidatedModel, plan_files
from pretrain.convert.logit_comparison import Comparison, compare_with_written, load_transformers, type_name
from pretrain.convert.source import DenseSource, dense_source
from pretrain.disk import write_blocks
from pretrain.errors import CheckpointError


def dense_bytes(consolidated: ConsolidatedModel, dtype: torch.dtype) -> int:
    """Size of all weights of the export."""
    return sum(math.prod(shape) * dtype.itemsize for shape in huggingface_shapes(consolidated.config).values())


def write_dense_export(
    consolidated: ConsolidatedModel, folder: Path, *, dtype: torch.dtype, max_shard_bytes: int
) -> None:
    """Writes weights, settings and tokenizer of the whole model into the empty `folder`."""
    write_huggingface_folder(dense_source(consolidated), folder, dtype=dtype, max_shard_bytes=max_shard_bytes)


def write_huggingface_folder(source: DenseSource, folder: Path, *, dtype: torch.dtype, max_shard_bytes: int) -> None:
    """Writes a dense model into the empty `folder`.

    A sentencepiece model goes along: transformers reads tokenizer.json beside it, and an import needs it.
    """
    write_weights(source, folder, dtype=dtype, max_shard_bytes=max_shard_bytes)
    end = source.tokenizer.end_of_document
    huggingface_config(source.config, end_of_document=end, dtype=dtype).save_pretrained(folder)
    GenerationConfig(bos_token_id=end, eos_token_id=end, pad_token_id=end).save_pretrained(folder)
    source.tokenizer.export(folder, source.config.sequence_length)


def write_weights(source: DenseSource, folder: Path, *, dtype: torch.dtype, max_shard_bytes: int) -> None:
    """Writes `model.safetensors`, or numbered files of at most `max_shard_bytes` (or one tensor) and their index."""
    shapes = huggingface_shapes(source.config)
    sizes = {name: math.prod(shape) * dtype.itemsize for name, shape in shapes.items()}
    files = plan_files(sizes, max_shard_bytes)
    tensors = huggingface_tensors(source.config, {}, source.read)
    for file, names in files.items():
        wanted = {name: shapes[name] for name in names}
        # `format` tells transformers that no tensor needs transposing.
        write_tensors(folder / file, wanted, _rounded(names, tensors, dtype), dtype, {"format": "pt"})
    if len(files) > 1:
        index = {
            "metadata": {"total_size": sum(sizes.values())},
            "weight_map": {name: file for file, names in files.items() for name in names},
        }
        write_blocks(folder / INDEX_NAME, [json.dumps(index, indent=2).encode()])


def compare_with_export(consolidated: ConsolidatedModel, folder: Path, *, dtype: torch.dtype) -> Comparison:
    """Compares the factored model with the export in `folder`; `CheckpointError` if they are not the same function."""
    return compare_with_written(consolidated, lambda: load_transformers(folder), dtype=dtype)


def _rounded(names: list[str], tensors: Iterator[tuple[str, Tensor]], dtype: torch.dtype) -> Iterator[Tensor]:
    """The tensors `names` of one file in `dtype`, taken from `tensors`, which yields them in the same order."""
    for name in names:
        found, tensor = next(tensors)
        if found != name:
            raise ValueError(f"{found} came where {name} belongs")
        rounded = tensor.to(dtype)
        if not rounded.isfinite().all():
            if tensor.isfinite().all():
                raise CheckpointError(
                    f"{name} has values up to {tensor.abs().max().item():.3g}, and {type_name(dtype)} ends at "
                    f"{torch.finfo(dtype).max:.3g}: use --dtype bfloat16 or float32"
                )
            raise CheckpointError(f"{name} holds NaN or an infinity: export an earlier checkpoint")
        yield rounded
