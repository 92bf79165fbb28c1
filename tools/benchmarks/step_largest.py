"""The largest dense and the largest factored model that train on a GPU at batch 1: layers by doubling and bisection.

Every trial is a process of its own, for memory that a failed allocation leaves behind would spoil the next one.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from pretrain.errors import ConfigError, EspalierError

Found = TypeVar("Found")
CONTESTANTS = ("dense", "factored")


class DoesNotFitError(EspalierError):
    """The device has too little memory for a model."""

    exit_code = 5


def largest(fits: Callable[[int], Found | None], first: int = 1, step: int = 1) -> tuple[int, Found]:
    """The largest number, to `step`, and what `fits` says of it, for which that is not None; ConfigError if 1 is too
    large.

    `fits` must hold up to some number and not beyond; it is asked for `first` first.
    """
    failing: int | None = None
    fitting, found = first, fits(first)
    while found is None:
        if fitting == 1:
            raise ConfigError(
                "one layer does not fit the device at batch 1: lower --hidden, --vocabulary or --sequence"
            )
        failing, fitting = fitting, fitting // 2
        found = fits(fitting)
    best = found
    while failing is None or failing - fitting > step:
        middle = 2 * fitting if failing is None else (fitting + failing) // 2
        found = fits(middle)
        if found is None:
            failing = middle
        else:
            fitting, best = middle, found
    return fitting, best


def largest_models(
    flags: Sequence[str], names: Sequence[str] = CONTESTANTS, first: int = 1, step: int = 1
) -> list[dict[str, Any]]:
    """A row for each contestant; `flags`: those of `tools/benchmarks/step.py` that every trial gets. Layers are tried
    from `first` on, and found to `step`."""
    if not torch.cuda.is_available():
        raise ConfigError(
            "--largest needs a GPU, and there is none here: it fills a device's memory until nothing more fits"
        )
    rows = []
    for name in names:

        def fits(layers: int, name: str = name) -> dict[str, Any] | None:
            return _trial([*flags, "--contestants", name, "--layers", str(layers)])

        layers, row = largest(fits, first, step)
        kept = {key: row[key] for key in ("name", "rank", "parameters", "peak_bytes")}
        rows.append({**kept, "layers": layers, "device_bytes": torch.cuda.get_device_properties(0).total_memory})
    return rows


def _trial(flags: Sequence[str]) -> dict[str, Any] | None:
    """The row of a model that trains, or None if its device's memory is too small."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "row.json")
        tool = str(Path(__file__).with_name("step.py"))
        fixed = ["--micro-batch", "1", "--warm-up", "1", "--repeats", "1", "--json", str(file)]
        done = subprocess.run([sys.executable, tool, *flags, *fixed], stdout=subprocess.DEVNULL, check=False)
        if done.returncode == DoesNotFitError.exit_code:
            return None
        if done.returncode:
            raise EspalierError(f"a trial of --largest ended with exit code {done.returncode}; its error is above")
        rows: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["rows"]
        return rows[0]


def largest_table(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Markdown."""
    yield "| largest at batch 1 | rank | layers | parameters | peak bytes | bytes a parameter | bytes of the device |"
    yield "|---|---|---|---|---|---|---|"
    for row in rows:
        yield (
            f"| {row['name']} | {row['rank'] or '–'} | {row['layers']} | {row['parameters']:,} | {row['peak_bytes']:,} "
            f"| {row['peak_bytes'] / row['parameters']:.1f} | {row['device_bytes']:,} |"
        )
