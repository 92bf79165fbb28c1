"""The two modes that make torch take host memory for `cuda:0`.

`Functions` (a torch-function mode) answers what Python asks a tensor about its device, moves tensors by changing their
marks, and makes new ones where `device=` says. `Operators` (a dispatch mode) sees every operator, those of backward
passes included: it passes marks on from operands to results, refuses what CUDA and NCCL refuse, and counts.

Autograd and all kernels see plain tensors of the host. FakeTensorMode will not do: with torch 2.13 built without CUDA
an autograd graph on fake CUDA tensors aborts the process, and with CUDA built in but no GPU its backward pass raises.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.device_ledger import Ledger
from tests.support.device_marks import DEVICE, HOST, Marks, Place, storage_key

NCCL_TYPES = {
    torch.int8, torch.uint8, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64,
    torch.bool,
}  # fmt: skip
_ACROSS = {"copy_", "_to_copy", "set_", "is_pinned", "_pin_memory", "lift_fresh"}
"""Operators whose operands may lie apart."""
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
_WAITING = {
    "_local_scalar_dense", "nonzero", "masked_select", "equal", "unique_dim", "_unique2", "unique_consecutive",
    "bincount", "_linalg_eigh", "_linalg_svd", "_linalg_check_errors",
}  # fmt: skip
"""Operators that bring a number, a size or an error code to the host."""
_WITHOUT_KERNEL = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_", "set_", "detach", "detach_",
    "alias", "lift_fresh", "_unsafe_view", "_reshape_alias", "is_pinned", "_local_scalar_dense",
    "is_same_size", "sym_size", "sym_stride",
}  # fmt: skip
"""Operators that allocate, look or wait, beside those that return views."""
_FACTORIES = {
    "tensor", "empty", "zeros", "ones", "full", "arange", "rand", "randn", "randint", "from_numpy", "as_tensor",
    "linspace", "eye", "randperm", "empty_strided", "frombuffer", "scalar_tensor", "tril_indices", "from_file",
}  # fmt: skip
_COPYING_FACTORIES = {"tensor", "as_tensor", "asarray"}
"""Their values come from host memory."""


class Pretence:
    """What both modes share."""

    def __init__(self) -> None:
        self.marks, self.ledger = Marks(), Ledger()
        self.making = 0
        """Above 0 while Python asks for a tensor on a device that it names, or on the host by not naming one."""
        self.on_their_way: set[int] = set()
        """Storages of the host that copies which nobody has waited for are writing to."""

    def wait(self, cause: str) -> None:
        """A host wait, after which all copies have arrived."""
        self.ledger.wait(cause)
        self.on_their_way.clear()

    def read_by_host(self, tensor: Tensor, how: str) -> None:
        """Python takes numbers out of `tensor` (on the host)."""
        with torch._C.DisableTorchFunction():
            key = storage_key(tensor)
        if key in self.on_their_way:
            self.ledger.problem(f"{how} of host memory that a copy nobody waited for still writes to")

    def generator_for(self, generator: Any, place: Place, name: str) -> None:
        """`generator` (if there is one) is to fill a tensor in `place`."""
        if generator is not None and place is not Place.EITHER and generator.device != place.device:
            self.ledger.problem(f"{name}: a generator of {generator.device} for a tensor on {place.device}")

    def to_device(self, tensor: Tensor, source: Place, non_blocking: bool, how: str) -> None:
        """A copy from the host was asked for."""
        self.ledger.copied("host to device", tensor.nbytes)
        if source is not Place.PINNED:
            self.wait(f"{how} to the device from pageable memory")
        elif not non_blocking:
            self.wait(f"{how} to the device without non_blocking")

    def to_host(self, tensor: Tensor, target: Tensor, into: Place, non_blocking: bool, how: str) -> None:
        """A copy to the host was asked for."""
        self.ledger.copied("device to host", tensor.nbytes)
        if non_blocking and into is Place.PINNED:
            with torch._C.DisableTorchFunction():
                self.on_their_way.add(storage_key(target))
        else:
            self.wait(f"{how} to the host")


class Operators(TorchDispatchMode):
    """Notes every operator of torch on the pretended device."""

    def __init__(self, pretence: Pretence) -> None:
        super().__init__()
        self._pretence, self._marks, self._ledger = pretence, pretence.marks, pretence.ledger

    def __torch_dispatch__(
        self, operator: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunction():
            return self._run(operator, operator._schema.name.partition("::")[2], args, kwargs)

    def _run(self, operator: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        leaves = chain(_leaves(args), _leaves(kwargs.values()))
        operands = [leaf for leaf in leaves if isinstance(leaf, Tensor) and not leaf.is_meta]
        keys = [storage_key(operand) for operand in operands]
        places = [self._marks.at(key) for key in keys]
        on_device = Place.DEVICE in places
        if operator.namespace == "c10d":
            self._collective(name, operands, places)
        elif on_device:
            self._check(name, args, operands, places)
        asked_for = kwargs.get("device")
        if asked_for is not None and torch.device(asked_for).type == "cuda":
            kwargs, on_device = {**kwargs, "device": HOST}, True
        if on_device and operator.namespace != "c10d":
            self._count(operator, name, args, kwargs)
        if name == "copy_":
            self._copy(args, kwargs)
        if name == "_local_scalar_dense":
            self._pretence.read_by_host(args[0], "a number")
        if name == "is_pinned":
            return places[0] is Place.PINNED
        result = operator(*args, **kwargs)
        self._mark_results(result, keys, places, on_device)
        return result

    def _check(self, name: str, args: tuple[Any, ...], operands: Sequence[Tensor], places: Sequence[Place]) -> None:
        """Operands must lie together; host scalars may go with anything, and host indices cost a wait."""
        strangers = [one for one, place in zip(operands, places, strict=True) if place.on_host and one.dim() > 0]
        if name in _ACROSS:
            return
        if strangers and name in _INDEXING and self._marks.of(args[0]) is Place.DEVICE:
            self._pretence.wait(f"{name} with indices on the host")
        elif strangers:
            apart = ", ".join(f"{tuple(o.shape)} in {p.value}" for o, p in zip(operands, places, strict=True))
            self._ledger.problem(f"{name}: operands apart, {apart}")
        for operand, place in zip(operands, places, strict=True):
            if place is Place.EITHER:
                self._marks.put(operand, Place.DEVICE)

    def _count(self, operator: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if name in _WAITING or (name in _INDEXING and _selects_by_mask(name, args)):
            self._pretence.wait(name)
        if name == "repeat_interleave" and kwargs.get("output_size") is None:
            self._pretence.wait(name)
        if name not in _WITHOUT_KERNEL and not _returns_view(operator):
            self._ledger.kernel(name)

    def _copy(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        target, source = args[0], args[1]
        into, out_of = self._marks.of(target), self._marks.of(source)
        non_blocking = bool(args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        if into is Place.DEVICE and out_of.on_host:
            self._pretence.to_device(source, out_of, non_blocking, "copy_")
        elif into.on_host and out_of is Place.DEVICE:
            self._pretence.to_host(source, target, into, non_blocking, "copy_")

    def _collective(self, name: str, operands: Sequence[Tensor], places: Sequence[Place]) -> None:
        """What NCCL refuses."""
        if name == "barrier":
            self._pretence.wait("barrier")
            return
        if name == "monitored_barrier_":
            self._ledger.problem("monitored_barrier: NCCL has none")
            return
        self._ledger.kernel(name)
        for operand, place in zip(operands, places, strict=True):
            shape = tuple(operand.shape)
            if place.on_host:
                self._ledger.problem(f"{name}: NCCL gets host memory {shape}")
            if not operand.is_contiguous():
                self._ledger.problem(f"{name}: NCCL gets a tensor that is not contiguous {shape} {operand.stride()}")
            if operand.dtype not in NCCL_TYPES:
                self._ledger.problem(f"{name}: NCCL has no {operand.dtype}")

    def _mark_results(self, result: Any, known: Sequence[int], places: Sequence[Place], on_device: bool) -> None:
        for one in _leaves([result]):
            if not isinstance(one, Tensor) or one.is_meta or storage_key(one) in known:
                continue
            if on_device:
                self._marks.put(one, Place.DEVICE)
            elif all(place is Place.EITHER for place in places) and not (self._pretence.making and not places):
                self._marks.put(one, Place.EITHER)


def _leaves(values: Iterable[Any]) -> Iterator[Any]:
    """What operators take and return, without the lists around it."""
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _leaves(value)
        else:
            yield value


@cache
def _returns_view(operator: Any) -> bool:
    aliases = [returned.alias_info for returned in operator._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


def _selects_by_mask(name: str, args: tuple[Any, ...]) -> bool:
    """Whether places must be counted first; torch writes one number under a single mask without counting."""
    indices = [index for index in args[1] if index is not None]
    if not any(index.dtype in (torch.bool, torch.uint8) for index in indices):
        return False
    return name == "index" or len(indices) > 1 or args[2].numel() > 1


class Functions(TorchFunctionMode):
    """See the module. Off inside a function that it handles, on again inside backward passes (`cuda_answers`)."""

    def __init__(self, pretence: Pretence) -> None:
        super().__init__()
        self._pretence, self._marks = pretence, pretence.marks
        self._answers: dict[Any, Callable[..., Any]] = {
            _getter("device"): lambda tensor: self._marks.of(tensor).device,
            _getter("is_cuda"): lambda tensor: self._marks.of(tensor).device == DEVICE,
            _getter("is_cpu"): lambda tensor: self._marks.of(tensor).device == HOST,
            Tensor.get_device: lambda tensor: 0 if self._marks.of(tensor).device == DEVICE else -1,
            Tensor.is_pinned: lambda tensor, device=None: self._marks.of(tensor) is Place.PINNED,
            Tensor.pin_memory: self._pin,
            Tensor.to: self._to,
            Tensor.cpu: lambda tensor, **options: self._to(tensor, HOST, **options),
            Tensor.cuda: lambda tensor, device=None, **options: self._to(tensor, DEVICE, **options),
        }

    def __torch_function__(
        self, function: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args and isinstance(args[0], Tensor) else None
        if first is not None and not _is_meta(first):
            answer = self._answers.get(function)
            if answer is not None:
                return answer(*args, **kwargs)
            self._pretence.generator_for(kwargs.get("generator"), self._marks.of(first), function.__name__)
            self._look(function, first, kwargs)
        result = self._make(function, args, kwargs) if _makes(function, first, kwargs) else function(*args, **kwargs)
        if function is Tensor.__deepcopy__ and first is not None and self._marks.of(first) is not Place.PAGEABLE:
            self._marks.put(result, self._marks.of(first))
        if function is Tensor.type and isinstance(result, str) and self._marks.of(args[0]).device == DEVICE:
            return result.replace("torch.", "torch.cuda.")
        return result

    def _look(self, function: Any, tensor: Tensor, options: dict[str, Any]) -> None:
        """Functions through which numbers leave torch."""
        if function in (Tensor.numpy, Tensor.__array__):
            if self._marks.of(tensor) is Place.DEVICE and not options.get("force"):
                self._pretence.ledger.problem("numpy() of a tensor on cuda:0")
            self._pretence.read_by_host(tensor, "numpy()")
        elif function is Tensor.tolist:
            if self._marks.of(tensor) is Place.DEVICE:
                self._pretence.wait("tolist")
            self._pretence.read_by_host(tensor, "tolist()")

    def _make(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A tensor on the device that is named, or on the host."""
        kwargs = dict(kwargs)
        pinned = bool(kwargs.pop("pin_memory", False))
        asked_for = kwargs.pop("device", None)
        kernels = self._pretence.ledger.kernels
        place = Place.PINNED if pinned else Place.PAGEABLE
        if asked_for is not None:
            kwargs["device"] = HOST
            if isinstance(asked_for, int) or torch.device(asked_for).type == "cuda":
                place = Place.DEVICE
        if not args or not isinstance(args[0], Tensor):
            self._pretence.generator_for(kwargs.get("generator"), place, function.__name__)
        self._pretence.making += 1
        try:
            result = function(*args, **kwargs)
        finally:
            self._pretence.making -= 1
        made = [one for one in _leaves([result]) if isinstance(one, Tensor)]
        if asked_for is not None or pinned:
            for one in made:
                self._marks.put(one, place)
        if place is Place.DEVICE:
            counted = self._pretence.ledger.kernels > kernels  # for an operand that was on the device
            self._filled(function.__name__, args[0] if args else kwargs.get("data"), made, counted)
        return result

    def _filled(self, name: str, values: Any, made: Sequence[Tensor], counted: bool) -> None:
        """Where the numbers of a new tensor on the device come from."""
        if name in _COPYING_FACTORIES:
            if not isinstance(values, Tensor) or self._marks.of(values).on_host:
                for one in made:
                    self._pretence.to_device(one, Place.PAGEABLE, False, name)
        elif not counted and name not in _WITHOUT_KERNEL:
            self._pretence.ledger.kernel(name)

    def _pin(self, tensor: Tensor, device: Any = None) -> Tensor:
        if self._marks.of(tensor) is Place.DEVICE:
            self._pretence.ledger.problem("pin_memory() of a tensor on cuda:0")
        pinned = tensor.clone()
        self._marks.put(pinned, Place.PINNED)
        return pinned

    def _to(self, tensor: Tensor, *args: Any, copy: bool = False, **kwargs: Any) -> Tensor:
        """`tensor` on another device or of another type; meta tensors and targets are torch's own affair."""
        if args and isinstance(args[0], Tensor):
            like, args = args[0], args[1:]
            kwargs = {"device": self._marks.of(like).device, "dtype": like.dtype, **kwargs}
        if len(args) == 4 or (len(args) == 3 and isinstance(args[0], torch.dtype)):
            *args, copy = args  # type: ignore[assignment]
        if args and type(args[0]) is int:
            args = (DEVICE, *args[1:])
        if type(kwargs.get("device")) is int:
            kwargs["device"] = DEVICE
        with torch._C.DisableTorchFunction():
            device, dtype, non_blocking, layout = torch._C._nn._parse_to(*args, **kwargs)
        if device is not None and device.type == "meta":
            return tensor.to(device, dtype or tensor.dtype)
        here = self._marks.of(tensor)
        crosses = device is not None and here is not Place.EITHER and device.type != here.device.type
        dtype = dtype or tensor.dtype
        result = tensor.to(dtype, copy=copy or crosses, memory_format=layout or torch.preserve_format)
        if not crosses:
            return result
        if here is Place.DEVICE:
            into = Place.PINNED if non_blocking else Place.PAGEABLE  # as torch allocates it
            self._marks.put(result, into)
            self._pretence.to_host(tensor, result, into, non_blocking, "to()")
        else:
            self._marks.put(result, Place.DEVICE)
            self._pretence.to_device(tensor, here, non_blocking, "to()")
        return result


def _getter(attribute: str) -> Any:
    """What torch calls a look at `attribute` when it asks the mode."""
    return getattr(Tensor, attribute).__get__


def _is_meta(tensor: Tensor) -> bool:
    with torch._C.DisableTorchFunction():
        return tensor.is_meta


def _makes(function: Any, first: Tensor | None, kwargs: dict[str, Any]) -> bool:
    device = kwargs.get("device")
    if device is not None:
        return isinstance(device, int) or torch.device(device).type in ("cuda", "cpu")
    return bool(kwargs.get("pin_memory")) or (first is None and getattr(function, "__name__", "") in _FACTORIES)
