"""What worker processes do in tests of the model: build it on a layout, load logical tensors, run, gather."""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from model.config import ModelConfig
from model.gpt import EspalierModel, build_model, tensor_layouts
from model.process_groups import initialize_process_groups, tensor_group, tensor_index, tensor_size
from tests.support.reference import random_tensors


def small_config(
    family: str, parametrization: str = "factored", factored_layers: str = "all", **changes: object
) -> ModelConfig:
    """Two layers; 4 heads in 2 query groups where the family has them, and a vocabulary that needs padding."""
    settings: dict[str, object] = {
        "family": family,
        "layers": 2,
        "hidden": 32,
        "heads": 4,
        "query_groups": 2 if family == "llama" else 0,
        "sequence_length": 16,
        "vocabulary": 300,
        "parametrization": parametrization,
        "factored_layers": factored_layers,
    }
    return ModelConfig.model_validate(settings | changes)


def some_tokens(config: ModelConfig, sequences: int = 2) -> tuple[Tensor, Tensor]:
    """Tokens and labels, `(sequences, sequence_length)` each."""
    generator = torch.Generator().manual_seed(7)
    text = torch.randint(0, config.vocabulary, (sequences, config.sequence_length + 1), generator=generator)
    return text[:, :-1].contiguous(), text[:, 1:].contiguous()


def positions_of(tokens: Tensor) -> Tensor:
    return torch.arange(tokens.shape[1]).expand_as(tokens)


def load_logical(model: EspalierModel, tensors: Mapping[str, Tensor]) -> None:
    """Gives every parameter its shard of a logical tensor."""
    layouts = tensor_layouts(model)
    assert layouts.keys() == tensors.keys()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(layouts[name].shard(tensors[name], tensor_index(), tensor_size()))


def gather_logical(model: EspalierModel, shards: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Logical tensors from every tensor-parallel process's shards; copies that should agree must agree to the bit."""
    layouts = tensor_layouts(model)
    whole = {}
    for name, shard in shards.items():
        every = [torch.empty_like(shard.contiguous()) for _ in range(tensor_size())]
        dist.all_gather(every, shard.contiguous(), group=tensor_group())
        if layouts[name].dim is None:
            assert all(torch.equal(other, every[0]) for other in every), f"copies of {name} differ"
        whole[name] = layouts[name].unshard(every)
    return whole


def first_step(
    config: ModelConfig, ranks: Mapping[str, int], tensor_parallel: int
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Logits `(batch, seq, padded vocabulary)`, token losses and every parameter's whole gradient of their mean."""
    initialize_process_groups(tensor_parallel)
    model = build_model(config, ranks, seed=1)
    load_logical(model, random_tensors(config, ranks, seed=3))
    tokens, labels = some_tokens(config)
    with torch.no_grad():
        logits = model(tokens, positions_of(tokens), None)
    losses = model(tokens, positions_of(tokens), None, labels=labels)
    losses.mean().backward()
    every = [torch.empty_like(logits) for _ in range(tensor_size())]
    dist.all_gather(every, logits.contiguous(), group=tensor_group())
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() == model.trained_parameters().keys()
    return torch.cat(every, dim=-1), losses.detach(), gather_logical(model, gradients)


def initial_tensors(config: ModelConfig, ranks: Mapping[str, int], tensor_parallel: int) -> dict[str, Tensor]:
    """Every parameter as it is built, whole."""
    initialize_process_groups(tensor_parallel)
    model = build_model(config, ranks, seed=5)
    return gather_logical(model, {name: parameter.detach() for name, parameter in model.named_parameters()})


@contextmanager
def counted_all_reduces() -> Iterator[Counter[int]]:
    """Numbers in every all-reduce that is called meanwhile: size and how often."""
    sizes: Counter[int] = Counter()
    original = dist.all_reduce

    def counting(tensor: Tensor, *arguments: Any, **settings: Any) -> Any:
        sizes[tensor.numel()] += 1
        return original(tensor, *arguments, **settings)

    dist.all_reduce = counting
    try:
        yield sizes
    finally:
        dist.all_reduce = original
