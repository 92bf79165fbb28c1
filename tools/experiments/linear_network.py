"""The theory behind growing ranks, in the network it was proved for: three linear layers and gradient descent.

    f(x) = W3 W2 W1 x,      loss ½‖W3 W2 W1 - W*‖²  (the population loss for whitened inputs),      Wi(0) = σ Qi

with orthogonal Qi. Zhao et al. (InRank, arXiv 2306.11250, abstract) state that the cumulative updates Wi(t) - Wi(0)
follow an incremental low-rank trajectory for arbitrary orthogonal initialization. When the Qi are aligned with the
singular vectors of W*, the network falls apart into one equation for each singular value s of W* (Saxe et al., arXiv
1312.6120, for two layers; here three):

    dw/dt = w² (s - w³),      w(0) = σ,      the mode's strength being a = w³

so for small σ mode s is learned at about t = 1/(sσ): one after another, the strongest first. `predicted_steps`
integrates it; `learn` runs gradient descent in fp64 from aligned or from independent orthogonal matrices.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from model.initialization import generator_for

Alignment = Literal["aligned", "independent"]
MATRICES = ("product", "W1", "W2", "W3")
_TOLERANCE = 1e-2
"""Gradient descent ends when every mode is this close to its target, and the loss at its square."""


@dataclass(frozen=True)
class LinearTask:
    """A teacher with distinct singular values, and how the student is trained and watched."""

    size: int = 16
    modes: tuple[float, ...] = (8.0, 6.0, 4.5, 3.0, 2.0)
    learning_rate: float = 0.005
    draws: int = 10
    most_steps: int = 200_000
    seed: int = 1234


@dataclass(frozen=True)
class Trajectory:
    """Singular values of cumulative updates in the course of one training run of every draw."""

    steps: np.ndarray
    """`(times,)`, close together at the start."""
    spectra: dict[str, np.ndarray]
    """For the product W3 W2 W1 and each layer `(times, draws, size)`, largest first."""


def learn(task: LinearTask, scale: float, alignment: Alignment, tick: Callable[[], object]) -> Trajectory:
    """Trains `task.draws` networks from different orthogonal matrices times `scale`; `tick` is called at each step."""
    teacher, weights = _start(task, scale, alignment)
    first = _with_product(weights)
    target = torch.tensor(task.modes, dtype=torch.float64)
    steps: list[int] = []
    found: list[Tensor] = []
    for step in range(task.most_steps + 1):
        W1, W2, W3 = weights
        error = W3 @ W2 @ W1 - teacher.matrix
        last = step == task.most_steps or _has_learned(error, teacher, target)
        if last or not steps or step >= 1.01 * steps[-1]:
            steps.append(step)
            found.append(torch.linalg.svdvals(_with_product(weights) - first))
        if last:
            break
        weights = (
            W1 - task.learning_rate * (W3 @ W2).mT @ error,
            W2 - task.learning_rate * W3.mT @ error @ W1.mT,
            W3 - task.learning_rate * error @ (W2 @ W1).mT,
        )
        tick()
    spectra = torch.stack(found, dim=1).numpy()
    return Trajectory(np.array(steps), dict(zip(MATRICES, spectra, strict=True)))


@dataclass(frozen=True)
class _Teacher:
    """`matrix = left · diag(modes) · rightᵀ`, all with a leading dimension of draws."""

    left: Tensor
    right: Tensor
    matrix: Tensor


def _start(task: LinearTask, scale: float, alignment: Alignment) -> tuple[_Teacher, tuple[Tensor, Tensor, Tensor]]:
    generator = generator_for(task.seed, "linear network")

    def orthogonal() -> Tensor:
        shape = (task.draws, task.size, task.size)
        Q, R = torch.linalg.qr(torch.randn(shape, generator=generator, dtype=torch.float64))
        return Q * R.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)  # uniformly distributed only with these signs

    left, right, inner, outer, third = (orthogonal() for _ in range(5))
    count = len(task.modes)
    modes = torch.tensor(task.modes, dtype=torch.float64)
    matrix = left[..., :count] * modes @ right[..., :count].mT
    aligned = inner @ right.mT, outer @ inner.mT, left @ outer.mT
    weights = aligned if alignment == "aligned" else (inner, outer, third)
    W1, W2, W3 = (scale * weight for weight in weights)
    return _Teacher(left[..., :count], right[..., :count], matrix), (W1, W2, W3)


def _with_product(weights: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """`(4, draws, size, size)`: the product, and the layers."""
    W1, W2, W3 = weights
    return torch.stack([W3 @ W2 @ W1, W1, W2, W3])


def _has_learned(error: Tensor, teacher: _Teacher, target: Tensor) -> bool:
    missing = (teacher.left.mT @ error @ teacher.right).diagonal(dim1=-2, dim2=-1).abs() / target
    relative_loss = error.square().sum(dim=(-2, -1)) / target.square().sum()
    return bool((missing < _TOLERANCE).all() and (relative_loss < _TOLERANCE**2).all())


def predicted_steps(task: LinearTask, scale: float) -> list[float]:
    """Steps until each aligned mode's update of the product passes half of its final size."""
    return [_passing_time(mode, scale) / task.learning_rate for mode in task.modes]


def _passing_time(mode: float, scale: float) -> float:
    """Integral of dw / (w² (s - w³)) from σ to where w³ is half-way between σ³ and s."""
    w = np.geomspace(scale, ((mode + scale**3) / 2.0) ** (1.0 / 3.0), 20_001)
    return float(np.trapezoid(1.0 / (w**2 * (mode - w**3)), w))


def passing_steps(steps: np.ndarray, values: np.ndarray) -> np.ndarray:
    """First step at which `values (times, ...)` reach half of their last entry, for every other index."""
    return steps[np.argmax(values >= values[-1] / 2.0, axis=0)]


@dataclass(frozen=True)
class LearningOrder:
    """How far the singular values of one matrix's update are learned one after another; medians over the draws."""

    half_steps: list[float]
    """When each of the teacher's modes, in order of size, has half of its final singular value in the update."""
    draws_in_order: int
    """Draws in which those steps ascend."""
    next_at_half: float
    """How much of its final value the (k+1)-th singular value has when the k-th passes half; the largest over k."""
    directions_at_first_half: float
    """Singular values above a tenth of the largest one, when that passes half."""
    directions_at_end: float


def learning_order(task: LinearTask, trajectory: Trajectory, matrix: str) -> LearningOrder:
    """Numbers about one of `MATRICES`."""
    spectra, count = trajectory.spectra[matrix], len(task.modes)
    passing = passing_steps(trajectory.steps, spectra[..., :count])
    times, draws = np.searchsorted(trajectory.steps, passing), np.arange(task.draws)
    following = [spectra[times[:, k], draws, k + 1] / spectra[-1, :, k + 1] for k in range(count - 1)]
    return LearningOrder(
        half_steps=np.median(passing, axis=0).tolist(),
        draws_in_order=int((np.diff(passing, axis=1) >= 0).all(axis=1).sum()),
        next_at_half=float(np.median(np.max(following, axis=0))),
        directions_at_first_half=_directions(spectra[times[:, 0], draws]),
        directions_at_end=_directions(spectra[-1]),
    )


def _directions(spectra: np.ndarray) -> float:
    return float(np.median((spectra > 0.1 * spectra[:, :1]).sum(axis=1)))
