"""Triton's kernels against torch's own operators, forward and backward, in Triton's interpreter.

    TRITON_INTERPRET=1 python -m tests.support.interpreted_kernels  # {case: {tensor: relative difference}} as JSON

The interpreter is chosen when Triton is loaded, so this is a process of its own. `compile_for_gpus` is for a process
without it: Triton compiles for a GPU that is not there.
"""

import json
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Difference = dict[str, float]


def _differences(kernel: Callable[..., Any], plain: Callable[..., Any], leaves: Sequence[Tensor]) -> Difference:
    """Relative differences of both functions' results, and of the gradients of all `leaves` that have entries."""
    found = []
    for function in (kernel, plain):
        own = [leaf.clone().requires_grad_(leaf.numel() > 0) for leaf in leaves]
        result = function(*own)
        results: tuple[Tensor, ...] = result if isinstance(result, tuple) else (result,)
        generator = torch.Generator().manual_seed(5)
        outer = [torch.randn(r.shape, generator=generator).to(r.dtype) for r in results]
        torch.autograd.backward(results, outer)
        found.append([*results, *(leaf.grad for leaf in own if leaf.requires_grad)])
    names = [f"result {place}" for place in range(len(results))] + [f"gradient {place}" for place in range(len(leaves))]
    return {
        name: float((mine.double() - theirs.double()).norm() / theirs.double().norm())
        for name, mine, theirs in zip(names, *found, strict=False)
    }


def _norm_cases() -> dict[str, Difference]:
    from model.layers.norm_kernels import fused_scale, fused_statistics
    from model.layers.sharded_norm import local_statistics, scaled

    cases = {}
    generator = torch.Generator().manual_seed(3)
    for kind, kinds in (("rmsnorm", 1), ("layernorm", 2)):
        for dtype in (torch.float32, torch.bfloat16):
            for processes, tokens, width, rank in ((1, 3, 37, 19), (2, 17, 16, 130), (3, 4, 48, 1)):

                def draw(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
                    return torch.randn(shape, generator=generator).to(dtype)

                shard = draw(tokens, width) + 2.0
                shard[1] = 0.0
                product = draw(tokens, rank)
                statistics = draw(tokens, processes, kinds, dtype=torch.float32)
                statistics[..., -1].abs_()
                rows = draw(processes, 2 * (kinds - 1), rank)
                name = f"{kind} {str(dtype)[6:]} {processes}"
                cases[f"statistics {name}"] = _differences(
                    lambda x, kinds=kinds: fused_statistics(x, centres=kinds == 2),
                    lambda x, kind=kind: local_statistics(x, kind),
                    [shard],
                )
                cases[f"scale {name}"] = _differences(
                    lambda product, statistics, rows: fused_scale(product, statistics, rows, 1e-5),
                    lambda product, statistics, rows: scaled(product, statistics, rows, 1e-5),
                    [product, statistics, rows],
                )
    return cases


def _pointwise_cases() -> dict[str, Difference]:
    from model.layers import pointwise_kernels, rotary, swiglu

    cases = {}
    generator = torch.Generator().manual_seed(4)
    for dtype in (torch.float32, torch.bfloat16):
        inner = (2 * torch.randn(3, 5, 2 * 37, generator=generator)).to(dtype)
        mine = inner.clone().requires_grad_()
        plain = swiglu._SwiGLU.apply(mine)
        outer = torch.randn(plain.shape, generator=generator).to(dtype)
        (expected,) = torch.autograd.grad(plain, mine, outer)
        found = pointwise_kernels.swiglu(inner), pointwise_kernels.swiglu_gradient(inner, outer)
        cases[f"swiglu {str(dtype)[6:]}"] = _relative(found, (plain, expected))
        for heads, groups, size in ((4, 4, 8), (6, 2, 10)):
            mixed = torch.randn(7, 3, groups, (heads // groups + 2) * size, generator=generator).to(dtype)
            query, key, _ = mixed.split([heads // groups * size, size, size], dim=-1)
            query = query.reshape(7, 3, heads, size)
            tables = rotary.RotaryPositions(100.0, size)._up_to(query)
            rotated = rotary._rotated(query, key, *tables)
            name = f"rotary {str(dtype)[6:]} {heads}/{groups}"
            cases[name] = _relative(pointwise_kernels.rotated(query, key, *tables), rotated)
            # in the order of attention's gradients: heads outside
            query, key = (heads.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3) for heads in (query, key))
            cases[name + " back"] = _relative(pointwise_kernels.rotated(query, key, *tables), rotated)
    return cases


def _relative(found: Sequence[Tensor], expected: Sequence[Tensor]) -> Difference:
    return {
        f"result {place}": float((mine.double() - theirs.double()).norm() / theirs.double().norm())
        for place, (mine, theirs) in enumerate(zip(found, expected, strict=True))
    }


def compile_for_gpus() -> None:
    """Compiles every kernel to the machine code of an H100 (compute capability 9.0), in bf16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from model.layers import norm_kernels, pointwise_kernels

    product: dict[str, Any] = {"CENTRES": True, "PROCESSES": 2, "TOKENS": 16, "COLUMNS": 128}
    constants: dict[Any, dict[str, Any]] = {
        norm_kernels._statistics: {"CENTRES": True, "WIDTH": 1024},
        norm_kernels._statistics_gradient: {"CENTRES": True, "WIDTH": 1024},
        norm_kernels._scaled: product,
        norm_kernels._scaled_gradient: product | {"PADDED": 2},
        pointwise_kernels._swiglu: {"BLOCK": 1024},
        pointwise_kernels._swiglu_gradient: {"BLOCK": 1024},
        pointwise_kernels._rotate: {"HEADS": 16, "GROUPS": 4, "HALF": 32},
    }
    numbers = ("width", "tokens", "rank", "batch", "heads", "groups", "half", "_seq", "_batch", "_head")
    for kernel, fixed in constants.items():
        signature = {}
        for name in kernel.arg_names:
            if name in fixed:
                signature[name] = "constexpr"
            elif name == "epsilon":
                signature[name] = "fp32"
            elif name.endswith(numbers):
                signature[name] = "i32"
            else:
                signature[name] = "*fp32" if name.endswith("statistics") else "*bf16"
        source = ASTSource(kernel, signature, fixed)
        assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]


if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET") == "1"
    print(json.dumps(_norm_cases() | _pointwise_cases()))
