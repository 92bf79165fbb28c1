"""How long a step computes, with an efficiency for every matrix product by its shape.

A product of T tokens, `in` and `out` takes three multiplications in forward and backward pass, which read and write the
same three matrices, e bytes a number. Each is priced as

    flops(in, out) = max(2·T·⌈in⌉·⌈out⌉, balance · e·(T·in + T·out + in·out)),      ⌈x⌉ = x up to a multiple of 64

since tensor cores work on whole tiles, and since a thin product, such as a factor of low rank, waits for memory:
`balance` is the number of FLOPs that a device does while it moves a byte. So

    step = (product_share · Σ priced FLOPs + (1 - product_share) · FLOPs of the dense model) / (efficiency · peak)

The first term is products and attention, the second what lies between them: norms, loss, optimizer. The second is
assumed to be the same in a factored model as in the dense one, since it does not shrink with the products (only the
optimizer does). For the dense model with large matrices the step is FLOPs / (efficiency · peak). This is a model, not a
measurement; it leaves out the waves in which tiles fill a device.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from model.config import ModelConfig, Projection, Recompute, projections, round_up
from pretrain.planning.memory import Setup

TILE = 64
PRODUCTS_AT_PEAK, MEMORY_AT_PEAK = 0.66, 0.8
"""Shares of a data sheet's figures that large products and long copies reach, assumed for `balance`."""


@dataclass(frozen=True)
class Arithmetic:
    """What is assumed of a device that computes."""

    peak_flops: float
    efficiency: float
    """Share of the peak that a step of the dense model reaches."""
    memory_bytes_per_second: float
    """Speed of the device's own memory."""
    product_share: float
    """Share of the dense model's step that products and attention take."""

    @property
    def balance(self) -> float:
        """FLOPs that the device does while it moves one byte."""
        return PRODUCTS_AT_PEAK * self.peak_flops / (MEMORY_AT_PEAK * self.memory_bytes_per_second)


@dataclass(frozen=True)
class _Product:
    """A weight `(outputs, inputs)` of one process, and how often a token passes through it."""

    inputs: int
    outputs: int
    passes: int
    """Multiplications: forward, input gradient, weight gradient (unless the weight is frozen), and recomputation."""

    def priced_flops(self, tokens: int, element_bytes: int, balance: float) -> float:
        whole = 2.0 * tokens * round_up(self.inputs, TILE) * round_up(self.outputs, TILE)
        moved = tokens * (self.inputs + self.outputs) + self.inputs * self.outputs
        return self.passes * max(whole, balance * element_bytes * moved)


def compute_seconds(
    model: ModelConfig, ranks: Mapping[str, int], setup: Setup, arithmetic: Arithmetic, dense_flops_per_token: int
) -> float:
    """Seconds that one process computes in one step.

    `dense_flops_per_token`: FLOPs of the dense model, recomputation included.
    """
    tokens, tensor = setup.micro_batch * model.sequence_length, setup.layout.tensor
    priced = sum(
        product.priced_flops(tokens, setup.element_bytes, arithmetic.balance)
        for product in _products(model, ranks, tensor, setup.recompute)
    )
    attention_passes = 12 + (4 if setup.recompute != "none" else 0)
    priced += attention_passes * tokens * model.sequence_length * model.hidden * model.layers / tensor
    between = tokens * dense_flops_per_token / tensor
    share = arithmetic.product_share
    flops = setup.layout.accumulation * (share * priced + (1.0 - share) * between)
    return flops / (arithmetic.peak_flops * arithmetic.efficiency)


def _products(model: ModelConfig, ranks: Mapping[str, int], tensor: int, recompute: Recompute) -> Iterator[_Product]:
    """Products of one process: all projections of the stack, and the output layer."""
    for projection in projections(model):
        yield from _layer_products(projection, ranks.get(projection.name), tensor, recompute)
    trained = not (ranks and model.trained == "factors")
    yield _Product(model.hidden, model.padded_vocabulary // tensor, 3 if trained else 2)


def _layer_products(projection: Projection, rank: int | None, tensor: int, recompute: Recompute) -> Iterator[_Product]:
    """Products of one projection: the weight, both factors, or all three; split as `model/` splits them."""
    again = 0 if recompute == "none" else 1
    inputs, outputs = projection.in_features, projection.out_features
    if projection.kind in ("qkv", "fc1"):  # column-parallel
        whole = (inputs, max(1, outputs // tensor))
    else:
        whole = (max(1, inputs // tensor), outputs)
    if rank is None:
        yield _Product(*whole, 3 + again)
        return
    if projection.additive:
        yield _Product(*whole, 2 + again)
        inputs, outputs = whole
    else:
        inputs, outputs = inputs // tensor, outputs // tensor
    yield _Product(inputs, rank, 3 + (again if recompute == "layers" else 0))
    yield _Product(rank, outputs, 3 + again)
