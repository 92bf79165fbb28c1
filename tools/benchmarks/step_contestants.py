"""What the step benchmark compares: models that differ in how their linear layers are written, ready to train.

| contestant            | q, k, v (and gate, up)                        | rank of them |
|-----------------------|-----------------------------------------------|--------------|
| `dense`               | megatron-core's own layers, like all others   | –            |
| `factored`            | one `A` for all of them                       | r            |
| `separate-rank`       | factors of their own, `y_j = B_j A_j x`       | r            |
| `separate-parameters` | the same, with as many numbers as `factored`  | r_s          |

    r_s = ⌊r (in + Σ out_j) / Σ (in + out_j)⌋

The separate factors are the baseline of low-rank training as it is commonly written; they are used nowhere else. They
have torch's own norm in front of them, once for all, and their outputs are joined by one copy.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor, nn

from model.config import ModelConfig, Projection, projections
from model.costs.arithmetic import training_flops_per_token
from model.gpt import EspalierModel, build_model
from model.layers.factored_linear import FactoredLinear
from model.process_groups import device
from pretrain.agreement import NO_FLAGS, agree
from pretrain.config.files import merge, parse_override
from pretrain.config.run import RunConfig, parse_config
from pretrain.engine.build import build_engine
from pretrain.engine.deepspeed_config import deepspeed_dict
from pretrain.engine.gradient_scan import set_squared_norm, squared_norm

DENSE, FACTORED, SEPARATE_RANK, SEPARATE_PARAMETERS = "dense", "factored", "separate-rank", "separate-parameters"
NAMES = (DENSE, FACTORED, SEPARATE_RANK, SEPARATE_PARAMETERS)


def contestant_config(
    name: str, model: dict[str, Any], rank: int, micro_batch: int, overrides: Sequence[str] = (), **sections: Any
) -> RunConfig:
    """The config of a contestant, with `section.key=value` laid over it; `train.compile`, which takes factored layers
    alone, does not reach the dense one. ConfigError if the sizes do not fit one another."""
    parametrization = DENSE if name == DENSE else FACTORED
    train = {"micro_batch": micro_batch, "global_batch": micro_batch, **sections.pop("train", {})}
    settings: dict[str, Any] = {
        "model": {**model, "parametrization": parametrization},
        "rank": {"initial": rank, "quantum": 1},
        "train": train,
        "data": {"prefix": "none", "tokenizer": "none"},  # the text is random tokens
        **sections,
    }
    for override in overrides:
        settings = merge(settings, parse_override(override))
    if name == DENSE:
        settings["train"].pop("compile", None)
    return parse_config(settings)


def parts_of(config: ModelConfig, projection: Projection) -> list[int]:
    """Output widths of the layers that share one `A`: q, k and v, or gate and up; one width for all others."""
    if projection.kind == "qkv":
        return [count * config.head_size for count in (config.heads, config.groups, config.groups)]
    if projection.kind == "fc1" and config.gated:
        return [config.ffn_width, config.ffn_width]
    return [projection.out_features]


def separate_rank(name: str, config: ModelConfig, projection: Projection, rank: int) -> int:
    """Rank of the factors of its own that each part of `projection` has in contestant `name`."""
    if name != SEPARATE_PARAMETERS:
        return rank
    separate = sum(projection.in_features + width for width in parts_of(config, projection))
    return max(1, rank * (projection.in_features + projection.out_features) // separate)


@dataclass
class Contestant:
    """One model with its engine, and a batch of random tokens it is trained on."""

    name: str
    rank: int | None
    parameters: int
    flops_per_token: int
    causal_flops_per_token: int
    """The same with half of the attention's."""
    engine: DeepSpeedEngine
    batch: tuple[Tensor, Tensor, Tensor]
    """Tokens, positions and labels, `(micro_batch, sequence_length)` each."""

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.batch[0].numel()

    def step(self) -> float:
        """One whole training step, as `Trainer.train_step` takes it; its loss."""
        tokens, positions, labels = self.batch
        with torch.profiler.record_function("forward"):
            loss = self.engine(tokens, positions, None, labels=labels).mean()
        with torch.profiler.record_function("backward"):
            self.engine.backward(loss)
        with torch.profiler.record_function("optimizer"):
            known = agree(loss.detach(), squared_norm(self.engine), NO_FLAGS)  # waits for the device
            set_squared_norm(self.engine, known.squared_norm)
            self.engine.step()
        return known.loss


def build_contestant(name: str, config: RunConfig) -> Contestant:
    """The model and its engine, on the present process groups."""
    ranks = config.initial_ranks()
    model = build_model(config.model, ranks, seed=config.run.seed, recompute=config.train.recompute)
    extra_flops = 0
    if name in (SEPARATE_RANK, SEPARATE_PARAMETERS):
        before = sum(parameter.numel() for parameter in model.parameters())
        separate_parts(model, name, config.rank.initial)
        # Norms count no FLOPs, and there are as many numbers in them as before.
        extra_flops = 6 * (sum(parameter.numel() for parameter in model.parameters()) - before)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    flops = training_flops_per_token(config.model, ranks) + extra_flops
    settings = deepspeed_dict(config, config.parallel_layout(1))
    engine = build_engine(model, config.optimizer, settings, compiled=config.train.compile)
    return Contestant(
        name=name,
        rank=config.rank.initial if ranks else None,
        parameters=parameters,
        flops_per_token=flops,
        causal_flops_per_token=flops - 6 * config.model.sequence_length * config.model.hidden * config.model.layers,
        engine=engine,
        batch=_random_batch(config),
    )


def _random_batch(config: RunConfig) -> tuple[Tensor, Tensor, Tensor]:
    model = config.model
    generator = torch.Generator().manual_seed(config.run.seed)
    shape = (config.train.micro_batch, model.sequence_length + 1)
    text = torch.randint(0, model.vocabulary, shape, generator=generator).to(device())
    positions = torch.arange(model.sequence_length, device=device()).expand(shape[0], -1)
    return text[:, :-1].contiguous(), positions, text[:, 1:].contiguous()


class SeparateFactors(nn.Module):
    """Factored layers with factors of their own behind one norm, their outputs joined as megatron-core expects them.

    `groups`: 1, or as many pieces as each output is cut into, to be joined piece by piece (megatron-core's order of
    q, k and v by query group).
    """

    def __init__(self, norm: nn.Module, parts: Sequence[FactoredLinear], groups: int) -> None:
        super().__init__()
        self.norm, self.parts, self.groups = norm, nn.ModuleList(parts), groups

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """`hidden (seq, batch, in)` to `(seq, batch, Σ out)`; no bias is left to the caller."""
        normed = self.norm(hidden)
        outputs = []
        for part in self.parts:
            output, bias = part(normed)
            outputs.append((output if bias is None else output + bias).unflatten(-1, (self.groups, -1)))
        return torch.cat(outputs, dim=-1).flatten(-2), None


@torch.no_grad()
def separate_parts(model: EspalierModel, name: str, rank: int) -> None:
    """Gives q, k and v (and gate and up) of a factored model factors of their own."""
    config, transformer = model.model_config, model.config
    for projection in projections(config):
        widths = parts_of(config, projection)
        if len(widths) == 1:
            continue
        own_rank = separate_rank(name, config, projection, rank)
        parts = []
        for width in widths:
            part = FactoredLinear(
                projection.in_features,
                width,
                rank=own_rank,
                config=transformer,
                bias=config.biases,
                skip_bias_add=False,
            )
            for factor in (part.A, part.B):
                nn.init.normal_(factor, std=config.initial_std)
            parts.append(part)
        norm_class = nn.LayerNorm if config.norm == "layernorm" else nn.RMSNorm
        norm = norm_class(projection.in_features, eps=config.norm_epsilon)
        layer = SeparateFactors(norm, parts, config.groups if projection.kind == "qkv" else 1)
        parent, _, child = projection.name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.to(device()))
