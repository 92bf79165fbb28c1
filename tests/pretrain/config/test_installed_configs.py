"""Installed configs load, their models have the planned shapes at their tensor-parallel sizes, and the table of what
they need is current."""

from math import prod
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.testing._internal.distributed.fake_pg import FakeStore

from model.costs.arithmetic import total_parameters
from model.gpt import build_model, tensor_layouts
from model.huggingface.dense import parameter_shapes
from model.process_groups import initialize_process_groups
from pretrain.config.run import load_config
from pretrain.engine.deepspeed_config import deepspeed_dict
from tests.support.distributed import run_alone
from tools.documentation.config_table import BEGIN, END, PAGE, VARIANTS, config_of, names, table


def _build_in_shape(folder: str, chosen: list[str]) -> None:
    """Builds each model on torch's meta device, as the last of its tensor-parallel processes; torch's fake process
    group stands for the others."""
    dist.destroy_process_group()
    for name in chosen:
        config = config_of(name)
        size = config.parallel.tensor
        dist.init_process_group("fake", store=FakeStore(), rank=size - 1, world_size=size)
        initialize_process_groups(size)
        ranks = config.initial_ranks()
        with torch.device("meta"):
            model = build_model(config.model, ranks, seed=config.run.seed, recompute=config.train.recompute)
        assert all(parameter.is_meta for parameter in model.parameters())
        layouts = tensor_layouts(model)
        assert {key: layout.full_shape for key, layout in layouts.items()} == parameter_shapes(config.model, ranks)
        assert sum(prod(one.full_shape) for one in layouts.values()) == total_parameters(config.model, ranks)
        for key, parameter in model.named_parameters():
            assert tuple(parameter.shape) == layouts[key].shard_shape(size)
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
        Path(folder, name).touch()


def test_every_config_builds_in_shape_at_its_tensor_parallel_size(tmp_path: Path) -> None:
    run_alone(_build_in_shape, 1, str(tmp_path), names())
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names())


def test_sizes_are_there_with_their_dense_twins() -> None:
    sizes = {name.removesuffix("_dense").removesuffix("_mlp") for name in names()}
    assert {"gpt2_small", "gpt2_medium", "gpt2_large", "gpt2_xl"} <= sizes
    assert {"llama_1b", "llama_7b", "llama_13b", "llama_70b"} <= sizes
    for size in sizes:
        dense = load_config(f"{size}_dense")
        assert dense.model.parametrization == "dense"
        assert dense.model.model_copy(update={"parametrization": "factored"}) == load_config(size).model
    assert len(names()) == len(sizes) * len(VARIANTS) - sum(size.startswith("llama") for size in sizes)


@pytest.mark.parametrize(
    ("file", "settings"),
    [
        ("zero1", ["deepspeed.stage=1"]),
        ("zero2", ["deepspeed.stage=2"]),
        ("zero3", ["deepspeed.stage=3"]),
        ("zero2_offload", ["deepspeed.stage=2", "deepspeed.offload_optimizer=true"]),
        ("zero3_offload", ["deepspeed.stage=3", "deepspeed.offload_optimizer=true"]),
    ],
)
def test_deepspeed_files_suit_every_config(file: str, settings: list[str]) -> None:
    for name in names():
        config = load_config(name, [f"deepspeed.config={file}", *settings])
        deepspeed_dict(config, config.parallel_layout(64 * config.parallel.tensor // config.train.micro_batch))


def test_the_table_is_current() -> None:
    shown = PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0].strip()
    assert shown == table(), "run python tools/documentation/config_table.py --write"
