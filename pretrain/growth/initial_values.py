"""The values a run started from: drawn from its seed, or read from the consolidated folder it began with.

Checkpoints do not hold them. Every cumulative update, W - W₀, is measured from them.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.config import factored_projections
from model.gpt import EspalierModel, build_model, tensor_layouts
from model.huggingface.dense import parameter_shapes
from model.initialization import initial_tensor
from model.process_groups import tensor_index, tensor_size
from model.sharding import TensorLayout
from pretrain.config.run import RunConfig, differing_architecture
from pretrain.convert.consolidated import ConsolidatedModel
from pretrain.errors import CheckpointError, ConfigError
from pretrain.policies.select import build_policy, check_start_ranks
from pretrain.tokenizer.base import Tokenizer


class InitialValues:
    """Reads one parameter's first value at a time."""

    def __init__(self, config: RunConfig) -> None:
        self._model, self._seed = config.model, config.run.seed
        start_from = config.checkpoint.start_from
        self._folder = None if start_from is None else ConsolidatedModel(Path(start_from))

        self.ranks = config.initial_ranks() if self._folder is None else self._folder.ranks
        """Ranks at the start, by `Projection.name`."""

    def shard(self, name: str, layout: TensorLayout) -> Tensor:
        """This process's part of the first value of parameter `name`, fp32, on the CPU; `layout` may be that of a
        factor that has grown since."""
        owner, _, leaf = name.rpartition(".")
        shape = list(layout.full_shape)
        if leaf in ("A", "B"):
            shape[0 if leaf == "A" else 1] = self.ranks[owner]
        start = replace(layout, full_shape=tuple(shape))
        if self._folder is not None:
            full = self._folder.read(name)
        else:
            full = initial_tensor(self._model, name, start.full_shape, self._seed)
        return start.shard(full, tensor_index(), tensor_size())


@torch.no_grad()
def initial_model(config: RunConfig) -> EspalierModel:
    """This process's shard of the model at step 0."""
    values = InitialValues(config)
    model = build_model(config.model, values.ranks, seed=config.run.seed, recompute=config.train.recompute)
    if config.checkpoint.start_from is not None:
        layouts = tensor_layouts(model)
        for name, parameter in model.named_parameters():
            parameter.copy_(values.shard(name, layouts[name]))
    return model


def check_start(config: RunConfig, tokenizer: Tokenizer) -> None:
    """Checks `checkpoint.start_from` before a new run of `config` writes anything; ConfigError or CheckpointError.

    The run starts with the folder's ranks. If all its layers have one rank, `rank.initial` must be the same, since the
    settings of the policy were checked with it.
    """
    if config.checkpoint.start_from is None:
        return
    folder = ConsolidatedModel(Path(config.checkpoint.start_from))
    # A run may freeze what another trained.
    differing = differing_architecture(folder.config.model_dump(), config, "trained")
    if differing:
        raise ConfigError(
            f"checkpoint.start_from {folder.folder} holds another architecture: {differing}; use its settings, or "
            "convert it with tools/import_huggingface.py"
        )
    expected = parameter_shapes(folder.config, folder.ranks)
    if folder.shapes != expected:
        name = min(name for name, _ in folder.shapes.items() ^ expected.items())
        raise CheckpointError(
            f"checkpoint.start_from {folder.folder} holds {name} as {folder.shapes.get(name)}, and its settings ask "
            f"for {expected.get(name)}: make it again"
        )
    ranks = set(folder.ranks.values())
    if len(ranks) == 1 and ranks != {config.rank.initial}:
        raise ConfigError(
            f"rank.initial is {config.rank.initial}, and the layers of checkpoint.start_from {folder.folder} have rank "
            f"{min(ranks)}: set rank.initial={min(ranks)}"
        )
    check_ranks(config, folder.ranks, f"checkpoint.start_from {folder.folder}")
    if folder.facts["tokenizer"].get("fingerprint") != tokenizer.fingerprint:
        raise ConfigError(
            f"data.tokenizer {config.data.tokenizer} is not the tokenizer of checkpoint.start_from {folder.folder}: "
            f"set data.tokenizer={folder.tokenizer_path}, and prepare the corpus with it"
        )


def check_ranks(config: RunConfig, ranks: Mapping[str, int], origin: str) -> None:
    """ConfigError if the policy of `config` cannot go on from these `ranks`; `origin` names their source in the
    error."""
    try:
        check_start_ranks(config.rank, factored_projections(config.model), ranks)
    except ValueError as error:
        raise ConfigError(f"{origin}: {error}") from error


def check_same_start(saved: Mapping[str, Any], config: RunConfig) -> None:
    """ConfigError if updates are measured, and the continued run, whose config was `saved`, started from other values
    than `config` says."""
    policy = build_policy(config.rank, config.train.steps)
    if not config.rank.track and "update" not in policy.needs:
        return
    asking = "rank.track" if config.rank.track else f"rank.policy={config.rank.policy}"
    other_way = "rank.track=false" if config.rank.track else "use another rank.policy"
    for name, before, now in (
        ("model.initial_std", saved["model"]["initial_std"], config.model.initial_std),
        ("rank.initial", saved["rank"]["initial"], config.rank.initial),
        ("train.precision", saved["train"]["precision"], config.train.precision),
        ("checkpoint.start_from", saved["checkpoint"].get("start_from"), config.checkpoint.start_from),
    ):
        if before != now:
            raise ConfigError(
                f"{asking} compares weights with those the run started from, and the checkpoint is of a run with "
                f"{name} {before}, now it is {now}: set {name} back, or {other_way}"
            )


def initial_factors(model: EspalierModel, config: RunConfig) -> dict[str, tuple[Tensor, Tensor]]:
    """This process's A₀ and B₀ of every factored layer, by `Projection.name`, in host memory.

    They are rounded as the model's own factors are, so that an untrained layer's update is zero.
    """
    values = InitialValues(config)
    layouts = tensor_layouts(model)
    factors = {}
    for name, layer in model.factored_layers().items():
        A, B = (
            values.shard(f"{name}.{side}", layouts[f"{name}.{side}"]).to(parameter.dtype)
            for side, parameter in (("A", layer.A), ("B", layer.B))
        )
        factors[name] = (A, B)
    return factors
