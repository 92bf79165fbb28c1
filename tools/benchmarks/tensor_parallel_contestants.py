"""The contestants of `tools/benchmarks/tensor_parallel.py`: layers of equal shapes, and what a pass should send.

The baseline are factors under tensor parallelism as Megatron would split each pair of linear layers:

    y = Σ_i B_i (A_i x) + b,     A_i (rank/p, in),  B_i (out, rank/p)

A is column-parallel, B row-parallel, both along the rank. The stream is whole on every process; so the output of every
pair is all-reduced at full width forward, and the gradient of its input at full width backward (Megatron's f and g,
Shoeybi et al. 2019), and norms, attention and activations are computed alike by all processes. This is what BOOST
(arXiv 2512.12131) calls vanilla tensor parallelism. A block sends, for T tokens, in all-reduces of so many numbers

    A for each of q, k, v, gate, up:  forward T·(5·hidden + 2·ffn),  backward T·(6·hidden + ffn)
    A shared by q, k, v and by gate, up:  forward the same,          backward T·(3·hidden + ffn)

(gated MLP, as many key/value heads as heads; dense: T·2·hidden each). At ffn = 4·hidden the forward pass is 6.5 times
the dense one, the figure of the paper, which keeps an A for each.
"""

import argparse
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from torch import Tensor, nn

from model.collectives import copy_to_group
from model.config import ModelConfig, Projection, factored_projections, projections
from model.costs.communication import Collective, StepCollectives, TensorTraffic
from model.gpt import EspalierModel, build_model
from model.initialization import initial_tensor
from model.process_groups import device, tensor_index, tensor_size
from pretrain.errors import ConfigError

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
    """Width of the heads that this process computes, all together."""

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


class VanillaLinear(nn.Module):
    """`(seq, batch, in)` to `(seq, batch, out)` on every process; `widths` are the outputs that have an A of their own,
    and a collective of their own."""

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        rank: int,
        widths: Sequence[int],
        bias: bool,
        skip_bias_add: bool,
        **_megatron: object,  # what megatron-core hands to every linear layer
    ) -> None:
        super().__init__()
        share = rank // tensor_size()
        self.A = nn.ParameterList(torch.empty(share, input_size) for _ in widths)
        self.B = nn.ParameterList(torch.empty(width, share) for width in widths)
        self.bias = nn.Parameter(torch.zeros(output_size)) if bias else None
        self.skip_bias_add = skip_bias_add

    @torch.no_grad()
    def fill(self, A: Tensor, B: Tensor) -> None:
        """Takes this process's part of logical factors `A (rank, in)`, the same for all widths, and `B (out, rank)`."""
        for own, given in zip(self.B, B.split([own.shape[0] for own in self.B]), strict=True):
            own.copy_(given.chunk(tensor_size(), dim=1)[tensor_index()])
        for own in self.A:
            own.copy_(A.chunk(tensor_size(), dim=0)[tensor_index()])

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        outputs = [
            reduce_from_tensor_model_parallel_region(
                nn.functional.linear(nn.functional.linear(copy_to_group(hidden), A), B)
            )
            for A, B in zip(self.A, self.B, strict=True)
        ]
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        if self.skip_bias_add or self.bias is None:
            return output, self.bias
        return output + self.bias, None


def vanilla_layers(
    dense: EspalierModel, factored: ModelConfig, ranks: Mapping[str, int], *, seed: int, shared: bool
) -> nn.ModuleList:
    """megatron-core's transformer layers with `VanillaLinear` in them: the same function as `factored` computes.

    The specs are those of the `dense` model. Heads and MLP are whole on every process, so megatron-core is told of
    groups of one process. `shared`: q, k and v have one A, gate and up have one.
    """
    alone = ProcessGroupCollection.use_mpu_process_groups()
    alone.tp = parallel_state.get_context_parallel_group()  # one process, as there is no context parallelism
    config = copy.copy(dense.config)
    config.tensor_model_parallel_size = 1
    layers = nn.ModuleList()
    four = [projections(factored)[first : first + 4] for first in range(0, 4 * factored.layers, 4)]
    for number, (spec, linears) in enumerate(zip(dense.transformer_layer_spec.layer_specs, four, strict=True), 1):
        spec = copy.deepcopy(spec)
        attention, mlp = spec.submodules.self_attention.submodules, spec.submodules.mlp.submodules
        attention.linear_qkv, attention.linear_proj, mlp.linear_fc1, mlp.linear_fc2 = (
            ModuleSpec(VanillaLinear, params={"rank": ranks[p.name], "widths": output_widths(factored, p, shared)})
            for p in linears
        )
        layer = build_module(spec, config=config, layer_number=number, pg_collection=alone)
        for p in linears:
            shapes = {"A": (ranks[p.name], p.in_features), "B": (p.out_features, ranks[p.name])}
            whole = {side: initial_tensor(factored, f"{p.name}.{side}", shape, seed) for side, shape in shapes.items()}
            layer.get_submodule(p.name.split(".", 3)[3]).fill(**whole)
        layers.append(layer)
    return layers.to(device())


def output_widths(config: ModelConfig, projection: Projection, shared: bool) -> list[int]:
    """The outputs of a projection that have an A of their own."""
    if not shared and projection.kind == "qkv":
        return [heads * config.head_size for heads in (config.heads, config.groups, config.groups)]
    if not shared and projection.kind == "fc1" and config.gated:
        return [config.ffn_width, config.ffn_width]
    return [projection.out_features]


def vanilla_collectives(
    config: ModelConfig, projection: Projection, tokens: int, element_bytes: int, *, shared: bool
) -> StepCollectives:
    """What one projection of `vanilla_layers` sends, by the formula above."""
    sent = StepCollectives()
    for width in output_widths(config, projection, shared):
        sent.forward.append(Collective("all_reduce", "tensor", tokens * width * element_bytes))
        sent.backward.append(Collective("all_reduce", "tensor", tokens * projection.in_features * element_bytes))
    return sent
