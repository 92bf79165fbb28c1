"""Attention within documents by their bounds, as a GPU does it, against a mask, in whole models."""

import pytest
import torch
from torch import Tensor

from model.config import ModelConfig, Recompute
from model.costs.arithmetic import packs_documents
from model.gpt import build_model
from model.process_groups import single_process
from pretrain.data.document_mask import document_bounds, outside_mask, positions_within
from tests.support import varlen_attention
from tests.support.parallel_engine import uniform_ranks
from tests.support.parallel_model import small_config, some_tokens

END = 9


def _documents(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Tokens and labels of samples that begin inside a document, with one, and that are all of one."""
    tokens, labels = some_tokens(config, 3)
    tokens[tokens == END] = END + 1
    tokens[0, [3, 4, 9]] = END
    tokens[1, [0, 11]] = END
    return tokens, labels


def test_bounds_are_where_the_mask_changes() -> None:
    tokens = torch.ones(3, 12, dtype=torch.int64)
    tokens[0, [3, 4, 9]] = tokens[1, [0, 11]] = END
    positions = positions_within(tokens, END)
    bounds = document_bounds(positions == 0)
    assert bounds.dtype == torch.int32
    assert bounds.tolist() == [0, 3, 4, 9, 12, 23, 24, 36]
    seen = outside_mask(positions, torch.float32, causal=False).eq(0.0).squeeze(1)
    blocks = [torch.ones(length, length) for length in bounds.diff().tolist()]
    assert torch.equal(torch.block_diag(*blocks).bool(), torch.block_diag(*seen).bool())


def _losses_and_gradients(config: ModelConfig, recompute: Recompute, by_bounds: bool) -> dict[str, Tensor]:
    with single_process():
        model = build_model(config, uniform_ranks(config, 6), seed=1, recompute=recompute)
        tokens, labels = _documents(config)
        positions = positions_within(tokens, END)
        mask = outside_mask(positions, torch.float32, causal=not config.bidirectional)
        losses = model(tokens, positions, document_bounds(positions == 0) if by_bounds else mask, labels=labels)
        losses.mean().backward()
        found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {"losses": losses.detach()} | found


@pytest.mark.parametrize(
    ("family", "bidirectional", "recompute"),
    [("gpt2", False, "none"), ("llama", False, "factors"), ("llama", True, "layers")],
)
def test_documents_by_their_bounds_are_those_behind_the_mask(
    family: str, bidirectional: bool, recompute: Recompute
) -> None:
    varlen_attention.provide()
    config = small_config(family, bidirectional=bidirectional)
    found, expected = (_losses_and_gradients(config, recompute, by_bounds) for by_bounds in (True, False))
    assert found.keys() == expected.keys()
    for name, values in found.items():
        torch.testing.assert_close(values, expected[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("changes", "element_bytes", "packs"),
    [
        ({}, 2, True),
        ({}, 4, False),
        ({"attention_dropout": 0.1}, 2, False),
        ({"heads": 16}, 2, False),  # heads of 4 numbers
    ],
)
def test_what_flash_attention_does_not_take_has_a_mask(
    changes: dict[str, object], element_bytes: int, packs: bool
) -> None:
    config = ModelConfig.model_validate({"hidden": 64, "heads": 4, "layers": 1} | changes)
    assert packs_documents(config, element_bytes) is packs
