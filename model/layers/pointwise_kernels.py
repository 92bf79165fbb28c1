"""Triton kernels of rotary positions and SwiGLU: one each way, where torch needs four to fourteen.

`model/layers/rotary.py` and `model/layers/swiglu.py` have the equations, and in torch's own operators what these are
measured by. They compute in fp32 and round what they store. Triton is loaded with this module, by CUDA tensors alone.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit
def _swiglu(inner, target, width, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real, gate_at = column < width, inner + 2 * row * width + column
    gate = tl.load(gate_at, real, 0.0).to(tl.float32)
    up = tl.load(gate_at + width, real, 0.0).to(tl.float32)
    tl.store(target + row * width + column, (gate * tl.sigmoid(gate) * up).to(target.dtype.element_ty), real)


@triton.jit
def _swiglu_gradient(inner, gradient, target, width, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real, place = column < width, 2 * row * width + column
    gate = tl.load(inner + place, real, 0.0).to(tl.float32)
    up = tl.load(inner + place + width, real, 0.0).to(tl.float32)
    outer = tl.load(gradient + row * width + column, real, 0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    of_gate = outer * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    tl.store(target + place, of_gate.to(target.dtype.element_ty), real)
    tl.store(target + place + width, (outer * gate * sigmoid).to(target.dtype.element_ty), real)


def swiglu(inner: Tensor) -> Tensor:
    """`inner (..., 2·width)`, gate before up, to `(..., width)`."""
    inner, width = inner.contiguous(), inner.shape[-1] // 2
    target = inner.new_empty(*inner.shape[:-1], width)
    _swiglu[_blocks(target)](inner, target, width, BLOCK=_BLOCK)
    return target


def swiglu_gradient(inner: Tensor, gradient: Tensor) -> Tensor:
    """Gradient of `inner (..., 2·width)`, from the gradient of the result `(..., width)`."""
    inner, gradient = inner.contiguous(), gradient.contiguous()
    target = torch.empty_like(inner)
    _swiglu_gradient[_blocks(gradient)](inner, gradient, target, gradient.shape[-1], BLOCK=_BLOCK)
    return target


def _blocks(values: Tensor) -> tuple[int, int]:
    """Rows, and blocks of one: a row and a column of its own for each program, for a GPU divides integers slowly."""
    width = values.shape[-1]
    return values.numel() // width, triton.cdiv(width, _BLOCK)


@triton.jit
def _rotate_heads(
    source, target, token, heads, half, along_seq, along_batch, along_head, cosine, sine, batch,
    HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    head, entry = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    real = (head < heads) & (entry < half)
    first_at = source + token // batch * along_seq + token % batch * along_batch + head * along_head + entry
    first = tl.load(first_at, real, 0.0).to(tl.float32)
    second = tl.load(first_at + half, real, 0.0).to(tl.float32)
    target_at = target + (token * heads + head) * (2 * half) + entry
    tl.store(target_at, (first * cosine - second * sine).to(target.dtype.element_ty), real)
    tl.store(target_at + half, (second * cosine + first * sine).to(target.dtype.element_ty), real)


@triton.jit
def _rotate(
    query, key, cosines, sines, rotated_query, rotated_key, batch, heads, groups, half,
    query_seq, query_batch, query_head, key_seq, key_batch, key_head,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    entry = tl.arange(0, HALF)
    angle = token // batch * half + entry
    cosine = tl.load(cosines + angle, entry < half, 0.0).to(tl.float32)[None, :]
    sine = tl.load(sines + angle, entry < half, 0.0).to(tl.float32)[None, :]
    _rotate_heads(
        query, rotated_query, token, heads, half, query_seq, query_batch, query_head, cosine, sine, batch, HEADS, HALF
    )
    _rotate_heads(
        key, rotated_key, token, groups, half, key_seq, key_batch, key_head, cosine, sine, batch, GROUPS, HALF
    )


def rotated(query: Tensor, key: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor]:
    """`query (seq, batch, heads, size)` and `key (seq, batch, groups, size)` of any strides, rotated into new
    tensors; `cosine` and `sine (seq, 1, 1, size/2)` are contiguous."""
    query, key = (heads if heads.stride(-1) == 1 else heads.contiguous() for heads in (query, key))
    length, batch, heads, size = query.shape
    groups, half = key.shape[2], size // 2
    output = query.new_empty(query.shape), key.new_empty(key.shape)
    _rotate[(length * batch,)](
        query, key, cosine, sine, *output, batch, heads, groups, half, *query.stride()[:3], *key.stride()[:3],
        HEADS=triton.next_power_of_2(heads), GROUPS=triton.next_power_of_2(groups), HALF=triton.next_power_of_2(half),
    )  # fmt: skip
    return output
