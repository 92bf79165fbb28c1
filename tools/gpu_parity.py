"""Is what the GPU computes what the CPU computes? One table; exit code 1 if it is not.

    python tools/gpu_parity.py --json parity.json
    python tools/gpu_parity.py --dry                       (no GPU: the CPU against itself, in small sizes)

The reference is the CPU's fp32, taken by a process that sees no GPU. Both take the product's own code, which chooses
fused kernels for tensors on a GPU, so every row says of those, too, what they are against elementary operations:

losses, gradients   both families; factored, MLPs only, additive, dense; causal, within documents, both directions (as
                    a masked language model has it); fp32 and bf16; and a wide layer of each family
recomputation       gradients with `factors` and `layers` against those without, dropout on
dropout             the same masks again, kept share and mean of what is kept
spectra             singular values of all layers against the SVD of whole products in fp64

    error of a loss = |found - reference| / |reference|
    error of a gradient = max over parameters of ‖found - reference‖ / max(‖reference‖, 1e-2 ‖all gradients‖)
"""

import argparse
import math
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.config import ARCHITECTURES, Family, ModelConfig, Recompute, factored_projections
from model.gpt import EspalierModel, build_model
from model.layers.dropout import CounterDropout, DropoutCounter
from model.process_groups import device, initialize_process_groups, single_process
from pretrain.data.document_mask import outside_mask
from pretrain.disk import json_text, replace_text
from pretrain.distributed import joined_processes
from pretrain.errors import ConfigError, EspalierError, run_command
from pretrain.growth.spectra import measure_spectra
from tools.arguments import output_file
from tools.benchmarks.step_report import machine, machine_lines

ALLOWED = {torch.float32: (2e-5, 5e-4), torch.bfloat16: (5e-3, 6e-2)}
"""Errors of loss and gradient by type."""
DROPOUT = 0.1

Row = dict[str, Any]
Gradients = dict[str, Tensor]


class DiffersError(EspalierError):
    """Some rows are beyond what rounding explains."""

    exit_code = 1


@dataclass(frozen=True)
class Case:
    """A small model, and what its tokens may look at."""

    family: Family
    kind: str
    """A parametrization, or `mlp`: factored, MLPs only."""
    attention: str = "causal"
    """Or `documents`, or `both directions`."""
    wide: bool = False

    def config(self, dry: bool, **more: Any) -> ModelConfig:
        """Its model."""
        sizes: dict[str, Any] = {"layers": 2, "hidden": 128, "heads": 4, "sequence_length": 64, "vocabulary": 500}
        if not dry:
            sizes = {"layers": 3, "hidden": 256, "heads": 4, "sequence_length": 128, "vocabulary": 1000}
            if self.wide:
                sizes = {"layers": 1, "hidden": 1024, "heads": 16, "sequence_length": 256, "vocabulary": 50257}
        if ARCHITECTURES[self.family].grouped_queries:
            sizes["query_groups"] = sizes["heads"] // 2
        kind = {"parametrization": "factored", "factored_layers": "mlp"} if self.kind == "mlp" else {}
        directions = {"bidirectional": self.attention == "both directions"}
        return ModelConfig.model_validate(
            {"family": self.family, "parametrization": self.kind, **sizes, **kind, **directions, **more}
        )

    def __str__(self) -> str:
        return f"{self.family}, {self.kind}, {self.attention}{', wide' if self.wide else ''}"


CASES = [
    *(Case(f, kind, a) for f in ARCHITECTURES for kind in ("factored", "dense") for a in ("causal", "documents")),
    *(Case(f, kind) for f in ARCHITECTURES for kind in ("mlp", "additive")),
    *(Case(f, "factored", "both directions") for f in ARCHITECTURES),
    *(Case(f, "factored", wide=True) for f in ARCHITECTURES),
]


def main() -> None:
    arguments = _arguments()
    if arguments.reference is not None:
        with single_process():
            torch.save(
                {str(case): passes(case.config(arguments.dry), case.attention)[:2] for case in CASES},
                arguments.reference,
            )
        return
    if not arguments.dry and not torch.cuda.is_available():
        raise ConfigError("there is no GPU that torch can use: --dry compares the CPU with itself")
    expected = _expected(arguments.dry)
    rows: list[Row] = []
    with joined_processes() as processes:
        if processes > 1:
            raise ConfigError(f"this compares one process, and {processes} were started: start it alone")
        initialize_process_groups(1)
        for case in CASES:
            loss, gradients = expected[str(case)]
            for dtype, (loss_allowed, gradient_allowed) in ALLOWED.items():
                found, found_gradients, _ = passes(case.config(arguments.dry), case.attention, dtype=dtype)
                name = f"{case}, {str(dtype).removeprefix('torch.')}"
                _add(rows, f"{name}: loss", relative(found, loss), loss_allowed)
                worst, error = worst_gradient(found_gradients, gradients)
                _add(rows, f"{name}: gradient", error, gradient_allowed, worst)
        for family in ARCHITECTURES:
            _compare_recomputation(rows, family, arguments.dry)
        _compare_dropout(rows)
        _compare_spectra(rows, arguments.dry)
    facts = {"benchmark": "parity", "dry": arguments.dry, **machine(), "rows": rows}
    print("\n".join(["", *machine_lines(facts)]))
    if arguments.json is not None:
        replace_text(arguments.json, json_text(facts, indent=2) + "\n")
    failed = [row["check"] for row in rows if not row["ok"]]
    if failed:
        raise DiffersError(f"{len(failed)} of {len(rows)} rows differ, the first is {failed[0]}")


def _expected(dry: bool) -> dict[str, tuple[Tensor, Gradients]]:
    """The CPU's losses and gradients, by a process that sees no GPU: NCCL would refuse its tensors."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "reference.pt")
        hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
        command = [sys.executable, __file__, "--reference", str(file), *(["--dry"] if dry else [])]
        subprocess.run(command, env=hidden, check=True)
        expected: dict[str, tuple[Tensor, Gradients]] = torch.load(file, weights_only=True)
        return expected


def passes(
    config: ModelConfig, attention: str, *, dtype: torch.dtype = torch.float32, recompute: Recompute = "none"
) -> tuple[Tensor, Gradients, EspalierModel]:
    """Losses `(2, seq)` in fp32, gradients by parameter, both on the host, and the model."""
    rank = config.hidden // 4
    model = build_model(config, {p.name: rank for p in factored_projections(config)}, seed=1, recompute=recompute)
    model = model.to(device(), dtype)
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(0, config.vocabulary, (2, config.sequence_length + 1), generator=generator).to(device())
    positions = torch.arange(config.sequence_length, device=device()).expand(2, -1)
    mask = None
    if attention == "documents":
        positions = positions % 50
        mask = outside_mask(positions, dtype, causal=True)
    loss = model(text[:, :-1].contiguous(), positions, mask, labels=text[:, 1:].contiguous())
    weights = torch.rand(loss.shape, generator=generator).to(loss.device)  # tokens count differently, as behind a mask
    (loss * weights).mean().backward()
    gradients = {name: p.grad.float().cpu() for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach().float().cpu(), gradients, model


def relative(found: Tensor, reference: Tensor) -> float:
    """‖found - reference‖ / ‖reference‖."""
    difference = (found.double().cpu() - reference.double().cpu()).norm()
    return float(difference / reference.double().cpu().norm().clamp_min(1e-30))


def worst_gradient(found: Gradients, reference: Gradients) -> tuple[str, float]:
    """The parameter with the largest error, and the error, by this module's equation."""
    if found.keys() != reference.keys():
        return "other parameters have gradients", math.inf
    total = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in reference.values()))
    errors = {}
    for name, gradient in reference.items():
        difference = float((found[name].double() - gradient.double()).norm())
        errors[name] = difference / max(float(gradient.double().norm()), 1e-2 * total)
    worst = max(errors, key=lambda name: math.inf if math.isnan(errors[name]) else errors[name])
    return worst, errors[worst]


def _compare_recomputation(rows: list[Row], family: Family, dry: bool) -> None:
    config = Case(family, "factored").config(dry, hidden_dropout=DROPOUT, attention_dropout=DROPOUT)
    loss, gradients, _ = passes(config, "causal")
    again, _, _ = passes(config, "causal")
    _add(rows, f"{family}: the same masks again", relative(again, loss), 0.0)
    kinds: tuple[Recompute, ...] = ("factors", "layers")
    for recompute in kinds:
        worst, error = worst_gradient(passes(config, "causal", recompute=recompute)[1], gradients)
        _add(rows, f"{family}: gradient, recompute {recompute}", error, 1e-5, worst)


def _compare_dropout(rows: list[Row]) -> None:
    """Checks dropout on ones: a share of 1 - p is kept and becomes 1 / (1 - p); six deviations are allowed."""
    for dtype in ALLOWED:
        ones = torch.ones(1000, 1000, device=device(), dtype=dtype)
        dropped = CounterDropout(DropoutCounter(1), DROPOUT, 1, "attention_output", sharded=True)(ones)
        kept = dropped[dropped != 0].double()
        deviation = math.sqrt(DROPOUT * (1 - DROPOUT) / ones.numel())
        name = f"dropout, {str(dtype).removeprefix('torch.')}"
        _add(rows, f"{name}: kept share", abs(kept.numel() / ones.numel() - (1 - DROPOUT)), 6 * deviation)
        _add(rows, f"{name}: what is kept", relative(kept, torch.full_like(kept, 1 / (1 - DROPOUT))), 4e-3)


def _compare_spectra(rows: list[Row], dry: bool) -> None:
    for family in ARCHITECTURES:
        model = passes(Case(family, "factored").config(dry), "causal")[2]
        errors = [0.0]
        for name, values in measure_spectra(model).items():
            layer = model.factored_layers()[name]
            product = layer.B.detach().double().cpu() @ layer.A.detach().double().cpu()
            errors.append(relative(values, torch.linalg.svdvals(product)[: len(values)]))
        _add(rows, f"{family}: singular values of {len(errors) - 1} layers", max(errors), 1e-5)


def _add(rows: list[Row], check: str, found: float, allowed: float, where: str = "") -> None:
    passed = found <= allowed  # NaN is not
    rows.append({"check": check, "found": found, "allowed": allowed, "where": where, "ok": passed})
    print(f"{'ok  ' if passed else 'FAIL'} {check:62s} {found:.1e} (allowed {allowed:.0e}) {where}", flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare what the GPU computes with what the CPU computes.")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write all rows as JSON")
    parser.add_argument("--dry", action="store_true", help="without a GPU: the CPU against itself, in small sizes")
    parser.add_argument("--reference", type=Path, help=argparse.SUPPRESS)  # the process that sees no GPU
    return parser.parse_args()


if __name__ == "__main__":
    run_command(main)
