"""Directions are learned one after another where the theory says so, and all at once where it does not."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tools.experiments import incremental_learning
from tools.experiments.linear_network import LinearTask, learn, learning_order, passing_steps, predicted_steps
from tools.experiments.transformer_updates import TransformerTask, train, update_numbers

SMALL = LinearTask(size=6, modes=(4.0, 2.5, 1.5), learning_rate=0.01, draws=4)
TINY = TransformerTask(hidden=16, layers=1, heads=2, sequence_length=16, vocabulary=400, sequences=2, files_between=150)


def _no_tick(_steps: int = 1) -> None:
    pass


@pytest.mark.parametrize("scale", [0.03, 0.1])
def test_a_small_start_learns_modes_one_after_another(scale: float) -> None:
    for alignment in ("aligned", "independent"):
        trajectory = learn(SMALL, scale, alignment, _no_tick)
        assert not trajectory.spectra["product"][0].any()
        for matrix in ("product", "W1", "W2", "W3"):
            order = learning_order(SMALL, trajectory, matrix)
            assert order.draws_in_order == SMALL.draws
            assert (np.diff(order.half_steps) > 0).all()
            assert order.directions_at_end == len(SMALL.modes)
        order = learning_order(SMALL, trajectory, "product")
        assert order.next_at_half < 0.05
        assert order.directions_at_first_half == 1.0
        learned = np.sort(trajectory.spectra["product"][-1, :, : len(SMALL.modes)], axis=1)[:, ::-1]
        assert learned == pytest.approx(np.tile(SMALL.modes, (SMALL.draws, 1)), rel=0.02)
        if alignment == "aligned":
            assert order.half_steps == pytest.approx(predicted_steps(SMALL, scale), rel=0.03)


def test_a_large_start_learns_them_together() -> None:
    order = learning_order(SMALL, learn(SMALL, 1.0, "independent", _no_tick), "product")
    assert order.next_at_half > 0.3
    assert order.directions_at_first_half > 2.0
    assert order.directions_at_end > len(SMALL.modes)  # what it starts with must be unlearned


def test_passing_steps_by_hand() -> None:
    values = np.array([[0.0, 0.0], [1.0, 3.0], [2.0, 5.0], [4.0, 4.0]])
    assert passing_steps(np.array([0, 10, 20, 30]), values).tolist() == [20, 10]


def test_a_transformer_gives_the_same_numbers_twice() -> None:
    task = replace(TINY, steps=12, measurements=5)
    runs = [train(task, "adam", _no_tick) for _ in range(2)]
    assert np.array_equal(runs[0].losses, runs[1].losses)
    assert runs[0].steps[0] == 0
    assert runs[0].steps[-1] == 12
    for label in ("layer_00/qkv", "layer_00/proj", "layer_00/fc1", "layer_00/fc2"):
        values = runs[0].spectra[label]
        assert np.array_equal(values, runs[1].spectra[label])
        assert values.shape == (len(runs[0].steps), 16)
        assert not values[0].any()
        # Adam's first step moves every entry by the learning rate: ‖D‖ = rate · √entries.
        assert np.linalg.norm(values[1]) == pytest.approx(1e-3 * (16 * _other_side(label)) ** 0.5, rel=0.01)
    numbers = update_numbers(runs[0])
    assert list(numbers.half_steps) == [1, 2, 4, 8, 16]
    assert numbers.effective_ranks.keys() == numbers.energy_ranks.keys() == set(runs[0].steps)


def _other_side(label: str) -> int:
    return {"qkv": 48, "proj": 16, "fc1": 128, "fc2": 64}[label.partition("/")[2]]


@pytest.mark.slow
def test_plain_descent_starts_with_few_directions() -> None:
    task = replace(TransformerTask(), steps=600)
    sgd, adam = (update_numbers(train(task, optimizer, _no_tick)) for optimizer in ("sgd", "adam"))
    middle = next(step for step in sgd.energy_ranks if step > 100)
    assert sgd.energy_ranks[middle] < 6 < 20 < adam.energy_ranks[middle]
    assert list(sgd.half_steps.values()) == sorted(sgd.half_steps.values())


def test_the_command_leaves_pictures_and_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(incremental_learning, "LINEAR", SMALL)
    monkeypatch.setattr(incremental_learning, "TRANSFORMER", replace(TINY, steps=10))
    output, numbers = tmp_path / "new" / "pictures", tmp_path / "numbers.json"
    monkeypatch.setattr(sys, "argv", ["incremental_learning.py", "--output", str(output), "--json", str(numbers)])
    incremental_learning.main()
    for picture in ("linear_network.png", "transformer_updates.png"):
        assert (output / picture).read_bytes().startswith(b"\x89PNG")
    found = json.loads(numbers.read_text())
    assert found["linear"]["found"]["0.1 aligned product"]["draws_in_order"] == SMALL.draws
    assert set(found["transformer"]["found"]) == {"sgd", "adam"}
