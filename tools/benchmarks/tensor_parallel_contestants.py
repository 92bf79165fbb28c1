"""The contestants of `tools/benchmarks/tensor_parallel.py`: layers of equal shapes, and what a pass should send."""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.config import ModelConfig, Projection, factored_projections, projections
from model.costs.communication import StepCollectives, TensorTraffic
from model.gpt import build_model
from model.process_groups import device, tensor_index, tensor_size
from pretrain.errors import ConfigError
from tools.benchmarks.vanilla_low_rank import vanilla_collectives, vanilla_layers

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SEED = 1
HEAD_SIZE = 64


@dataclass
class Contestant:
    """Layers of one kind, and what a pass through them should send."""

    name: str
    layers: Sequence[nn.Module]
    stream: Tensor
    """Input `(seq, batch, hidden)`, or `(seq, batch, hidden/tp)`, that wants a gradient."""
    expected: StepCollectives
    attention_width: int
    """Of the heads that this process computes."""

    def run(self) -> Iterator[Tensor]:
        """Forward and backward; yields the output after each."""
        self.stream.grad = None
        for layer in self.layers:
            for parameter in layer.parameters():
                parameter.grad = None
        output = self.stream
        for layer in self.layers:
            output, _ = layer(output, attention_mask=None)
        yield output
        output.backward(torch.ones_like(output))
        yield output

    def flops(self) -> int:
        sequence, batch, _ = self.stream.shape
        entries = sum(p.numel() for layer in self.layers for p in layer.parameters() if p.dim() == 2)
        return sequence * batch * (6 * entries + 12 * sequence * self.attention_width * len(self.layers))


def build_contestants(arguments: argparse.Namespace, hidden: int) -> list[Contestant]:
    """Dense, both vanilla ones, and ours as the last; the low-rank ones have the same values."""
    settings = {
        "family": arguments.family,
        "layers": arguments.layers,
        "hidden": hidden,
        "heads": max(hidden // HEAD_SIZE, tensor_size()),
        "sequence_length": arguments.sequence,
        "vocabulary": 128,
    }
    config = ModelConfig.model_validate(settings | {"parametrization": "factored"})
    _check_sizes(config, arguments)
    ranks = {projection.name: hidden // arguments.rank_divisor for projection in factored_projections(config)}
    dense_config = config.model_copy(update={"parametrization": "dense"})
    dense = build_model(dense_config, {}, seed=SEED).to(device())
    ours = build_model(config, ranks, seed=SEED).to(device())
    dtype, processes = DTYPES[arguments.dtype], tensor_size()
    tokens = arguments.micro_batch * arguments.sequence
    generator = torch.Generator().manual_seed(SEED)
    whole = torch.randn(arguments.sequence, arguments.micro_batch, hidden, generator=generator)
    shard = whole.chunk(processes, dim=-1)[tensor_index()].contiguous()

    def contestant(
        name: str, layers: nn.ModuleList, stream: Tensor, width: int, traffic: Callable[[Projection], StepCollectives]
    ) -> Contestant:
        expected = StepCollectives()
        for projection in projections(config):
            expected.add(traffic(projection))
        stream = stream.to(device(), dtype).requires_grad_()
        return Contestant(name, list(layers.to(dtype)), stream, expected, width)

    def vanilla(shared: bool) -> Contestant:
        layers = vanilla_layers(dense, config, ranks, seed=SEED, shared=shared)
        name = "vanilla_shared" if shared else "vanilla"
        return contestant(
            name,
            layers,
            whole,
            hidden,
            lambda projection: vanilla_collectives(config, projection, tokens, dtype.itemsize, shared=shared),
        )

    whole_stream = TensorTraffic(dense_config, processes, tokens, dtype.itemsize)
    split_stream = TensorTraffic(config, processes, tokens, dtype.itemsize)
    return [
        contestant(
            "dense", dense.decoder.layers, whole, hidden // processes, lambda p: whole_stream.projection(p, None)
        ),
        vanilla(shared=False),
        vanilla(shared=True),
        contestant(
            "factored",
            ours.decoder.layers,
            shard,
            hidden // processes,
            lambda p: split_stream.projection(p, ranks[p.name]),
        ),
    ]


def _check_sizes(config: ModelConfig, arguments: argparse.Namespace) -> None:
    """ConfigError for what cannot be split; all contestants must be able to."""
    processes, rank = tensor_size(), config.hidden // arguments.rank_divisor
    if processes == 1:
        raise ConfigError("there is no tensor parallelism with one process: start two or more")
    for what, size in (("heads", config.heads), ("inner width", config.ffn_width), ("rank", rank)):
        if size < processes or size % processes:
            raise ConfigError(f"{what} {size} does not divide over {processes} processes: change --hidden")
