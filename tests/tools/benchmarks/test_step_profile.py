"""Every second of a profiled step is counted once; the events are torch's own, laid out as CUPTI reports a step."""

import pytest
import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import EventList, FunctionEvent
from torch.profiler import ProfilerActivity, profile

from tools.benchmarks.step_profile import ELEMENTWISE, GEMMS, LOSS, OPTIMIZER, REST, own_seconds, seconds_by_category


def event(name: str, start: int, end: int, device: DeviceType = DeviceType.CPU, **more: object) -> FunctionEvent:
    """`start`, `end`: microseconds."""
    return FunctionEvent(
        id=0, name=name, thread=1, start_us=start, end_us=end, use_device="cuda", device_type=device, **more
    )


def gpu_trace() -> list[FunctionEvent]:
    """Operators with their kernels, and the device's own events beside them, named ranges among these."""
    cpu = [
        event("forward", 0, 100),
        event("aten::linear", 10, 30),
        event("aten::mm", 12, 28, input_shapes=[[4, 8], [8, 16]]),
        event("aten::mul", 40, 50, input_shapes=[[4, 8], [4, 8]]),
        event("aten::sub", 60, 70, input_shapes=[[4, 1000]]),
        event("optimizer", 200, 300),
        event("aten::add_", 210, 220, input_shapes=[[4, 8]]),
    ]
    kernels = {"aten::mm": 5000, "aten::mul": 300, "aten::sub": 200, "aten::add_": 700}
    device = []
    for operator in cpu:
        if operator.name in kernels:
            operator.append_kernel(f"kernel of {operator.name}", 0, kernels[operator.name])
            device.append(event(f"kernel of {operator.name}", 0, kernels[operator.name], DeviceType.CUDA))
        if operator.name in ("forward", "optimizer"):  # spans all kernels inside, gaps included
            operator.append_kernel(operator.name, 0, 6000)
            device.append(event(operator.name, 0, 6000, DeviceType.CUDA, is_user_annotation=True))
    cpu[5].append_kernel("a kernel that no operator started", 0, 50)
    events = EventList([*cpu, *device], use_device="cuda")
    events._build_tree()
    return list(events)


def test_a_kernel_counts_once_and_a_named_range_not_at_all() -> None:
    found = seconds_by_category(gpu_trace(), 1000, 7e-3)
    assert found[GEMMS] == pytest.approx(5.0e-3)
    assert found[ELEMENTWISE] == pytest.approx(0.3e-3)
    assert found[LOSS] == pytest.approx(0.2e-3)
    assert found[OPTIMIZER] == pytest.approx(0.75e-3)
    assert found[REST] == pytest.approx(0.75e-3)
    assert sum(found.values()) == pytest.approx(7e-3)


def test_on_a_cpu_operators_share_the_time_of_what_they_are_in() -> None:
    """A real profile: own times add up to the outermost range's."""
    values = torch.randn(64, 64)
    with profile(activities=[ProfilerActivity.CPU]) as profiler, torch.profiler.record_function("forward"):
        torch.nn.functional.gelu(values @ values)
    events = list(profiler.events())
    whole = next(one for one in events if one.name == "forward").cpu_time_total / 1e6
    assert sum(own_seconds(one) for one in events) == pytest.approx(whole)
    assert any(one.name == "aten::mm" and own_seconds(one) > 0.0 for one in events)
