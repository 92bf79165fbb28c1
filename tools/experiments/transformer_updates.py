"""The singular values of a small transformer's cumulative updates W(t) - W(0), under plain SGD and under Adam.

What `tools/experiments/linear_network.py` shows where the theory holds exactly, watched where nothing is proved: a
dense model of ours (`model.gpt.build_model`) on real text, the standard library's source, in one process and in fp32,
without weight decay, momentum, dropout or a schedule, which would all shape the updates.

Singular values are sorted anew at each measurement, so the k-th curve is a rank in that order and not one direction.
The null to compare with is a random walk: the sum of t independent random updates has singular values that all grow
like √t, so every one of them passes half of its final value at a quarter of the run, whatever its place in the order.
"""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from model.config import ModelConfig, projections
from model.gpt import EspalierModel, build_model, tensor_layouts
from model.initialization import generator_for
from model.process_groups import device, single_process
from model.spectrum import energy_rank, matrix_singular_values
from pretrain.monitor.spectrum_report import spectrum_scalars
from pretrain.tokenizer.base import Tokenizer
from tools.corpus.documents import find_files, read_documents
from tools.experiments.linear_network import passing_steps
from tools.train_tokenizer import train_tokenizer, write_tokenizer

OptimizerName = Literal["sgd", "adam"]
PLACES = (1, 2, 4, 8, 16, 32)
"""Places k in the order of singular values that are reported."""


@dataclass(frozen=True)
class TransformerTask:
    """The model, the text and the length of the runs."""

    hidden: int = 64
    layers: int = 2
    heads: int = 4
    sequence_length: int = 64
    vocabulary: int = 1024
    sequences: int = 16
    """Sequences of one step."""
    steps: int = 2000
    learning_rates: tuple[tuple[OptimizerName, float], ...] = (("sgd", 0.5), ("adam", 1e-3))
    measurements: int = 60
    files_between: int = 12
    """Every so many of the standard library's files are read."""
    seed: int = 1234


@dataclass(frozen=True)
class Run:
    """One optimizer's run."""

    steps: np.ndarray
    """`(times,)` of the measurements, from 0 on."""
    losses: np.ndarray
    """`(times - 1,)` nats a token, means over the steps between two measurements."""
    spectra: dict[str, np.ndarray]
    """By `Projection.label`, `(times, min(out, in))`, largest first."""


@dataclass(frozen=True)
class UpdateNumbers:
    """What a run says about the order of learning; medians over the projections."""

    half_steps: dict[int, float]
    """By place k: when the k-th singular value of the update passes half of its final value."""
    effective_ranks: dict[int, float]
    """By step."""
    energy_ranks: dict[int, float]
    """By step: directions that hold 90 % of the update's energy."""
    final_loss: float


def train(task: TransformerTask, optimizer: OptimizerName, tick: Callable[[], object]) -> Run:
    """Trains from the same initial values on the same batches whatever the optimizer."""
    rate = dict(task.learning_rates)[optimizer]
    tokens = _tokens(task)
    config = ModelConfig(
        hidden=task.hidden,
        layers=task.layers,
        heads=task.heads,
        sequence_length=task.sequence_length,
        vocabulary=task.vocabulary,
        parametrization="dense",
    )
    with single_process():
        model = build_model(config, {}, seed=task.seed)
        steps: torch.optim.Optimizer = (
            torch.optim.SGD(model.parameters(), lr=rate)
            if optimizer == "sgd"
            else torch.optim.Adam(model.parameters(), lr=rate, betas=(0.9, 0.95))
        )
        return _train(model, steps, _batches(task, tokens), task, tick)


def _tokens(task: TransformerTask) -> Tensor:
    """Ids of some of the standard library's files, one behind the other."""
    files = find_files(["stdlib"])[:: task.files_between]
    with tempfile.TemporaryDirectory() as folder:
        serialized = train_tokenizer(files, vocabulary=task.vocabulary, seed=task.seed)
        tokenizer: Tokenizer = write_tokenizer(serialized, Path(folder, "tokenizer.model"))
    ids: list[int] = []
    for document in read_documents(files, ["text"]):
        ids += [*tokenizer.encode(document.text), tokenizer.end_of_document]
    return torch.tensor(ids)


def _batches(task: TransformerTask, tokens: Tensor) -> Iterator[Tensor]:
    """Endlessly `(sequences, sequence_length + 1)` from random places."""
    generator = generator_for(task.seed, "batches")
    window = torch.arange(task.sequence_length + 1)
    while True:
        starts = torch.randint(len(tokens) - task.sequence_length - 1, (task.sequences, 1), generator=generator)
        yield tokens[starts + window]


def _train(
    model: EspalierModel,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[Tensor],
    task: TransformerTask,
    tick: Callable[[], object],
) -> Run:
    weights = {p.label: model.get_submodule(p.name).weight for p in projections(model.model_config)}
    layouts = {p.label: tensor_layouts(model)[f"{p.name}.weight"] for p in projections(model.model_config)}
    first = {label: weight.detach().clone() for label, weight in weights.items()}
    positions = torch.arange(task.sequence_length, device=device()).expand(task.sequences, -1)
    measured = _measured_steps(task)
    spectra: dict[str, list[Tensor]] = {label: [] for label in weights}
    losses: list[list[float]] = [[] for _ in measured[1:]]
    for step in range(task.steps + 1):
        if step in measured:
            for label, weight in weights.items():
                spectra[label].append(matrix_singular_values(weight - first[label], layouts[label]).cpu())
        if step == task.steps:
            break
        text = next(batches).to(device())
        loss = model(text[:, :-1], positions, None, labels=text[:, 1:].contiguous()).mean()
        losses[int(np.searchsorted(measured, step, side="right")) - 1].append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        tick()
    means = np.array([np.mean(some) for some in losses])
    return Run(measured, means, {label: torch.stack(values).numpy() for label, values in spectra.items()})


def _measured_steps(task: TransformerTask) -> np.ndarray:
    """0 to the last step, close together at the start."""
    return np.unique([0, *np.geomspace(1, task.steps, task.measurements).round().astype(int)])


def update_numbers(run: Run) -> UpdateNumbers:
    """The numbers of one run."""
    spectra = np.stack(list(run.spectra.values()))
    half = np.median([passing_steps(run.steps, values) for values in spectra], axis=0)

    def by_step(number: Callable[[np.ndarray], float]) -> dict[int, float]:
        return {
            int(step): float(np.median([number(values) for values in spectra[:, time]]))
            for time, step in enumerate(run.steps)
        }

    places = [place for place in PLACES if place <= spectra.shape[2]]
    return UpdateNumbers(
        half_steps={place: float(half[place - 1]) for place in places},
        effective_ranks=by_step(lambda values: spectrum_scalars(values)["effective_rank"]),
        energy_ranks=by_step(lambda values: energy_rank(values, 0.9)),
        final_loss=float(run.losses[-1]),
    )
