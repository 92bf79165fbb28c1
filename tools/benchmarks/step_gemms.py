"""The matrix products of a layer alone: what a whole step could reach if nothing else took time.

Dense `y = W x` against `y = B (A x)` for the projections of one transformer layer, forward and backward (gradients of
input and weights), at the token count of a step:

    FLOP ratio = Σ in·out / Σ r (in + out)

`W x` is one large GEMM; `A x` and `B h` are thinner, read and write more per FLOP, and reach less of the processor.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from model.config import ModelConfig, Projection, projections
from model.process_groups import device
from tools.benchmarks.step_report import spread, synchronize

PairOfRank = int | None
"""A pair of factors by its rank; None stands for the dense weight."""


class LayerGemms:
    """Weights and inputs of the projections of one layer."""

    def __init__(self, config: ModelConfig, rank: PairOfRank, tokens: int, dtype: torch.dtype) -> None:
        self.rank = rank
        generator = torch.Generator().manual_seed(1)

        def matrix(rows: int, columns: int) -> Tensor:
            return torch.randn(rows, columns, generator=generator).to(device(), dtype)

        self.cases: list[tuple[Tensor, list[Tensor], Tensor]] = []
        for projection in layer_projections(config):
            width, out = projection.in_features, projection.out_features
            shapes = [(out, width)] if rank is None else [(rank, width), (out, rank)]
            weights = [matrix(*shape).requires_grad_() for shape in shapes]
            self.cases.append((matrix(tokens, width).requires_grad_(), weights, matrix(tokens, out)))
        self.flops = 6 * tokens * sum(weight.numel() for _, weights, _ in self.cases for weight in weights)

    def run(self) -> None:
        """Forward and backward of all of them."""
        for values, weights, gradient in self.cases:
            output = values
            for weight in weights:
                output = nn.functional.linear(output, weight)
            torch.autograd.grad(output, [values, *weights], gradient)


def layer_projections(config: ModelConfig) -> list[Projection]:
    return [projection for projection in projections(config) if projection.layer == 0]


def time_gemms(
    config: ModelConfig, tokens: int, dtype: torch.dtype, warm_up: int, repeats: int, *, ranks: Sequence[PairOfRank]
) -> list[dict[str, Any]]:
    """A row for each rank (None: dense), one after the other and all of them again."""
    layers = [LayerGemms(config, rank, tokens, dtype) for rank in ranks]
    seconds: list[list[float]] = [[] for _ in layers]
    for repeat in range(warm_up + repeats):
        for layer, samples in zip(layers, seconds, strict=True):
            synchronize()
            start = time.perf_counter()
            layer.run()
            synchronize()
            if repeat >= warm_up:
                samples.append(time.perf_counter() - start)
    return [
        {
            "name": "GEMMs, dense" if layer.rank is None else "GEMM pairs",
            "rank": layer.rank,
            "flops": layer.flops,
            **spread(samples),
        }
        for layer, samples in zip(layers, seconds, strict=True)
    ]


def rank_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of `time_gemms` with what a direction costs at each rank, against the cheapest rank."""
    cheapest = min(row["median_seconds"] / row["rank"] for row in rows)
    return [
        {
            "rank": row["rank"],
            **{key: row[key] for key in ("median_seconds", "first_quartile_seconds", "third_quartile_seconds")},
            "tflops": row["flops"] / row["median_seconds"] / 1e12,
            "cost_of_a_direction": row["median_seconds"] / row["rank"] / cheapest,
        }
        for row in rows
    ]
