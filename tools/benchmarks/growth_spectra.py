"""Singular values of all layers of a GPT-2 by Gram matrices, against those of every whole product."""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from model.config import ModelConfig, factored_projections
from model.gpt import build_model
from model.process_groups import device
from model.spectrum import grams, singular_values
from pretrain.growth.spectra import measure_spectra

GPT2_LAYERS = 24
TARGET = 50.0

Row = dict[str, Any]


def spectra(arguments: argparse.Namespace) -> tuple[list[Row], Iterator[str]]:
    """A row for each kind of layer, on one process, and one for all layers over all processes."""
    hidden, rank = arguments.hidden, arguments.hidden // 4
    config = ModelConfig(family="gpt2", layers=arguments.blocks, hidden=hidden, heads=hidden // 64, vocabulary=1000)
    layers = factored_projections(config)
    model = build_model(config, {layer.name: rank for layer in layers}, seed=1).to(device())
    rows: list[Row] = []
    for kind in ("qkv", "proj", "fc1", "fc2"):
        alike = [layer for layer in layers if layer.kind == kind]
        pairs = [(_gaussian(rank, layer.in_features), _gaussian(layer.out_features, rank)) for layer in alike]
        _by_grams(*pairs[0]), _of_product(*pairs[0])  # warm up
        # In turn, so that whatever else the machine does meets both.
        ours, whole = [], []
        for _ in range(arguments.repeats):
            ours += [_seconds(_by_grams, A, B) for A, B in pairs]
            whole += [_seconds(_of_product, A, B) for A, B in pairs]
        size = {"layer": kind, "out": alike[0].out_features, "in": alike[0].in_features, "rank": rank}
        rows.append(size | _spectrum_row(ours, whole, 1.0))
    scale = GPT2_LAYERS / arguments.blocks
    measure_spectra(model)
    together = [_seconds(measure_spectra, model) for _ in range(arguments.repeats)]
    one_block = sum(row["svdvals_seconds"] for row in rows)
    total = {"layer": f"all of {GPT2_LAYERS} layers", "out": None, "in": None, "rank": rank}
    rows.append(total | _spectrum_row(together, [one_block * arguments.blocks], scale))
    return rows, _spectra_table(rows, arguments.blocks)


def _gaussian(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, device=device())


def _by_grams(A: Tensor, B: Tensor) -> Tensor:
    return singular_values([grams(A, B)])[0]


def _of_product(A: Tensor, B: Tensor) -> Tensor:
    return torch.linalg.svdvals(B @ A)


def _seconds(action: Callable[..., object], *arguments: object) -> float:
    _synchronize()
    start = time.perf_counter()
    action(*arguments)
    _synchronize()
    return time.perf_counter() - start


def _spectrum_row(ours: Sequence[float], whole: Sequence[float], scale: float) -> Row:
    ours_seconds, whole_seconds = (scale * statistics.median(seconds) for seconds in (ours, whole))
    return {
        "grams_seconds": ours_seconds,
        "grams_spread_seconds": scale * (max(ours) - min(ours)) / 2,
        "svdvals_seconds": whole_seconds,
        "svdvals_spread_seconds": scale * (max(whole) - min(whole)) / 2,
        "ratio": whole_seconds / ours_seconds,
    }


def _spectra_table(rows: Sequence[Row], blocks: int) -> Iterator[str]:
    yield "| layer | out x in | rank | Grams, seconds | svdvals of the product, seconds | ratio |"
    yield "|---|---|---|---|---|---|"
    for row in rows:
        shape = "" if row["out"] is None else f"{row['out']} x {row['in']}"
        ours, whole = (
            f"{row[f'{way}_seconds']:.4f} ± {row[f'{way}_spread_seconds']:.4f}" for way in ("grams", "svdvals")
        )
        yield f"| {row['layer']} | {shape} | {row['rank']} | {ours} | {whole} | {row['ratio']:.0f} |"
    yield ""
    yield (
        f"Target: {TARGET:.0f} for all layers. Medians and half the range; timed on {blocks} of {GPT2_LAYERS} "
        "layers. The last row is `measure_spectra` over all processes; for svdvals, which every process takes of all "
        "layers, it is the sum of the rows above."
    )


def _synchronize() -> None:
    if device().type == "cuda":
        torch.cuda.synchronize()
