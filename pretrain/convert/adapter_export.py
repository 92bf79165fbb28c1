"""Writes an additive model as what PEFT loads: a base model and a LoRA adapter of it.

    base/       Hugging Face folder of W0 with the trained embeddings, norms and biases
    adapter/    adapter_config.json, adapter_model.safetensors: the factors, in fp32

Embeddings, norms and biases are no part of an adapter, so the base holds the trained ones. It is therefore not the
model that was imported, unless the run trained factors alone (`model.trained=factors`).
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from model.huggingface.adapter import adapter_config, adapter_tensors, base_weight
from model.huggingface.dense import parameter_shapes
from pretrain.checkpoint.format import write_tensors
from pretrain.convert.consolidated import ConsolidatedModel
from pretrain.convert.huggingface_export import write_huggingface_folder
from pretrain.convert.logit_comparison import Comparison, compare_with_written, load_transformers
from pretrain.convert.source import frozen_base
from pretrain.disk import write_blocks
from pretrain.errors import CheckpointError

BASE_FOLDER, ADAPTER_FOLDER = "base", "adapter"
SETTINGS_NAME, FACTORS_NAME = "adapter_config.json", "adapter_model.safetensors"


def check_additive(consolidated: ConsolidatedModel) -> None:
    """CheckpointError if there is no frozen weight that an adapter could stand beside."""
    parametrization = consolidated.config.parametrization
    if parametrization != "additive":
        raise CheckpointError(
            f"{consolidated.folder} is {parametrization} and has no frozen weights with an update beside them, as "
            "an adapter has: export it with tools/densify_checkpoint.py"
        )


def write_adapter_export(
    consolidated: ConsolidatedModel, folder: Path, output: Path, *, dtype: torch.dtype, max_shard_bytes: int
) -> None:
    """Fills the empty `folder`, which will be called `output`; `dtype` is that of the base's stored weights."""
    base, adapter = folder / BASE_FOLDER, folder / ADAPTER_FOLDER
    base.mkdir()
    adapter.mkdir()
    write_huggingface_folder(frozen_base(consolidated), base, dtype=dtype, max_shard_bytes=max_shard_bytes)
    settings = adapter_config(consolidated.config, consolidated.ranks)
    settings["base_model_name_or_path"] = str(output / BASE_FOLDER)
    write_blocks(adapter / SETTINGS_NAME, [json.dumps(settings, indent=2).encode()])
    factors = (tensor for _, tensor in adapter_tensors(consolidated.config, consolidated.read))
    write_tensors(adapter / FACTORS_NAME, _shapes(consolidated), factors)


def _shapes(consolidated: ConsolidatedModel) -> dict[str, tuple[int, ...]]:
    """Shapes of the adapter's tensors, without reading a factor."""
    shapes = parameter_shapes(consolidated.config, consolidated.ranks)
    tensors = adapter_tensors(consolidated.config, lambda name: torch.empty(shapes[name], device="meta"))
    return {name: tuple(tensor.shape) for name, tensor in tensors}


def compare_with_adapter(consolidated: ConsolidatedModel, folder: Path, *, dtype: torch.dtype) -> Comparison:
    """Compares the additive model with the written base and the written update added to it; `CheckpointError` if they
    are not the same function."""

    def merged() -> torch.nn.Module:
        model = load_transformers(folder / BASE_FOLDER, in_memory=True)
        _merge(model, folder / ADAPTER_FOLDER)
        return model

    return compare_with_written(consolidated, merged, dtype=dtype)


@torch.no_grad()
def _merge(model: torch.nn.Module, adapter: Path) -> None:
    """W += (alpha / r) B A, as PEFT documents LoRA, from the files alone."""
    settings = json.loads((adapter / SETTINGS_NAME).read_text(encoding="utf-8"))
    factors: dict[str, Tensor] = load_file(adapter / FACTORS_NAME)
    for name in [name for name in factors if ".lora_A." in name]:
        weight = base_weight(name)
        module = weight.removesuffix(".weight")
        A, B = factors[name], factors[name.replace(".lora_A.", ".lora_B.")]
        rank = settings["rank_pattern"].get(module, settings["r"])
        alpha = settings["alpha_pattern"].get(module, settings["lora_alpha"])
        if rank != A.shape[0]:
            raise CheckpointError(f"{name} has rank {A.shape[0]}, and {SETTINGS_NAME} says {rank}")
        update = alpha / rank * (B @ A)
        model.get_parameter(weight).add_(update.t() if settings["fan_in_fan_out"] else update)
