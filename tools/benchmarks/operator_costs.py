"""The operators that a piece of code starts, each with the bytes and FLOPs a GPU would move and compute for it.

    seconds of an operator = max(FLOOR, FLOPs / (peak · share of peak), bytes / (bandwidth · share of bandwidth))

Nothing is computed: tensors are fake (`FakeTensorMode`), so a model of any size needs no memory. They are fake tensors
of the host, for torch 2.13 without CUDA cannot build an autograd graph on fake CUDA tensors ("PyTorch is not linked
with support for cuda devices"); yet `tensor.is_cuda` is answered with yes, so that code takes its paths for a GPU:

- a Triton kernel is not run but counted, with one pass over each of its tensors
- `rms_norm` is one kernel, as on CUDA; torch composes it on a CPU
- what waits for the device (`.item()` and its like) is counted as a host wait, and gets zero as its answer

What a tensor costs: every input is read once and every output written once, an expanded one at its true size; views and
allocations cost nothing. Collectives of the one process are left out.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from model.process_groups import initialize_process_groups

FLOOR_SECONDS = 2.5e-6
"""A kernel that has next to nothing to do."""
BANDWIDTH_SHARE = 0.80
PRODUCT_SHARE = 0.66
"""Share of the 16-bit peak that matrix products of the sizes of a step reach."""
ATTENTION_SHARE = 0.35
"""Share of the 16-bit peak that flash kernels reach, counting the causal half."""
FP32_FLOPS = 40e12

CARDS = {"h100": (989e12, 3.35e12), "h200": (989e12, 4.8e12)}
"""16-bit FLOP/s and bytes/s by the maker's data sheet (SXM)."""

PRODUCTS, FP32_PRODUCTS, ATTENTION, ENDS, ELEMENTWISE, TRITON, OPTIMIZER = (
    "products", "products in fp32", "attention", "embedding, output layer, loss", "norms, elementwise",
    "Triton kernels", "optimizer step",
)  # fmt: skip
CATEGORIES = (PRODUCTS, FP32_PRODUCTS, ATTENTION, ENDS, ELEMENTWISE, TRITON, OPTIMIZER)

_PRODUCT_OPERATORS = ("mm", "addmm", "bmm", "baddbmm", "_scaled_mm")
_WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim")
_GATHERS, _SCATTERS = ("index", "gather", "embedding", "index_select"), ("index_put_", "_index_put_impl_")
_FREE = ("_local_scalar_dense", "resize_", "set_", "alias", "detach", "_unsafe_view", "lift_fresh")


@dataclass(frozen=True)
class Operator:
    """One kernel, as far as it can be told: an operator of torch is taken for one."""

    phase: str
    name: str
    category: str
    bytes: int
    flops: int
    shape: tuple[int, ...]
    """Shape of the operator's first output."""
    share_of_peak: float
    """The share of `peak` its FLOPs could reach."""
    in_fp32: bool

    def seconds(self, card: str) -> float:
        """What it takes on `card`, by this module's equation."""
        peak, bandwidth = CARDS[card]
        rate = FP32_FLOPS if self.in_fp32 else peak * self.share_of_peak
        return max(FLOOR_SECONDS, self.flops / rate, self.bytes / (bandwidth * BANDWIDTH_SHARE))


class OperatorCounter(TorchDispatchMode):
    """Notes every operator while `phase` is set. `vocabulary`: rows of the embedding, by which the ends of a model are
    told from its blocks."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.phase: str | None = None
        self.operators: list[Operator] = []
        self.host_waits: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        if self.phase is not None and name in _WAITS:
            self.host_waits[self.phase] = self.host_waits.get(self.phase, 0) + 1
        if name == "_local_scalar_dense":
            return _zero_of(args[0].dtype)
        result = func(*args, **kwargs)
        if self.phase is not None and func.namespace == "aten" and not _moves_nothing(func, name):
            flops = 0
            if func._overloadpacket in flop_registry and "scaled_dot_product" not in name:
                flops = flop_registry[func._overloadpacket](*args, **kwargs, out_val=result)
            moved = _bytes_moved(func._schema, args, kwargs, result)
            self._note(name, _tensors((args, kwargs)), _tensors(result), moved, flops)
        return result

    def note_triton(self, name: str, tensors: Sequence[Tensor]) -> None:
        """A Triton kernel that was to run on `tensors`, inputs and outputs alike."""
        if self.phase is not None:
            self._append(name, TRITON, sum(map(_bytes, tensors)), 0, tensors, tensors)

    def _note(self, name: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor], moved: int, flops: int) -> None:
        if name in _GATHERS:
            moved = 2 * sum(map(_bytes, outputs))
        elif name in _SCATTERS:
            moved = 3 * _bytes(inputs[-1])
        category = ELEMENTWISE
        if "scaled_dot_product" in name:
            category, flops = ATTENTION, _attention_flops(name, inputs)
        elif name in _PRODUCT_OPERATORS:
            category = FP32_PRODUCTS if inputs[0].dtype == torch.float32 else PRODUCTS
        self._append(name, category, moved, flops, inputs, outputs)

    def _append(
        self, name: str, category: str, moved: int, flops: int, inputs: Sequence[Tensor], outputs: Sequence[Tensor]
    ) -> None:
        phase = self.phase or ""
        in_fp32 = category == FP32_PRODUCTS
        share = ATTENTION_SHARE if category == ATTENTION else PRODUCT_SHARE
        if phase == "optimizer":
            category = OPTIMIZER
        elif category != ATTENTION and any(self._at_the_ends(one) for one in (*inputs, *outputs)):
            category = ENDS
        shape = tuple(outputs[0].shape) if outputs else ()
        self.operators.append(Operator(phase, name, category, moved, flops, shape, share, in_fp32))

    def _at_the_ends(self, tensor: Tensor) -> bool:
        return tensor.dim() >= 2 and self.vocabulary in (tensor.shape[0], tensor.shape[-1])


def _zero_of(dtype: torch.dtype) -> bool | int | float:
    if dtype == torch.bool:
        return False
    return 0.0 if dtype.is_floating_point else 0


def _moves_nothing(func: Any, name: str) -> bool:
    if name in _FREE or name.startswith(("empty", "new_empty", "sym_", "is_")):
        return True
    return any(one.alias_info is not None and not one.alias_info.is_write for one in func._schema.returns)


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _bytes_moved(schema: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> int:
    """What is read of the arguments, and written of the result or in place."""
    moved = 0
    for place, argument in enumerate(schema.arguments):
        given = args[place] if place < len(args) else kwargs.get(argument.name)
        written = argument.alias_info is not None and argument.alias_info.is_write
        only_written = argument.is_out or (written and schema.name in ("aten::fill_", "aten::zero_", "aten::copy_"))
        moved += (2 if written and not only_written else 1) * sum(map(_bytes, _tensors(given)))
    results = result if isinstance(result, tuple) else (result,)
    fresh = [value for one, value in zip(schema.returns, results, strict=False) if one.alias_info is None]
    return moved + sum(map(_bytes, _tensors(fresh)))


def _bytes(tensor: Tensor) -> int:
    """Bytes of a tensor that a kernel touches: an expanded dimension has one entry."""
    numbers = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        numbers *= size if stride else 1
    return numbers * tensor.element_size()


def _attention_flops(name: str, inputs: Sequence[Tensor]) -> int:
    """FLOPs of causal attention, half of the square: two products forward, five backward."""
    backward = "backward" in name
    batch, heads, queries, size = inputs[1 if backward else 0].shape
    return (10 if backward else 4) * batch * heads * queries * queries * size // 2


class _GpuAnswers(TorchFunctionMode):
    """Answers `is_cuda` with yes, and takes the fused form of what torch composes on a CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == _IS_CUDA:
            return True
        if func is nn.functional.rms_norm:
            return _one_pass_norm(*args, **kwargs)
        return func(*args, **kwargs)


_HOPPER: dict[str, Any] = {
    "get_device_capability": lambda *_: (9, 0),
    "get_device_properties": lambda *_: SimpleNamespace(major=9, minor=0, multi_processor_count=132),
}
"""What `torch.cuda` is asked for by code that chooses kernels."""
_IS_CUDA = Tensor.is_cuda.__get__  # type: ignore[attr-defined]


def _one_pass_norm(
    values: Tensor, shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """One kernel each way over the same tensors, as CUDA's `_fused_rms_norm` is; that of `layer_norm` is one on every
    device."""
    return nn.functional.layer_norm(values, list(shape), weight, None, 1e-5 if eps is None else eps)


@contextmanager
def counted_operators(vocabulary: int) -> Iterator[OperatorCounter]:
    """A counter of what runs inside, on fake tensors of one process that takes itself for one with a GPU.

    Process groups are torch's fake ones and made here: call it in a process that has none.
    """
    # DeepSpeed 0.19.8 compares addresses of parameters; those of fake tensors are all zero.
    warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
    counter = OperatorCounter(vocabulary)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        initialize_process_groups(1)
        with ExitStack() as stack:
            stack.enter_context(_counted_triton(counter))
            stack.enter_context(mock.patch.multiple(torch.cuda, **_HOPPER))
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            stack.enter_context(counter)
            answers = stack.enter_context(_GpuAnswers())
            stack.enter_context(_kept_in_backward(answers))
            yield counter
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


@contextmanager
def _kept_in_backward(mode: _GpuAnswers) -> Iterator[None]:
    """`Tensor.backward` is itself a function that the mode handles, and inside such a one the mode is off."""
    run: Callable[..., Any] = torch.autograd._engine_run_backward

    def run_in_mode(*args: Any, **kwargs: Any) -> Any:
        with mode:
            return run(*args, **kwargs)

    torch.autograd._engine_run_backward = run_in_mode
    try:
        yield
    finally:
        torch.autograd._engine_run_backward = run


@contextmanager
def _counted_triton(counter: OperatorCounter) -> Iterator[None]:
    try:
        from triton.runtime import interpreter, jit
    except ImportError:  # then no code uses it
        yield
        return
    kinds = (jit.JITFunction, interpreter.InterpretedFunction)  # the latter where TRITON_INTERPRET asks for it
    runs = [kind.run for kind in kinds]

    def counted(self: Any, *args: Any, **kwargs: Any) -> None:
        counter.note_triton(self.fn.__name__, _tensors((args, kwargs)))

    for kind in kinds:
        kind.run = counted
    try:
        yield
    finally:
        for kind, run in zip(kinds, runs, strict=True):
            kind.run = run
