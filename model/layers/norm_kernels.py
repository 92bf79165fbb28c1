"""Triton kernels of a norm around a product: its statistics and what they do to the product, one kernel each way.

`model/layers/sharded_norm.py` has the equations, and in torch's own operators what these are measured by. They compute
in fp32, and rank and tokens are run-time numbers: a rank that grows compiles nothing anew. Triton is loaded with this
module, by CUDA tensors alone.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_TOKENS, _COLUMNS = 16, 128
"""Block of the product that a program works on at a time."""


@triton.jit
def _statistics(values, statistics, centred, width, CENTRES: tl.constexpr, WIDTH: tl.constexpr):
    """One row: its rms; or its mean, the row without it, and the standard deviation of what is stored."""
    token = tl.program_id(0).to(tl.int64)
    entry = tl.arange(0, WIDTH)
    real = entry < width
    row = tl.load(values + token * width + entry, real, 0.0).to(tl.float32)
    if CENTRES:
        mean = tl.sum(row) / width
        stored = (row - mean).to(centred.dtype.element_ty)
        tl.store(centred + token * width + entry, stored, real)
        tl.store(statistics + 2 * token, mean)
        row = tl.where(real, stored.to(tl.float32), 0.0)
        tl.store(statistics + 2 * token + 1, tl.sqrt(tl.sum(row * row) / width))
    else:
        tl.store(statistics + token, tl.sqrt(tl.sum(row * row) / width))


@triton.jit
def _statistics_gradient(
    values, statistics, of_statistics, of_values, target, width, CENTRES: tl.constexpr, WIDTH: tl.constexpr
):
    """One row of `values` as the product took them; its spread has no gradient where it is zero."""
    token = tl.program_id(0).to(tl.int64)
    entry = tl.arange(0, WIDTH)
    real, at = entry < width, token * width + entry
    row = tl.load(values + at, real, 0.0).to(tl.float32)
    gradient = tl.load(of_values + at, real, 0.0).to(tl.float32)
    last = 2 * token + 1 if CENTRES else token
    spread = tl.load(statistics + last)
    share = tl.where(spread > 0.0, tl.load(of_statistics + last) / (tl.where(spread > 0.0, spread, 1.0) * width), 0.0)
    gradient += share * row
    if CENTRES:
        gradient += (tl.load(of_statistics + 2 * token) - tl.sum(gradient)) / width
    tl.store(target + at, gradient.to(target.dtype.element_ty), real)


@triton.jit
def _mean_and_scale(statistics, token, real, epsilon, CENTRES: tl.constexpr, PROCESSES: tl.constexpr):
    """Mean and 1/spread of a block of rows, from the statistics of all processes."""
    mean = tl.zeros_like(token).to(tl.float32)
    spread = tl.zeros_like(mean)
    kinds: tl.constexpr = 2 if CENTRES else 1
    at = statistics + token * (PROCESSES * kinds)
    for process in tl.static_range(PROCESSES):
        if CENTRES:
            mean += tl.load(at + 2 * process, real, 0.0) / PROCESSES
        own = tl.load(at + kinds * process + kinds - 1, real, 0.0)
        spread += own * own / PROCESSES
    if CENTRES:
        for process in tl.static_range(PROCESSES):
            away = tl.load(at + 2 * process, real, 0.0) - mean
            spread += away * away / PROCESSES
    return mean, tl.rsqrt(spread + epsilon)


@triton.jit
def _scaled(
    product, statistics, rows, target, tokens, rank, epsilon,
    CENTRES: tl.constexpr, PROCESSES: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    real, inside = token < tokens, column < rank
    mean, scale = _mean_and_scale(statistics, token, real, epsilon, CENTRES, PROCESSES)
    at, both = token[:, None] * rank + column[None, :], real[:, None] & inside[None, :]
    block = tl.load(product + at, both, 0.0).to(tl.float32)
    shift = tl.zeros_like(column).to(tl.float32)
    if CENTRES:
        for process in tl.static_range(PROCESSES):
            away = tl.load(statistics + (token * PROCESSES + process) * 2, real, 0.0) - mean
            block += away[:, None] * tl.load(rows + 2 * process * rank + column, inside, 0.0).to(tl.float32)[None, :]
            shift += tl.load(rows + (2 * process + 1) * rank + column, inside, 0.0).to(tl.float32)
    tl.store(target + at, (block * scale[:, None] + shift[None, :]).to(target.dtype.element_ty), both)


@triton.jit
def _scaled_gradient(
    product, statistics, rows, gradient, of_product, of_statistics, weights, tokens, rank, epsilon,
    CENTRES: tl.constexpr, PROCESSES: tl.constexpr, PADDED: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A block of rows over all columns. `weights (tokens, tp)` says how much of each row's gradient goes to `rows`."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    real, process_of = token < tokens, tl.arange(0, PADDED)[None, :]
    mean, scale = _mean_and_scale(statistics, token, real, epsilon, CENTRES, PROCESSES)
    of_scale = tl.zeros_like(mean)
    of_away = tl.zeros([TOKENS, PADDED], tl.float32)
    for start in range(0, rank, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = column < rank
        at, both = token[:, None] * rank + column[None, :], real[:, None] & inside[None, :]
        block = tl.load(product + at, both, 0.0).to(tl.float32)
        outer = tl.load(gradient + at, both, 0.0).to(tl.float32)
        inner = outer * scale[:, None]
        tl.store(of_product + at, inner.to(of_product.dtype.element_ty), both)
        if CENTRES:
            for process in tl.static_range(PROCESSES):
                away = tl.load(statistics + (token * PROCESSES + process) * 2, real, 0.0) - mean
                row = tl.load(rows + 2 * process * rank + column, inside, 0.0).to(tl.float32)[None, :]
                block += away[:, None] * row
                of_away += tl.where(process_of == process, tl.sum(inner * row, axis=1)[:, None], 0.0)
        of_scale += tl.sum(outer * block, axis=1)
    of_spread = -scale * scale * scale * of_scale / PROCESSES  # of half the mean square, for one process
    of_mean = tl.sum(of_away, axis=1) / PROCESSES
    for process in tl.static_range(PROCESSES):
        if CENTRES:
            at_process = (token * PROCESSES + process) * 2
            away = tl.load(statistics + at_process, real, 0.0) - mean
            own = tl.sum(tl.where(process_of == process, of_away, 0.0), axis=1)
            tl.store(of_statistics + at_process, own - of_mean + of_spread * away, real)
            own = tl.load(statistics + at_process + 1, real, 0.0)
            tl.store(of_statistics + at_process + 1, of_spread * own, real)
            tl.store(weights + token * PROCESSES + process, (away * scale).to(weights.dtype.element_ty), real)
        else:
            at_process = token * PROCESSES + process
            tl.store(of_statistics + at_process, of_spread * tl.load(statistics + at_process, real, 0.0), real)


def _whole_row(width: int) -> dict[str, int]:
    """A block that holds a row, and warps for it: 32 threads with some 16 entries each."""
    block = triton.next_power_of_2(width)
    return {"WIDTH": block, "num_warps": min(max(block // 512, 4), 16)}


class _FusedStatistics(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shard: Tensor, centres: bool) -> tuple[Tensor, Tensor]:
        tokens, width = shard.shape
        shard = shard.contiguous()
        statistics = shard.new_empty(tokens, 2 if centres else 1, dtype=torch.float32)
        values = torch.empty_like(shard) if centres else shard
        _statistics[(tokens,)](shard, statistics, values, width, CENTRES=centres, **_whole_row(width))
        ctx.centres = centres
        ctx.save_for_backward(values, statistics)
        return statistics, values if centres else values.view_as(values)

    @staticmethod
    def backward(ctx: Any, of_statistics: Tensor, of_values: Tensor) -> tuple[Tensor, None]:
        values, statistics = ctx.saved_tensors
        tokens, width = values.shape
        target = torch.empty_like(values)
        _statistics_gradient[(tokens,)](
            values,
            statistics,
            of_statistics.contiguous(),
            of_values.contiguous(),
            target,
            width,
            CENTRES=ctx.centres,
            **_whole_row(width),
        )
        return target, None


class _FusedScale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, product: Tensor, statistics: Tensor, rows: Tensor, epsilon: float) -> Tensor:
        (tokens, rank), (_, processes, kinds) = product.shape, statistics.shape
        product, statistics, rows = product.contiguous(), statistics.contiguous(), rows.contiguous()
        target = torch.empty_like(product)
        _scaled[(triton.cdiv(tokens, _TOKENS), triton.cdiv(rank, _COLUMNS))](
            product, statistics, rows, target, tokens, rank, epsilon,
            CENTRES=kinds == 2, PROCESSES=processes, TOKENS=_TOKENS, COLUMNS=_COLUMNS,
        )  # fmt: skip
        ctx.epsilon = epsilon
        ctx.save_for_backward(product, statistics, rows)
        return target

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        product, statistics, rows = ctx.saved_tensors
        (tokens, rank), (_, processes, kinds) = product.shape, statistics.shape
        gradient, centres = gradient.contiguous(), kinds == 2
        of_product, of_statistics = torch.empty_like(product), torch.empty_like(statistics)
        weights = gradient.new_empty(tokens if centres else 0, processes)
        _scaled_gradient[(triton.cdiv(tokens, _TOKENS),)](
            product, statistics, rows, gradient, of_product, of_statistics, weights, tokens, rank, ctx.epsilon,
            CENTRES=centres, PROCESSES=processes, PADDED=triton.next_power_of_2(processes),
            TOKENS=_TOKENS, COLUMNS=_COLUMNS,
        )  # fmt: skip
        if not centres:
            return of_product, of_statistics, None, None
        of_rows = torch.stack([weights.t() @ gradient, gradient.sum(dim=0).expand(processes, rank)], dim=1)
        return of_product, of_statistics, of_rows, None


def fused_statistics(shard: Tensor, *, centres: bool) -> tuple[Tensor, Tensor]:
    """`local_statistics` of `shard (tokens, width/tp)`: `(tokens, 1)` or, where it centres, `(tokens, 2)` in fp32, and
    the shard as the product takes it."""
    return _FusedStatistics.apply(shard, centres)


def fused_scale(product: Tensor, statistics: Tensor, rows: Tensor, epsilon: float) -> Tensor:
    """The normed product `(tokens, rank)` from the product, the `statistics (tokens, tp, k)` and, where these have
    means, the `rows (tp, 2, rank)` of all processes."""
    return _FusedScale.apply(product, statistics, rows, epsilon)
