"""Operators counted without a GPU: their bytes and FLOPs, what takes a GPU's path, and a step of many layers by two."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from tools.benchmarks.operator_costs import (
    CARDS,
    ELEMENTWISE,
    ENDS,
    FLOOR_SECONDS,
    PRODUCTS,
    TRITON,
    Operator,
    counted_operators,
)
from tools.benchmarks.step_contestants import contestant_config
from tools.benchmarks.step_roofline import count_step, row_of

TOKENS, WIDTH, OUT = 64, 32, 48
MODEL = {"family": "gpt2", "hidden": 64, "heads": 4, "sequence_length": 32, "vocabulary": 500}


@pytest.fixture
def counted() -> Iterator[list[Operator]]:
    """Operators of a linear layer, a norm and a sum, forward and backward, in bf16."""
    with counted_operators(vocabulary=1000) as counter:
        weight = torch.zeros(OUT, WIDTH, dtype=torch.bfloat16, requires_grad=True)
        values = torch.zeros(TOKENS, WIDTH, dtype=torch.bfloat16, requires_grad=True)
        counter.phase = "forward"
        loss = nn.functional.rms_norm(nn.functional.linear(values, weight), (OUT,)).sum()
        counter.phase = "backward"
        loss.backward()
        counter.phase = None
        yield counter.operators


def test_products_read_their_operands_once_and_write_once(counted: list[Operator]) -> None:
    products = [one for one in counted if one.category == PRODUCTS]
    assert [one.phase for one in products] == ["forward", "backward", "backward"]
    numbers = TOKENS * WIDTH + OUT * WIDTH + TOKENS * OUT
    assert {one.bytes for one in products} == {2 * numbers}
    assert {one.flops for one in products} == {2 * TOKENS * WIDTH * OUT}


def test_norm_is_one_kernel_each_way(counted: list[Operator]) -> None:
    assert [one.phase for one in counted if "norm" in one.name] == ["forward", "backward"]
    assert len([one for one in counted if one.category == ELEMENTWISE]) <= 4  # and the sum


def test_small_operators_take_the_floor_and_large_ones_their_bytes() -> None:
    def operator(moved: int) -> Operator:
        return Operator("forward", "add", ELEMENTWISE, moved, 0, (), 1.0, in_fp32=False)

    assert operator(10).seconds("h100") == FLOOR_SECONDS
    large = operator(10**10)
    assert large.seconds("h100") / large.seconds("h200") == pytest.approx(CARDS["h200"][1] / CARDS["h100"][1])


def test_operators_in_place_write_what_they_read_and_copies_only_write() -> None:
    with counted_operators(vocabulary=1000) as counter:
        values, others = torch.zeros(100), torch.zeros(100)
        counter.phase = "forward"
        values.mul_(2.0)
        values.copy_(others)
        values.zero_()
        torch.exp(others, out=values)
        others.expand(50, 100).sum()
        counter.phase = None
    assert [one.bytes for one in counter.operators] == [800, 800, 400, 800, 404]


def test_waiting_for_the_device_is_counted_and_answered() -> None:
    with counted_operators(vocabulary=1000) as counter:
        counter.phase = "optimizer"
        assert float(torch.ones(()).item()) == 0.0
        assert counter.host_waits == {"optimizer": 1}


def test_vocabulary_marks_the_ends() -> None:
    with counted_operators(vocabulary=1000) as counter:
        values, weight = torch.zeros(4, 8), torch.zeros(1000, 8)
        counter.phase = "forward"
        logits = nn.functional.linear(values, weight)
        logits.exp()
        counter.phase = None
    assert {one.category for one in counter.operators} == {ENDS}


def test_triton_kernels_of_the_path_for_a_gpu_are_counted() -> None:
    triton = pytest.importorskip("triton")

    @triton.jit
    def doubled(source, target, count):
        pass

    def twice(values: Tensor) -> Tensor:
        if not values.is_cuda:
            return 2 * values
        result = torch.empty_like(values)
        doubled[(1,)](values, result, values.numel())
        return result

    with counted_operators(vocabulary=1000) as counter:
        counter.phase = "forward"
        twice(torch.zeros(10))
        counter.phase = None
    found = [one for one in counter.operators if one.category == TRITON]
    assert [(one.name, one.bytes) for one in found] == [("doubled", 80)]
    assert not torch.zeros(1).is_cuda


@pytest.mark.parametrize("kind", [pytest.param("dense", marks=pytest.mark.slow), "factored"])
def test_layers_of_a_whole_step_are_alike(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    one, two, three = (
        count_step(
            contestant_config(
                kind,
                {
                    "family": "gpt2",
                    "layers": layers,
                    "hidden": 64,
                    "heads": 4,
                    "sequence_length": 32,
                    "vocabulary": 500,
                },
                16,
                2,
                train={"precision": "bf16"},
            )
        )
        for layers in (1, 2, 3)
    )
    row = row_of(kind, one, two, 3, "h100")
    assert row["parameters"] == three.parameters
    assert row["kernels"] == len(three.operators)
    assert row["gb"] == pytest.approx(sum(operator.bytes for operator in three.operators) / 1e9, rel=1e-3)
    assert sum(phase["kernels"] for phase in row["phases"].values()) == row["kernels"]
    assert sum(category["kernels"] for category in row["categories"].values()) == row["kernels"]
    assert any(operator.name == "_fused_adamw_" for operator in three.operators)
    assert 0 < row["blocks"]["kernels"] < row["kernels"]
