"""The low-rank update of an additive model as PEFT's LoRA: y = W x + (alpha / r) lora_B (lora_A x), scaled by 1.

One projection of ours is one to three modules there: q, k and v (gate and up) share our A, so each repeats it, with its
own rows of B. GPT-2's Conv1D keeps its weight transposed (`fan_in_fan_out`), its factors are oriented as everywhere.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from model.config import ModelConfig, factored_projections
from model.huggingface.dense import TensorReader
from model.huggingface.tensors import module_rows, modules_of, stores_transposed

_PREFIX = "base_model.model."
"""PEFT's wrapper around the base model."""


def adapter_config(config: ModelConfig, ranks: Mapping[str, int]) -> dict[str, Any]:
    """The content of `adapter_config.json`."""
    rank_of = {
        module: ranks[projection.name]
        for projection in factored_projections(config)
        for module in modules_of(config, projection)
    }
    common = Counter(rank_of.values()).most_common(1)[0][0]
    others = {module: rank for module, rank in rank_of.items() if rank != common}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": common,
        "lora_alpha": common,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(rank_of),
        "fan_in_fan_out": stores_transposed(config),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }


def adapter_tensors(config: ModelConfig, read: TensorReader) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of every factor, one after the other: `lora_A (r, in)`, `lora_B (out, r)`."""
    for projection in factored_projections(config):
        A, B = read(f"{projection.name}.A"), read(f"{projection.name}.B")
        for module, rows in zip(modules_of(config, projection), module_rows(config, projection, B), strict=True):
            yield f"{_PREFIX}{module}.lora_A.weight", A
            yield f"{_PREFIX}{module}.lora_B.weight", rows


def base_weight(adapter_name: str) -> str:
    """The weight of the base model that a `lora_A` or `lora_B` belongs to."""
    module, _, _ = adapter_name.removeprefix(_PREFIX).rpartition(".lora_")
    return f"{module}.weight"
