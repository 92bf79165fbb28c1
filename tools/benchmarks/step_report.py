"""Rows and tables of the step benchmark.

FLOP ratio   F_dense / F        of whole steps: linear layers, attention and output layer (`model/costs/arithmetic.py`)
time ratio   t_dense / t        of medians
share        time ratio / FLOP ratio: 100 % would be as fast as the arithmetic allows
MFU          executed FLOPs / (t · the device's peak), 16 bit on a known device only; causal kernels execute half of
             attention's squares, and F counts them whole
"""

import statistics
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from pretrain.devices import peak_flops
from pretrain.provenance import git_revision, hardware, installed_versions

CPU_SHARE_TARGET = 0.85
GPU_TIME_TARGETS = {"gpt2": 0.65, "llama": 0.52}
"""Factored over dense at the shapes of docs/gpu.md; half of GPT-2 medium's step is the same in both."""
GPU_BLOCKS_TARGET, GPU_MFU_TARGET = 0.55, 0.40


def synchronize() -> None:
    """Waits for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    samples = seconds if len(seconds) > 1 else [*seconds, *seconds]
    first, median, third = statistics.quantiles(samples, n=4, method="inclusive")
    return {"median_seconds": median, "first_quartile_seconds": first, "third_quartile_seconds": third}


def against_dense(row: Mapping[str, Any], dense: Mapping[str, Any]) -> dict[str, float]:
    """The three ratios of a row with `flops` and `median_seconds`."""
    flop_ratio = dense["flops"] / row["flops"]
    time_ratio = dense["median_seconds"] / row["median_seconds"]
    return {"flop_ratio": flop_ratio, "time_ratio": time_ratio, "share_of_flop_ratio": time_ratio / flop_ratio}


def rates(row: Mapping[str, Any], precision: str) -> dict[str, float | None]:
    """FLOP/s of a row, and its MFU where the device's peak is known."""
    flops_per_second = row["flops"] / row["median_seconds"]
    peak = peak_flops(torch.cuda.get_device_name()) if torch.cuda.is_available() and precision != "fp32" else None
    executed = row.get("flops_causal", row["flops"]) / row["median_seconds"]
    return {"tflops": flops_per_second / 1e12, "mfu": None if peak is None else executed / peak}


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "hardware": {**hardware(), "threads": torch.get_num_threads(), "gpu": gpu, **_gpu_facts()},
        "versions": installed_versions(),
        "commit": git_revision(),
    }


def _gpu_facts() -> dict[str, Any]:
    """Memory, driver and CUDA of the GPU; nothing without one."""
    if not torch.cuda.is_available():
        return {}
    ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(ask, capture_output=True, text=True, timeout=30, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError):  # a container may hide the tool
        driver = "unknown"
    memory = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return {"gpu_bytes": memory, "driver": driver, "cuda": torch.version.cuda}


def machine_lines(facts: Mapping[str, Any]) -> Iterator[str]:
    """The same, for people."""
    found = facts["hardware"]
    yield (
        f"{found['gpu'] or 'no GPU'}; {found['processor']}, {found['cores']} cores, "
        f"{found['threads']} thread{'s' if found['threads'] != 1 else ''}"
    )
    if found.get("driver") is not None:
        yield f"{found['gpu_bytes'] / 2**30:.0f} GiB, driver {found['driver']}, CUDA {found['cuda']}"
    yield f"{', '.join(f'{name} {version}' for name, version in facts['versions'].items())}; commit {facts['commit']}"


def step_table(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Markdown: whole steps first, then matrix products alone."""
    yield (
        "| contestant | rank | parameters | GFLOP a step | seconds a step, median (quartiles) | FLOP ratio "
        "| time ratio | share | tokens/s | TFLOP/s | MFU | peak MB |"
    )
    yield "|" + "---|" * 12
    for row in rows:
        cells = [
            row["name"],
            _or_dash(row["rank"], "d"),
            _or_dash(row.get("parameters"), ",d"),
            f"{row['flops'] / 1e9:,.1f}",
            f"{row['median_seconds']:.4f} ({row['first_quartile_seconds']:.4f}–{row['third_quartile_seconds']:.4f})",
            _or_dash(row.get("flop_ratio"), ".3f"),
            _or_dash(row.get("time_ratio"), ".3f"),
            _or_dash(row.get("share_of_flop_ratio"), ".1%"),
            _or_dash(row.get("tokens_per_second"), ",.0f"),
            f"{row['tflops']:.3f}",
            _or_dash(row.get("mfu"), ".1%"),
            "–" if row.get("peak_bytes") is None else f"{row['peak_bytes'] / 1e6:,.0f}",
        ]
        yield "| " + " | ".join(cells) + " |"


def _or_dash(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def rank_table(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Markdown: factor pairs of one layer by rank."""
    yield "| rank | seconds, median (quartiles) | TFLOP/s | cost of a direction, cheapest = 1 |"
    yield "|---|---|---|---|"
    for row in rows:
        quartiles = f"{row['first_quartile_seconds']:.4f}–{row['third_quartile_seconds']:.4f}"
        cells = [str(row["rank"]), f"{row['median_seconds']:.4f} ({quartiles})", f"{row['tflops']:.3f}"]
        yield "| " + " | ".join([*cells, f"{row['cost_of_a_direction']:.3f}"]) + " |"


def verdicts(rows: Sequence[Mapping[str, Any]], precision: str, family: str) -> Iterator[str]:
    """What the targets say of dense and factored; a row that is not there has none."""
    by_name = {row["name"]: row for row in rows}
    dense, factored = by_name.get("dense"), by_name.get("factored")
    if not torch.cuda.is_available():
        if dense and factored and precision == "fp32":
            share = factored["share_of_flop_ratio"]
            yield _verdict("time ratio as a share of the FLOP ratio", share, CPU_SHARE_TARGET)
        yield (
            "No GPU here: where there is one, the same command takes the GPU's rows (bf16, 24 layers, sequence 1024, "
            "MFU), and --largest the largest models."
        )
        return
    if dense and factored:
        target = GPU_TIME_TARGETS[family]
        yield _verdict("time of the factored step over the dense one", 1 / factored["time_ratio"], -target)
    blocks = by_name.get("factored, blocks alone")
    if blocks:
        yield _verdict("the same, counting the blocks alone", 1 / blocks["time_ratio"], -GPU_BLOCKS_TARGET)
    if dense and dense["mfu"] is not None:
        yield _verdict("MFU of the dense step", dense["mfu"], GPU_MFU_TARGET)


def _verdict(what: str, found: float, target: float) -> str:
    """A negative target is an upper bound."""
    met = found >= target if target > 0 else found <= -target
    return f"{what}: {found:.1%}, target {'≥' if target > 0 else '≤'} {abs(target):.0%}, {'met' if met else 'missed'}"


def profile_table(profiles: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    """Markdown: seconds by category, one column a contestant."""
    yield "| seconds of a profiled step | " + " | ".join(profiles) + " |"
    yield "|" + "---|" * (len(profiles) + 1)
    for category in next(iter(profiles.values())):
        cells = [f"{found[category]:.4f} ({found[category] / sum(found.values()):.0%})" for found in profiles.values()]
        yield f"| {category} | " + " | ".join(cells) + " |"
