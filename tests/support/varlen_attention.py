"""torch's attention over variable lengths on a CPU, of which it has none: every sequence by itself, elementary.

`provide()` registers it with torch's own operators, which then take what they would take on a GPU.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.attention import varlen

_provided = False


def _sequences(bounds: Tensor, causal: bool, scale: float | None, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Attention probabilities of each sequence, then its part `(heads, length, size)` of all `tensors (tokens, heads,
    size)`, of which the first are queries and keys."""
    assert bounds.dtype == torch.int32
    assert all(tensor.shape[0] == int(bounds[-1]) and tensor.stride(-1) == 1 for tensor in tensors)
    for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        query, key, *others = (tensor[start:end].transpose(0, 1) for tensor in tensors)
        query = query * (scale or query.shape[-1] ** -0.5)
        scores = query @ key.transpose(1, 2)
        if causal:
            scores = scores.masked_fill(torch.ones(end - start, end - start, dtype=torch.bool).triu(1), -torch.inf)
        yield scores.softmax(-1), query, key, *others


def _forward(query, key, value, bounds, _same, longest, _longest, is_causal=False, scale=None, *_settings):
    assert longest >= int(bounds.diff().max())
    parts = [(own[0] @ own[3]).transpose(0, 1) for own in _sequences(bounds, is_causal, scale, query, key, value)]
    return torch.cat(parts), query.new_zeros(query.shape[1], query.shape[0]).float(), torch.zeros(2).to(torch.uint64)


def _backward(gradient, query, key, value, _out, _sums, bounds, _same, _longest, _l, is_causal, _state, scale=None, *_):
    parts = []
    for own in _sequences(bounds, is_causal, scale, query, key, value, gradient.contiguous()):
        probabilities, queries, keys, values, outer = own
        of_probabilities = outer @ values.transpose(1, 2)
        inner = probabilities * (of_probabilities - (of_probabilities * probabilities).sum(-1, keepdim=True))
        of_values = probabilities.transpose(1, 2) @ outer
        of_queries = inner @ keys * (scale or query.shape[-1] ** -0.5)
        parts.append([part.transpose(0, 1) for part in (of_queries, inner.transpose(1, 2) @ queries, of_values)])
    return tuple(torch.cat(three) for three in zip(*parts, strict=True))


def provide() -> None:
    """For this process, once and for all."""
    global _provided
    if not _provided:
        varlen._varlen_attn.register_kernel("cpu")(_forward)
        varlen._varlen_attn_backward.register_kernel("cpu")(_backward)
    _provided = True
