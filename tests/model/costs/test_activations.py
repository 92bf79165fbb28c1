"""Predicted activation bytes against a census of what autograd saves."""

import pytest
import torch
from torch import Tensor

from model.config import ModelConfig
from model.costs.activations import activation_bytes
from model.gpt import build_model
from model.process_groups import initialize_process_groups
from pretrain.data.document_mask import document_bounds, outside_mask, positions_within
from tests.support import varlen_attention
from tests.support.distributed import run
from tests.support.parallel_engine import uniform_ranks
from tests.support.parallel_model import positions_of, small_config, some_tokens

RANK, SEQUENCES = 16, 5
END = 0
FORMS = {"factored": "all", "factored mlp": "mlp", "additive": "all", "dense": "all"}


def _config(family: str, form: str, **changes: object) -> ModelConfig:
    sizes = {"layers": 3, "hidden": 64, "sequence_length": 24} | changes
    return small_config(family, form.split()[0], FORMS[form], **sizes)


def _saved_bytes(configs: list[ModelConfig], dtype: torch.dtype, tensor: int, within_documents: str = "") -> list[int]:
    """Bytes of all storages that autograd holds on to, parameters and buffers apart. `within_documents`: documents are
    kept apart by a "mask" or by their "bounds"."""
    varlen_attention.provide()
    initialize_process_groups(tensor)
    totals = []
    for config in configs:
        model = build_model(config, uniform_ranks(config, RANK), seed=1).to(dtype)
        tokens, labels = some_tokens(config, SEQUENCES)
        own = {values.untyped_storage().data_ptr() for values in (*model.parameters(), *model.buffers())}
        kept: list[Tensor] = []  # held on to, so that no storage is used twice

        def pack(values: Tensor, kept: list[Tensor] = kept) -> Tensor:
            kept.append(values)
            return values

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda values: values):
            positions, mask = positions_of(tokens), None
            if within_documents:
                positions = positions_within(tokens, END)
                mask = outside_mask(positions, dtype, causal=True)
                if within_documents == "bounds":
                    mask = document_bounds(positions == 0)
            model(tokens, positions, mask, labels=labels).mean()
        storages = {values.untyped_storage().data_ptr(): values.untyped_storage().nbytes() for values in kept}
        totals.append(sum(size for place, size in storages.items() if place not in own))
    return totals


def _check(configs: list[ModelConfig], dtype: torch.dtype, tensor: int) -> None:
    for measured in run(_saved_bytes, tensor, configs, dtype, tensor):
        for config, total in zip(configs, measured, strict=True):
            planned = activation_bytes(
                config,
                uniform_ranks(config, RANK),
                tensor_size=tensor,
                sequences=SEQUENCES,
                element_bytes=dtype.itemsize,
            )
            assert planned.peak == pytest.approx(total, rel=0.05), config


def test_a_factored_model_keeps_what_is_planned() -> None:
    _check([_config(family, "factored") for family in ("llama", "gpt2")], torch.bfloat16, 2)


def test_all_layers_keep_one_mask_of_documents() -> None:
    configs = [_config(family, "factored", sequence_length=96) for family in ("llama", "gpt2")]
    without, within = (_saved_bytes_of_one(configs, how) for how in ("", "mask"))
    for before, after in zip(without, within, strict=True):
        assert after - before == pytest.approx(SEQUENCES * 96 * 96 * torch.bfloat16.itemsize, rel=0.05)


def test_layers_of_a_gpu_keep_queries_keys_values_and_results_in_the_order_of_documents() -> None:
    config = _config("gpt2", "factored", sequence_length=96)
    (without,), (within,) = (_saved_bytes_of_one([config], how) for how in ("", "bounds"))
    plain, packed = (
        activation_bytes(
            config,
            uniform_ranks(config, RANK),
            tensor_size=1,
            sequences=SEQUENCES,
            element_bytes=2,
            gpu=True,
            within_documents=documents,
        ).kept
        for documents in (False, True)
    )
    assert within - without == pytest.approx(packed - plain, rel=0.05)


def _saved_bytes_of_one(configs: list[ModelConfig], within_documents: str) -> list[int]:
    (found,) = run(_saved_bytes, 1, configs, torch.bfloat16, 1, within_documents)
    return found


@pytest.mark.matrix
@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_model_keeps_what_is_planned(dtype: torch.dtype, tensor: int) -> None:
    changes: list[dict[str, object]] = [{}, {"hidden_dropout": 0.1}, {"hidden": 128, "sequence_length": 16}]
    configs = [_config(family, form, **change) for family in ("llama", "gpt2") for form in FORMS for change in changes]
    configs.append(_config("llama", "factored", query_groups=0))
    _check(configs, dtype, tensor)
