"""Where a training step spends its time and its memory, by torch's profiler.

Every operator's own time goes to the first of these that fits it:

    ZeRO and optimizer     everything in the optimizer's part of the step, and what hangs on accumulated gradients
    GEMMs                  matrix products
    attention              `scaled_dot_product_attention`
    loss                   all else that has the vocabulary as its last dimension
    norms, elementwise     all other operators: norms, activations, residual adds, copies
    rest                   embedding look-ups, and time of the step in no operator

On a GPU the times are those of the kernels that an operator started.
"""

import json
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from tools.benchmarks.step_contestants import Contestant

OPTIMIZER, GEMMS, ATTENTION, LOSS, ELEMENTWISE, REST = (
    "ZeRO and optimizer", "GEMMs", "attention", "loss", "norms, elementwise", "rest",
)  # fmt: skip
CATEGORIES = (GEMMS, ATTENTION, ELEMENTWISE, LOSS, OPTIMIZER, REST)
_GEMM_OPERATORS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::matmul", "aten::linear")
_TABLE_ROWS = 40


def profile_step(contestant: Contestant, vocabulary: int, folder: Path) -> dict[str, float]:
    """Seconds of one step by category; `folder/NAME.txt` gets the profiler's table of operators.

    `vocabulary`: width of the logits.
    """
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with profile(activities=activities, record_shapes=True) as profiler:
        start = time.perf_counter()
        contestant.step()
        seconds = time.perf_counter() - start
    order = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    table = profiler.key_averages().table(sort_by=order, row_limit=_TABLE_ROWS, max_name_column_width=70)
    (folder / f"{contestant.name}.txt").write_text(table + "\n", encoding="utf-8")
    return seconds_by_category(profiler.events(), vocabulary, seconds)


def seconds_by_category(events: Iterable[FunctionEvent], vocabulary: int, step_seconds: float) -> dict[str, float]:
    """The step's seconds, each once."""
    found = dict.fromkeys(CATEGORIES, 0.0)
    for event in events:
        found[category_of(event, vocabulary)] += own_seconds(event)
    found[REST] = max(0.0, step_seconds - sum(found[name] for name in CATEGORIES if name != REST))
    return found


def own_seconds(event: FunctionEvent) -> float:
    """Time of an operator without the operators inside it.

    On a GPU torch's profiler tells of a kernel twice: at the operator that started it, which is counted, and as an
    event of the device. A named range (`record_function`) is there as a kernel of itself that spans all of its own.
    """
    if event.device_type != DeviceType.CPU:
        return 0.0
    if not event.use_device:
        return float(event.self_cpu_time_total) / 1e6
    return sum(kernel.duration for kernel in event.kernels if kernel.name != event.name) / 1e6


def category_of(event: FunctionEvent, vocabulary: int) -> str:
    """The first category of this module's docstring that fits."""
    names, parent = [event.name], event.cpu_parent
    while parent is not None:
        names.append(parent.name)
        parent = parent.cpu_parent
    if "optimizer" in names or any("AccumulateGrad" in name for name in names):
        return OPTIMIZER
    if event.name in _GEMM_OPERATORS:
        return GEMMS
    if any("scaled_dot_product" in name.lower() or "ScaledDotProduct" in name for name in names):
        return ATTENTION
    if not event.name.startswith("aten::") or any("embedding" in name.lower() for name in names):
        return REST
    shapes: Any = event.input_shapes or ()  # one for each argument; empty for one that is no tensor
    return LOSS if any(shape and shape[-1] == vocabulary for shape in shapes) else ELEMENTWISE


def write_picture(profiles: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """One bar a contestant, its seconds in one colour a category."""
    figure = Figure(figsize=(8.0, 1.6 + 0.5 * len(profiles)), layout="constrained")
    axes = figure.add_subplot()
    labels = list(profiles)
    left = [0.0] * len(labels)
    for category in CATEGORIES:
        widths = [profiles[label][category] for label in labels]
        axes.barh(labels, widths, left=left, label=category)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("seconds of one step, profiled")
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=150)


class PeakMemory:
    """Bytes that torch has allocated for what is built and run inside, at the peak of its last step.

    On a CPU torch keeps no such count; the profiler notes every allocation.
    """

    bytes: int | None = None

    def __enter__(self) -> "PeakMemory":
        self._profiler: profile | None = None
        if torch.cuda.is_available():
            self._before = torch.cuda.memory_allocated()
        else:
            self._profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self._profiler.__enter__()
        return self

    def last_step_begins(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def __exit__(self, *raised: Any) -> None:
        if self._profiler is None:
            self.bytes = torch.cuda.max_memory_allocated() - self._before
            return
        self._profiler.__exit__(*raised)
        if raised[0] is None:
            self.bytes = _peak_of_last_step(self._profiler)


def _peak_of_last_step(profiler: profile) -> int:
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    begin = max(event["ts"] for event in events if event["name"] == "forward")
    held = peak = 0
    for event in sorted((event for event in events if event["name"] == "[memory]"), key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]
        if event["ts"] >= begin:
            peak = max(peak, held)
    return int(peak)
