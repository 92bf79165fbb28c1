"""The factored layer with its fused norm equals `B (A norm(x)) + b` computed plainly, forward and all gradients."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from model.config import NormKind
from model.gpt import _transformer_config
from model.layers.bottleneck import up
from model.layers.factored_linear import FactoredLinear
from model.layers.sharded_norm import ShardedNorm
from model.process_groups import initialize_process_groups, tensor_index
from model.sharding import TensorLayout
from tests.support.distributed import run
from tests.support.parallel_model import small_config

TOKENS, BATCH, IN, OUT, RANK = 5, 2, 32, 48, 7


def _values(offset: float) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(11)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "x": draw(TOKENS, BATCH, IN) + offset,
        "A": draw(RANK, IN),
        "B": draw(OUT, RANK),
        "norm_weight": 1 + 0.3 * draw(IN),
        "norm_bias": 0.3 * draw(IN),
        "bias": draw(OUT),
        "output_gradient": draw(TOKENS, BATCH, OUT),
    }


def _layouts(stride: int) -> dict[str, TensorLayout]:
    return {
        "x": TensorLayout((TOKENS, BATCH, IN), 2),
        "A": TensorLayout((RANK, IN), 1),
        "B": TensorLayout((OUT, RANK), 0, stride),
        "norm_weight": TensorLayout((IN,), 0),
        "norm_bias": TensorLayout((IN,), 0),
        "bias": TensorLayout((OUT,), 0, stride),
        "output_gradient": TensorLayout((TOKENS, BATCH, OUT), 2, stride),
    }


def _plain(values: dict[str, Tensor], norm: str | None) -> dict[str, Tensor]:
    leaves = {name: value.double().requires_grad_() for name, value in values.items() if name != "output_gradient"}
    x = leaves["x"]
    if norm == "rmsnorm":
        x = leaves["norm_weight"] * x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    elif norm == "layernorm":
        x = nn.functional.layer_norm(x, (IN,), leaves["norm_weight"], leaves["norm_bias"], 1e-5)
    y = x @ (leaves["B"] @ leaves["A"]).T + leaves["bias"]
    y.backward(values["output_gradient"].double())
    return {"y": y.detach(), **{name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}}


def _sharded(
    processes: int, norm: NormKind | None, stride: int, offset: float, dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, TensorLayout]]:
    initialize_process_groups(processes)
    config = _transformer_config(small_config("llama", "factored"))
    layer = FactoredLinear(
        IN,
        OUT,
        rank=RANK,
        config=config,
        bias=True,
        skip_bias_add=False,
        norm=norm,
        stride=stride,
    )
    layouts = _layouts(stride)
    shards = {k: layouts[k].shard(v, tensor_index(), processes) for k, v in _values(offset).items()}
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.copy_(shards[name])
    layer.to(dtype)
    x = shards["x"].to(dtype).requires_grad_()
    y, none = layer(x)
    assert none is None
    y.backward(shards["output_gradient"].to(dtype))
    found = {"y": y.detach(), "x": x.grad, **{name: p.grad for name, p in layer.named_parameters()}}
    return {name: value.float() for name, value in found.items() if value is not None}, layouts


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize(("norm", "offset"), [(None, 0.0), ("rmsnorm", 0.0), ("layernorm", 0.0), ("layernorm", 30.0)])
def test_layer_equals_plain_product(processes: int, norm: str | None, offset: float) -> None:
    stride = 2
    expected = _plain(_values(offset), norm)
    everyone = run(_sharded, processes, processes, norm, stride, offset, torch.float32)
    layouts = everyone[0][1] | {"y": TensorLayout((TOKENS, BATCH, OUT), 2, stride)}
    # A mean 30 standard deviations away costs the digits that fp32 spends on it, in any implementation.
    tolerance = 1e-5 if offset == 0.0 else 1e-4
    for name, value in expected.items():
        found = layouts[name].unshard([one[0][name] for one in everyone]).double()
        assert (found - value).norm() <= tolerance * value.norm(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
def test_sixteen_bit_statistics_are_exact_enough(norm: str, dtype: torch.dtype) -> None:
    """Two processes differ from one by rounding alone, and a stream of size 300 overflows no sum of squares."""
    for offset in (0.0, 300.0):
        alone = run(_sharded, 1, 1, norm, 1, offset, dtype)[0][0]["y"]
        pair = run(_sharded, 2, 2, norm, 1, offset, dtype)
        both = torch.cat([one[0]["y"] for one in pair], dim=-1)
        assert torch.isfinite(both).all()
        assert (both - alone).norm() <= 4 * torch.finfo(dtype).eps * alone.norm() * (1 if offset == 0.0 else 30)


def _alone(norm: NormKind, dtype: torch.dtype) -> dict[str, float]:
    """Errors of a layer's output and all its gradients over 2000 tokens, one of them zero, in units of `dtype`'s last
    place, by fp64."""
    initialize_process_groups(1)
    layer = FactoredLinear(
        IN, OUT, rank=RANK, config=_transformer_config(small_config("gpt2")), bias=True, norm=norm
    ).to(dtype)
    generator = torch.Generator().manual_seed(2)
    values = {name: torch.randn(p.shape, generator=generator).to(dtype) for name, p in layer.named_parameters()}
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.copy_(values[name])
    x = torch.randn(1000, 2, IN, generator=generator).to(dtype)
    x[0, 0] = 0.0
    outer = torch.randn(1000, 2, OUT, generator=generator).to(dtype)
    expected = _plain(values | {"x": x, "output_gradient": outer}, norm)
    y, _ = layer(x.requires_grad_())
    y.backward(outer)
    found = {"y": y.detach(), "x": x.grad, **{name: p.grad for name, p in layer.named_parameters()}}
    errors = {}
    for name, value in found.items():
        assert value is not None
        assert value.dtype == dtype
        errors[name] = float((value.double() - expected[name]).norm() / expected[name].norm()) / torch.finfo(dtype).eps
    return errors


@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
def test_sums_over_many_tokens_lose_no_digits_in_sixteen_bits(norm: str) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        (errors,) = run(_alone, 1, norm, dtype)
        assert all(error <= 1.5 for error in errors.values()), errors


class _Log(TorchDispatchMode):
    """Names of the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def _backward_of_up() -> list[str]:
    """What happens from the start of the all-reduce to its end."""
    initialize_process_groups(2)
    B, bias = torch.ones(OUT, RANK, requires_grad=True), torch.ones(OUT, requires_grad=True)
    output = up(torch.ones(TOKENS, RANK, requires_grad=True), B, bias)
    log, wait = _Log(), dist.Work.wait

    def waiting(work: dist.Work, *arguments: Any) -> bool:
        log.names.append("wait")
        return wait(work, *arguments)

    dist.Work.wait = waiting  # type: ignore[method-assign,assignment]
    try:
        with log:
            output.backward(torch.ones_like(output))
    finally:
        dist.Work.wait = wait  # type: ignore[method-assign]
    assert B.grad is not None
    assert B.grad.is_contiguous()
    return log.names[log.names.index("allreduce_") : log.names.index("wait") + 1]


def test_gradients_of_B_and_bias_are_computed_while_that_of_the_bottleneck_travels() -> None:
    for happened in run(_backward_of_up, 2):
        assert [name for name in happened if name in ("allreduce_", "mm", "sum", "wait")] == [
            "allreduce_",
            "mm",
            "sum",
            "wait",
        ]


def _norm_alone(processes: int, kind: NormKind) -> tuple[Tensor, Tensor, Tensor]:
    initialize_process_groups(processes)
    values = _values(0.0)
    layout = TensorLayout((TOKENS, BATCH, IN), 2)
    norm = ShardedNorm(kind, IN, 1e-5)
    with torch.no_grad():
        norm.weight.copy_(values["norm_weight"].chunk(processes)[dist.get_rank()])
    x = layout.shard(values["x"], dist.get_rank(), processes).clone().requires_grad_()
    gradient = layout.shard(values["output_gradient"][..., :IN], dist.get_rank(), processes)
    y = norm(x)
    y.backward(gradient)
    assert x.grad is not None
    assert norm.weight.grad is not None
    return y.detach(), x.grad, norm.weight.grad


@pytest.mark.parametrize("kind", ["rmsnorm", "layernorm"])
def test_sharded_norm_equals_plain_norm(kind: str) -> None:
    values = _values(0.0)
    x, weight = values["x"].requires_grad_(), values["norm_weight"].requires_grad_()
    if kind == "rmsnorm":
        y = nn.functional.rms_norm(x, (IN,), weight, 1e-5)
    else:
        y = nn.functional.layer_norm(x, (IN,), weight, None, 1e-5)
    y.backward(values["output_gradient"][..., :IN])
    for processes in (1, 4):
        found = [torch.cat(parts, dim=-1) for parts in zip(*run(_norm_alone, processes, processes, kind), strict=True)]
        for mine, plain in zip(found, (y.detach(), x.grad, weight.grad), strict=True):
            assert plain is not None
            assert (mine - plain).norm() <= 1e-5 * plain.norm()
