"""What stands in for CUDA around the modes of `device_modes`: the answers of `torch.cuda`, NCCL, Triton's kernels.

Everything is a replaced attribute; `answers` puts it there and takes it back.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
import torch.cuda.nvtx
import torch.cuda.random
import torch.distributed as dist
import torch.nn.attention
import torch.utils.checkpoint
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import _disable_current_modes
from triton.runtime import interpreter

from tests.support.device_marks import DEVICE, HOST
from tests.support.device_modes import Functions, Pretence

DEVICES = 8
MEMORY_BYTES = 85_000_000_000
PROPERTIES = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3", total_memory=MEMORY_BYTES, major=9, minor=0, multi_processor_count=132,
    gcnArchName="",
)  # fmt: skip


@contextmanager
def answers(pretence: Pretence, functions: Functions) -> Iterator[None]:
    """Inside the block torch answers as if there were a GPU."""
    with ExitStack() as stack:

        def replace(owner: Any, **values: Any) -> None:
            for name, value in values.items():
                stack.callback(setattr, owner, name, getattr(owner, name))
                setattr(owner, name, value)

        replace(torch.cuda, **_cuda(pretence))
        # A torch that is built for CUDA would ask its driver; optimizers do, in every step.
        replace(torch.accelerator, current_accelerator=lambda check_available=False: None)
        replace(torch.cuda.nvtx, range_push=_nothing, range_pop=_nothing, mark=_nothing)
        replace(torch.cuda.random, get_rng_state=_random_state, set_rng_state=_nothing)
        replace(torch, Generator=Generator)
        replace(Tensor, record_stream=_nothing)  # which takes a stream of torch's own and no other
        replace(dist, init_process_group=_with_gloo(dist.init_process_group), new_group=_with_gloo(dist.new_group))
        replace(dist, is_nccl_available=lambda: True)
        # Objects travel through NCCL in device memory.
        replace(distributed_c10d, _get_object_coll_device=lambda group=None: "cuda")
        replace(interpreter.GridExecutor, __call__=_launch(interpreter.GridExecutor.__call__, pretence))
        replace(torch.nn.attention, _sdpa_kernel=_host_kernels_too(torch.nn.attention._sdpa_kernel))
        replace(torch.autograd, _engine_run_backward=_seen(torch.autograd._engine_run_backward, functions))
        _forget_device_of_saved_tensors(stack)
        ledger = pretence.ledger
        for name in ("forward", "backward"):
            replace(DeepSpeedEngine, **{name: _within(getattr(DeepSpeedEngine, name), ledger, "forward and backward")})
        replace(DeepSpeedEngine, step=_within(DeepSpeedEngine.step, ledger, "engine.step"))
        yield


def _nothing(*_: Any, **__: Any) -> None:
    """What most calls of the runtime come to."""


def _random_state(*_: Any) -> Tensor:
    return torch.zeros(16, dtype=torch.uint8)


def _cuda(pretence: Pretence) -> dict[str, Any]:
    """Attributes of `torch.cuda` that the pretended GPU answers for."""
    bytes_held = ("allocated", "reserved", "cached")
    memory = {f"{peak}memory_{kind}": lambda *_: 0 for kind in bytes_held for peak in ("", "max_")}
    silent = (
        "set_device", "empty_cache", "reset_peak_memory_stats", "reset_max_memory_allocated", "set_rng_state",
        "manual_seed", "manual_seed_all", "_lazy_init", "init",
    )  # fmt: skip

    class Event(_Event):
        def synchronize(self) -> None:
            pretence.wait("Event.synchronize")

        def query(self) -> bool:
            pretence.wait("Event.query")
            return True

    class Stream(_Stream):
        def synchronize(self) -> None:
            pretence.wait("Stream.synchronize")

        def query(self) -> bool:
            pretence.wait("Stream.query")
            return True

        def record_event(self, event: Any = None) -> Any:
            return event or Event()

    return {
        **memory,
        **dict.fromkeys(silent, _nothing),
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: DEVICES,
        "current_device": lambda: 0,
        "synchronize": lambda *_: pretence.wait("torch.cuda.synchronize"),
        "memory_stats": lambda *_: {},
        "mem_get_info": lambda *_: (MEMORY_BYTES, MEMORY_BYTES),
        "get_device_name": lambda *_: PROPERTIES.name,
        "get_device_properties": lambda *_: PROPERTIES,
        "get_device_capability": lambda *_: (PROPERTIES.major, PROPERTIES.minor),
        "is_bf16_supported": lambda *_, **__: True,
        "get_rng_state": _random_state,
        "is_current_stream_capturing": lambda: False,
        "device": lambda *_: nullcontext(),
        "device_of": lambda *_: nullcontext(),
        "stream": lambda *_: nullcontext(),
        "current_stream": lambda *_: Stream(),
        "default_stream": lambda *_: Stream(),
        "Stream": Stream,
        "Event": Event,
    }


class _Stream:
    """All work is done when it is asked for, so streams need not wait for each other."""

    cuda_stream = stream_id = device_index = 0
    device = DEVICE

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *_: Any) -> None: ...

    wait_stream = wait_event = _nothing


class _Event:
    def __init__(self, *_: Any, **__: Any) -> None: ...

    record = wait = _nothing

    def elapsed_time(self, later: Any) -> float:
        """Milliseconds; a round figure, for nothing takes the time that a GPU would."""
        return 1.0


class Generator(torch.Generator):
    """A generator of the host that remembers for which device it was made."""

    pretended: torch.device

    def __new__(cls, device: Any = HOST) -> "Generator":
        made = super().__new__(cls, HOST)  # type: ignore[call-arg]
        made.pretended = DEVICE if isinstance(device, int) or torch.device(device).type == "cuda" else HOST
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.pretended


def _with_gloo(make: Callable[..., Any]) -> Callable[..., Any]:
    def make_with_gloo(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop("device_id", None)
        args = tuple("gloo" if one == "nccl" else one for one in args)
        kwargs = {name: "gloo" if one == "nccl" else one for name, one in kwargs.items()}
        if make.__name__ == "init_process_group" and not args:
            kwargs["backend"] = kwargs.get("backend") or "gloo"
        return make(*args, **kwargs)

    make_with_gloo.__name__ = make.__name__
    return make_with_gloo


def _launch(run: Callable[..., Any], pretence: Pretence) -> Callable[..., Any]:
    """A launch of a Triton kernel, which its interpreter (`TRITON_INTERPRET=1`) runs on the host."""

    def launch(executor: Any, *args: Any, **kwargs: Any) -> Any:
        for one in (*args, *kwargs.values()):
            if isinstance(one, Tensor) and pretence.marks.of(one).on_host:
                pretence.ledger.problem(f"{executor.fn.__name__}: a Triton kernel gets host memory")
        pretence.ledger.kernel(f"triton {executor.fn.__name__}")
        with torch._C.DisableTorchFunction(), _disable_current_modes():
            return run(executor, *args, **kwargs)

    return launch


def _host_kernels_too(choose: Callable[..., None]) -> Callable[..., None]:
    """Kernels of attention that only a GPU has are replaced by those of the host."""

    def choose_with_host(backends: Any, set_priority: bool = False) -> None:
        choose([*backends, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH], set_priority=False)

    return choose_with_host


def _seen(run_backward: Callable[..., Any], functions: Functions) -> Callable[..., Any]:
    """The mode is off inside `Tensor.backward`, which it handles; hooks and functions of the pass need it."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with functions:
            return run_backward(*args, **kwargs)

    return run


def _forget_device_of_saved_tensors(stack: ExitStack) -> None:
    """Hooks of `torch.utils.checkpoint` that note what is saved run inside an operator, where the mode is off, and
    those that compare with it run in the backward pass, where it is on: they would find two devices."""
    checks = torch.utils.checkpoint._allowed_determinism_checks_to_fns
    stack.callback(checks.update, default=checks["default"])
    checks["default"] = lambda tensor: {"shape": tensor.shape, "dtype": tensor.dtype}


def _within(method: Callable[..., Any], ledger: Any, part: Any) -> Callable[..., Any]:
    def counted(*args: Any, **kwargs: Any) -> Any:
        with ledger.part(part):
            return method(*args, **kwargs)

    return counted
