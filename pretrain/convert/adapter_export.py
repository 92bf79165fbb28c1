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
from pretrain.convert.logit_comparison import (
    TOLERANCES,
    Comparison,
    compare_logits,
    comparison_tokens,
    load_transformers,
    training_logits,
    transformers_logits,
)
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
    """Runs a fixed batch through the additive model, and through the written base with the written update added.

    Raises `CheckpointError` when the logits differ by more than the `dtype`'s tolerance, or are no numbers.
    """
    tokens = comparison_tokens(consolidated)
    ours = training_logits(consolidated, tokens)
    merged = load_transformers(folder / BASE_FOLDER, in_memory=True)
    _merge(merged, folder / ADAPTER_FOLDER)
    comparison = compare_logits(ours, transformers_logits(merged, tokens))
    if not comparison.within(TOLERANCES[dtype]):
        raise CheckpointError(
            f"base and adapter do not compute what the additive model computes: logits differ by up to "
            f"{comparison.difference:.3g} at a scale of {comparison.scale:.3g}, and {TOLERANCES[dtype]:g} of the scale "
            f"is allowed (same greedy token at {comparison.same_greedy_tokens} of {comparison.tokens} positions): "
            "nothing was exported"
        )
    return comparison


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
