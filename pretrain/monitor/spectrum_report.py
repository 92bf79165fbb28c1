"""Reports spectra: a few numbers for each, TensorBoard tags, and lines of `tracking.jsonl`."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from model.spectrum import energy_rank

QUANTITIES = ("update", "gradient", "representation")
_MEANS = ("stable_rank", "effective_rank")
_DIGITS = 4
TRACKING_CHARTS = {
    "Tracking": {
        **{
            f"{number} rank, means over the layers": ["Multiline", [f"track/.*/mean_{number}_rank"]]
            for number in ("effective", "stable")
        },
        **{
            f"{number} rank of {quantity}s": ["Multiline", [f"track/{quantity}/layer_.*/{number}_rank"]]
            for quantity in QUANTITIES
            for number in ("effective", "stable")
        },
    }
}


@dataclass(frozen=True)
class Measurement:
    """Singular values, largest first. What was not measured, or was not finite, is absent."""

    update: dict[str, np.ndarray]
    """Spectra by `Projection.name`, `(min(out, in),)`, or `(2 rank,)` of factors."""
    gradient: dict[str, np.ndarray]
    """Spectra of dense projections, by `Projection.name`."""
    representation: dict[str, np.ndarray]
    """Standard deviations `(hidden,)` along the principal directions, by layer (`layer_00` and so on)."""
    seconds: float


def spectrum_scalars(singular_values: np.ndarray) -> dict[str, float]:
    """Spectral norm s₁, stable rank Σs²/s₁², and effective rank exp(entropy of s/Σs), from values sorted downwards."""
    largest, total = float(singular_values[0]), float(singular_values.sum())
    if largest <= 0.0:
        return {"spectral_norm": 0.0, "stable_rank": 0.0, "effective_rank": 0.0}
    share = singular_values[singular_values > 0.0] / total
    return {
        "spectral_norm": largest,
        "stable_rank": float((singular_values**2).sum()) / largest**2,
        "effective_rank": math.exp(float(-(share * np.log(share)).sum())),
    }


def tracking_record(measurement: Measurement, labels: Mapping[str, str]) -> dict[str, Any]:
    """One line of `tracking.jsonl`: for each quantity and layer the numbers and the rounded singular values.

    `labels`: short names by `Projection.name`.
    """
    record: dict[str, Any] = {"seconds": measurement.seconds}
    for quantity in QUANTITIES:
        spectra: dict[str, np.ndarray] = getattr(measurement, quantity)
        record[quantity] = {labels.get(name, name): _described(values) for name, values in spectra.items()}
    return record


def _described(singular_values: np.ndarray) -> dict[str, Any]:
    return {
        **spectrum_scalars(singular_values),
        "energy_rank_90": energy_rank(singular_values, 0.90),
        "energy_rank_99": energy_rank(singular_values, 0.99),
        "singular_values": rounded(singular_values),
    }


def rounded(singular_values: np.ndarray) -> list[float]:
    """Singular values rounded for files."""
    return [float(f"{value:.{_DIGITS}g}") for value in singular_values]


def tracking_scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """TensorBoard tags of a line: `track/<quantity>/<layer>/<number>`, and means over the layers."""
    scalars = {"time/tracking_seconds": record["seconds"]}
    for quantity in QUANTITIES:
        layers: Mapping[str, Mapping[str, float]] = record[quantity]
        for layer, numbers in layers.items():
            for number in ("spectral_norm", *_MEANS):
                scalars[f"track/{quantity}/{layer}/{number}"] = numbers[number]
        for number in _MEANS if layers else ():
            mean = sum(numbers[number] for numbers in layers.values()) / len(layers)
            scalars[f"track/{quantity}/mean_{number}"] = mean
    return scalars


def effective_ranks_of_updates(record: Mapping[str, Any]) -> dict[str, float]:
    """Effective ranks of the updates in one line of `tracking.jsonl`, by layer label."""
    return {layer: numbers["effective_rank"] for layer, numbers in record["update"].items()}
