"""The pretended GPU itself: planted mistakes are caught, waits and kernels are counted, Triton and streams work."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import triton
import triton.language as tl

from tests.support.distributed import WorkerPool

CUDA = "cuda"


def observed(action: Callable[[], Any]) -> tuple[list[str], list[str], dict[str, int]]:
    """Problems, causes of host waits, and kernels by operator of what `action` does on a pretended GPU; in a worker."""
    from tests.support.pretended_cuda import PretendedCuda

    with PretendedCuda() as gpu:
        try:
            action()
        except RuntimeError as error:  # gloo or torch's own kernels refuse it as well
            assert gpu.problems, error  # noqa: PT017
    count = gpu.count()
    waits = [cause for (_, cause), number in count.waits.items() for _ in range(number)]
    return list(gpu.problems), waits, dict(count.operators)


# Mistakes -------------------------------------------------------------------------------------------------------------


def add_host_tensor() -> None:
    torch.ones(3, device=CUDA) + torch.ones(3)


def add_device_scalar_to_host_tensor() -> None:
    torch.ones(3) + torch.ones((), device=CUDA)


def index_host_tensor_from_device() -> None:
    torch.ones(3)[torch.zeros(2, dtype=torch.long, device=CUDA)]


def mixed_backward() -> None:
    class Forgetful(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
            return values * 2

        @staticmethod
        def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
            return gradients[0] * torch.full((3,), 2.0)

    Forgetful.apply(torch.ones(3, device=CUDA, requires_grad=True)).sum().backward()


def reduce_host_tensor() -> None:
    dist.all_reduce(torch.ones(2))


def reduce_strided_tensor() -> None:
    dist.all_reduce(torch.ones(4, 4, device=CUDA).t()[:2])


def gather_into_host_tensor() -> None:
    dist.all_gather([torch.empty(2)], torch.ones(2, device=CUDA))


def broadcast_short_integers() -> None:
    dist.broadcast(torch.ones(2, dtype=torch.int16, device=CUDA), src=0)


def fill_with_host_generator() -> None:
    torch.empty(3, device=CUDA).normal_(generator=torch.Generator().manual_seed(1))


def make_with_host_generator() -> None:
    torch.rand(3, device=CUDA, generator=torch.Generator().manual_seed(1))


def fill_host_tensor_with_device_generator() -> None:
    torch.empty(3).bernoulli_(0.5, generator=torch.Generator(CUDA).manual_seed(1))


def numpy_of_device() -> None:
    torch.ones(3, device=CUDA).numpy()


def pin_device_memory() -> None:
    torch.ones(3, device=CUDA).pin_memory()


def read_before_arrival() -> None:
    torch.ones(3, device=CUDA).to("cpu", non_blocking=True).tolist()


def launch_on_host_memory() -> None:
    doubled(torch.ones(5))


PLANTED = {
    add_host_tensor: "operands apart",
    add_device_scalar_to_host_tensor: "operands apart",
    index_host_tensor_from_device: "index: operands apart",
    mixed_backward: "operands apart",
    reduce_host_tensor: "NCCL gets host memory",
    reduce_strided_tensor: "not contiguous",
    gather_into_host_tensor: "NCCL gets host memory",
    broadcast_short_integers: "NCCL has no torch.int16",
    fill_with_host_generator: "a generator of cpu for a tensor on cuda:0",
    make_with_host_generator: "a generator of cpu for a tensor on cuda:0",
    fill_host_tensor_with_device_generator: "a generator of cuda:0 for a tensor on cpu",
    numpy_of_device: "numpy() of a tensor on cuda:0",
    pin_device_memory: "pin_memory() of a tensor on cuda:0",
    read_before_arrival: "nobody waited for",
    launch_on_host_memory: "a Triton kernel gets host memory",
}


@pytest.mark.parametrize("mistake", PLANTED, ids=lambda mistake: mistake.__name__)
def test_planted_mistake_is_caught(pretending: WorkerPool, mistake: Callable[[], None]) -> None:
    ((problems, _, _),) = pretending.run(observed, 1, 60.0, (mistake,), {})
    assert len(problems) == 1
    assert PLANTED[mistake] in problems[0]
    if mistake is not launch_on_host_memory:  # its place is where the kernel is launched
        assert (
            f"tests/support/test_pretended_cuda.py:{mistake.__code__.co_firstlineno}" < problems[0].split("  at  ")[1]
        )


# Waits ----------------------------------------------------------------------------------------------------------------


def wait_in_every_way() -> None:
    ones = torch.ones(4, device=CUDA)
    ones.sum().item()
    bool(ones[0] > 0)
    ones.tolist()
    ones.cpu()
    ones.nonzero()
    ones[ones > 0]
    ones[torch.tensor([1, 2])]
    torch.tensor([1.0], device=CUDA)
    torch.ones(2).to(CUDA, non_blocking=True)
    torch.ones(2).pin_memory().to(CUDA)
    torch.empty(4).copy_(ones, non_blocking=True)
    torch.cuda.synchronize()
    torch.cuda.current_stream().synchronize()
    event = torch.cuda.Event()
    event.record()
    event.synchronize()
    event.query()
    dist.barrier()


def wait_in_no_way() -> None:
    pinned = torch.ones(4).pin_memory()
    ones = pinned.to(CUDA, non_blocking=True)
    torch.empty(4, pin_memory=True).copy_(ones, non_blocking=True)
    there = ones.to("cpu", non_blocking=True)
    assert there.is_pinned()
    assert not there.is_cuda
    torch.zeros(3, device=CUDA).add_(torch.arange(3, device=CUDA))
    torch.where(ones > 0, ones, 0.0)[1:].unsqueeze(0)
    ones[torch.zeros(2, dtype=torch.long, device=CUDA)] = 1.0
    torch.empty(3, device=CUDA).normal_(generator=torch.Generator(CUDA).manual_seed(1))
    dist.all_reduce(ones)
    with torch.cuda.stream(torch.cuda.Stream()):
        (ones * torch.tensor(2.0)).sum()  # a scalar of the host is an argument of the kernel


def test_waits_are_counted_and_nothing_else(pretending: WorkerPool) -> None:
    ((problems, waits, _),) = pretending.run(observed, 1, 60.0, (wait_in_every_way,), {})
    assert problems == []
    assert len(waits) == 16
    assert all("test_pretended_cuda.py" in cause for cause in waits)
    ((problems, waits, kernels),) = pretending.run(observed, 1, 60.0, (wait_in_no_way,), {})
    assert (problems, waits) == ([], [])
    assert "empty" not in kernels
    assert "slice" not in kernels
    assert kernels["arange"] == kernels["allreduce_"] == kernels["normal_"] == 1


def exchange_objects() -> None:
    dist.all_gather_object([None], 1)


def test_objects_travel_through_device_memory(pretending: WorkerPool) -> None:
    ((problems, waits, kernels),) = pretending.run(observed, 1, 60.0, (exchange_objects,), {})
    assert problems == []
    assert len(waits) >= 2
    assert kernels["allgather_"] == 2


# Kernels of others ----------------------------------------------------------------------------------------------------


@triton.jit
def _double(source: Any, target: Any, size: Any, block: tl.constexpr) -> None:
    places = tl.program_id(0) * block + tl.arange(0, block)
    tl.store(target + places, 2 * tl.load(source + places, mask=places < size), mask=places < size)


def doubled(values: torch.Tensor) -> torch.Tensor:
    result = torch.empty_like(values)
    _double[(triton.cdiv(values.numel(), 4),)](values, result, values.numel(), block=4)
    return result


def launch_and_compile() -> None:
    values = torch.arange(5.0, device=CUDA)
    assert values.is_cuda
    result = doubled(values[1:])
    assert result.device == torch.device("cuda", 0)
    assert result.tolist() == [2.0, 4.0, 6.0, 8.0]
    assert torch.compile(lambda x: x * x)(values).tolist() == [0.0, 1.0, 4.0, 9.0, 16.0]


def attend() -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    query = torch.ones(1, 2, 4, 8, device=CUDA, requires_grad=True)
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION], set_priority=True):
        torch.nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True).sum().backward()
    assert query.grad is not None
    assert query.grad.is_cuda


def test_triton_and_compiled_code_run(pretending: WorkerPool) -> None:
    ((problems, waits, kernels),) = pretending.run(observed, 1, 60.0, (launch_and_compile,), {})
    assert problems == []
    assert kernels["triton _double"] == 1
    assert len(waits) == 2
    ((problems, waits, _),) = pretending.run(observed, 1, 60.0, (attend,), {})
    assert (problems, waits) == ([], [])
