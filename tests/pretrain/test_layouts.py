"""Whole runs: the same curve on every layout."""

from pathlib import Path
from typing import Any

import pytest

from tests.support.training_runs import (
    curve,
    train,
    twenty_steps,
)

LAYOUTS = [(2, 2, 0, False), (2, 2, 2, True), (4, 4, 1, False), (2, 1, 1, False), (4, 2, 3, False)]
"""Processes, tensor-parallel size, ZeRO stage, optimizer offloaded."""
ALL_LAYOUTS = [
    *LAYOUTS,
    *(
        (data * tensor, tensor, stage, offload)
        for data in (1, 2)
        for tensor in (1, 2, 4)
        for stage in (0, 1, 2, 3)
        for offload in (False, True)
        if data * tensor <= 4 and (stage or not offload) and (data * tensor, tensor, stage, offload) not in LAYOUTS
    ),
]
VARIANTS = [("llama", "factored", "all"), ("gpt2", "factored", "mlp")]
ALL_VARIANTS = [
    (family, parametrization, factored_layers)
    for family in ("llama", "gpt2")
    for parametrization, factored_layers in (
        ("factored", "all"),
        ("factored", "mlp"),
        ("additive", "all"),
        ("additive", "mlp"),
        ("dense", "all"),
    )
]
CURVES = [
    *((VARIANTS[0], layout) for layout in LAYOUTS),
    (VARIANTS[1], LAYOUTS[2]),
    (("llama", "additive", "all"), (4, 2, 2, False)),
    (("gpt2", "additive", "all"), (2, 1, 3, True)),
]
ALL_CURVES = [
    *CURVES,
    *(
        pytest.param(variant, layout, marks=pytest.mark.matrix)
        for variant in ALL_VARIANTS
        for layout in ALL_LAYOUTS
        if (variant, layout) not in CURVES
    ),
]
"""Variant and layout; by default a sample that spans both."""


@pytest.fixture(scope="module")
def alone(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Curves of one process and ZeRO 1, by variant."""
    curves: dict[tuple[str, str, str], list[dict[str, Any]]] = {}

    def of(family: str, parametrization: str, factored_layers: str) -> list[dict[str, Any]]:
        key = (family, parametrization, factored_layers)
        if key not in curves:
            folder = tmp_path_factory.mktemp("alone") / "run"
            curves[key] = curve(train(corpus, folder, 1, **twenty_steps(*key)))
        return curves[key]

    return of


@pytest.mark.parametrize(("variant", "layout"), ALL_CURVES)
def test_every_layout_gives_the_same_curve(
    corpus: Path, tmp_path: Path, alone: Any, variant: tuple[str, str, str], layout: tuple[int, int, int, bool]
) -> None:
    """Losses and gradient norms of 20 steps with two growth events."""
    processes, tensor, stage, offload = layout
    sections = twenty_steps(*variant)
    overrides = [f"parallel.tensor={tensor}", f"deepspeed.stage={stage}", f"deepspeed.offload_optimizer={offload}"]
    found = curve(train(corpus, tmp_path / "run", processes, *overrides, **sections))
    expected = alone(*variant)
    assert [line["step"] for line in found] == list(range(1, 21))
    for mine, other in zip(found, expected, strict=True):
        assert mine["mean_rank"] == other["mean_rank"]
        assert mine["lm_loss"] == pytest.approx(other["lm_loss"], rel=1e-5)
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)
