"""Spectra of `rank.track` against whole matrices, plain autograd and a run without it; after a resume, and in
TensorBoard."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]
from torch import Tensor

from model.collectives import all_gathered
from model.config import ModelConfig, projections
from model.process_groups import data_group, data_index, data_size
from model.spectrum import energy_rank
from pretrain.config.run import RunConfig, parse_config
from pretrain.errors import ConfigError
from pretrain.monitor.spectrum_report import Measurement
from pretrain.monitor.tracking import Tracker
from tests.support.distributed import run
from tests.support.parallel_engine import Case, SmallRun, uniform_ranks
from tests.support.parallel_model import positions_of, small_config, some_tokens
from tests.support.reference import reference_loss
from tests.support.training_runs import curve, train_in_workers, write_config

RANK = 4


def _run_config(model: ModelConfig, precision: str) -> RunConfig:
    settings = model.model_dump(mode="json") | {"bidirectional": False}
    return parse_config(
        {
            "run": {"seed": 1},
            "model": settings,
            "train": {"precision": precision},
            "rank": {"initial": RANK, "quantum": 2, "track": True},
            "data": {"prefix": "corpus", "tokenizer": "tokenizer.model"},
        }
    )


def _svd(matrix: Tensor) -> np.ndarray:
    return np.linalg.svd(matrix.double().numpy(), compute_uv=False)


# Against whole matrices -----------------------------------------------------------------------------------------------


def _measured_and_expected(
    config: ModelConfig, case: Case, grown: int
) -> tuple[Measurement, Measurement, dict[str, dict[str, np.ndarray]]]:
    """Spectra from a tracker at step 0 and after three steps, and the latter from whole matrices."""
    small = SmallRun(config, uniform_ranks(config, RANK), case)
    tracker = Tracker(_run_config(config, case.precision))
    batch = _some_batch(config)
    untrained = tracker.measure(small.engine, None)
    first = small.logical_state()["master"]
    small.train(2)
    if grown:
        small.grow(uniform_ranks(config, grown))
    before = small.logical_state()["master"]
    tracker.watch_gradients(small.engine)
    small.train(1)
    measured = tracker.measure(small.engine, batch)
    last = small.logical_state()["master"]
    expected = {
        "update": {p.name: _svd(_product(last, p.name) - _product(first, p.name)) for p in projections(config)},
        "gradient": _reference_gradients(config, case, small.step - 1, before),
        "representation": _streams(small, batch),
    }
    return untrained, measured, expected


def _some_batch(config: ModelConfig) -> dict[str, Tensor]:
    """A batch with other sequences on every data-parallel process."""
    tokens = some_tokens(config, sequences=2 * data_size())[0][2 * data_index() : 2 * data_index() + 2]
    return {"tokens": tokens, "position_ids": positions_of(tokens)}


def _product(tensors: dict[str, Tensor], name: str) -> Tensor:
    return tensors[f"{name}.B"] @ tensors[f"{name}.A"] if f"{name}.B" in tensors else tensors[f"{name}.weight"]


def _reference_gradients(
    config: ModelConfig, case: Case, step: int, tensors: dict[str, Tensor]
) -> dict[str, np.ndarray]:
    """Gradients of the mean loss over the step's whole batch, which is the one `SmallRun` draws."""
    if config.parametrization != "dense":
        return {}
    sequences = case.micro_batch * case.accumulation * data_size()
    shape = (sequences, config.sequence_length + 1)
    text = torch.randint(0, config.vocabulary, shape, generator=torch.Generator().manual_seed(100 + step))
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    reference_loss(config, {}, leaves, text[:, :-1], text[:, 1:]).mean().backward()
    gradients = {p.name: leaves[f"{p.name}.weight"].grad for p in projections(config)}
    return {name: _svd(gradient) for name, gradient in gradients.items() if gradient is not None}


@torch.no_grad()
def _streams(small: SmallRun, batch: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """Standard deviations along the principal directions, from an SVD of all processes' centred tokens."""
    found: list[Tensor] = []
    layers = small.engine.module.decoder.layers
    hooks = [layer.register_forward_hook(lambda _layer, _inputs, outputs: found.append(outputs[0])) for layer in layers]
    small.engine.eval()
    small.engine(batch["tokens"], batch["position_ids"], None)
    small.engine.train()
    for hook in hooks:
        hook.remove()
    deviations = {}
    for index, stream in enumerate(found):
        whole = stream if stream.shape[-1] == small.config.hidden else all_gathered(stream)
        every = [torch.empty_like(whole) for _ in range(data_size())]
        dist.all_gather(every, whole.contiguous(), group=data_group())
        tokens = torch.cat([one.flatten(0, 1) for one in every]).double()
        deviations[f"layer_{index:02d}"] = _svd(tokens - tokens.mean(dim=0)) / len(tokens) ** 0.5
    return deviations


CASES = [
    ("llama", "dense", 1, Case(stage=0), 0),
    ("gpt2", "dense", 4, Case(stage=2, tensor=2, accumulation=2), 0),
    ("llama", "dense", 2, Case(stage=1, tensor=2, precision="bf16"), 0),
    ("gpt2", "factored", 2, Case(stage=1, tensor=2), 6),
    ("llama", "additive", 2, Case(stage=1, tensor=2), 0),
    ("gpt2", "factored", 2, Case(stage=3), 6),
]
ALL_CASES = [
    *CASES,
    *(
        pytest.param(
            family, parametrization, tensor * 2, Case(stage, precision, tensor, 2), 0, marks=pytest.mark.matrix
        )
        for family in ("llama", "gpt2")
        for parametrization in ("dense", "factored", "additive")
        for tensor in (1, 2)
        for stage, precision in ((0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (2, "fp16"))
    ),
]


@pytest.mark.parametrize(("family", "parametrization", "processes", "case", "grown"), ALL_CASES)
def test_spectra_are_those_of_whole_matrices(
    family: str, parametrization: str, processes: int, case: Case, grown: int
) -> None:
    config = small_config(family, parametrization)
    exact = case.precision == "fp32"
    for untrained, measured, expected in run(_measured_and_expected, processes, config, case, grown):
        assert untrained.gradient == untrained.representation == {}
        for name, values in untrained.update.items():
            # Exact for dense weights; a product's update is known to half of the digits of fp64.
            assert values.max() <= 1e-6 * (parametrization == "factored"), name
        tolerances = {
            "update": 1e-5,
            "gradient": 1e-4 if exact else 5e-2,
            "representation": 1e-4 if exact else 1e-3,
        }
        for quantity, tolerance in tolerances.items():
            found = getattr(measured, quantity)
            assert found.keys() == expected[quantity].keys(), quantity
            for name, values in found.items():
                theirs = expected[quantity][name]
                known = min(len(values), len(theirs))
                assert values[:known] == pytest.approx(theirs[:known], rel=0, abs=tolerance * theirs[0]), name
                assert values[known:] == pytest.approx(0.0, abs=1e-6 * theirs[0])
        assert max(values[0] for values in measured.update.values()) > 1e-3


def test_energy_ranks_by_hand() -> None:
    values = np.array([3.0, 1.0, 1.0, 1.0, 0.0])  # energies 9, 1, 1, 1 of 12
    assert [energy_rank(values, share) for share in (0.5, 0.75, 0.76, 10 / 12, 0.99, 1.0)] == [1, 1, 2, 2, 4, 4]
    assert energy_rank(np.zeros(3), 0.9) == 0


# Whole runs -----------------------------------------------------------------------------------------------------------

DENSE: dict[str, dict[str, Any]] = {
    "model": {"parametrization": "dense"},
    "rank": {"policy": "fixed", "schedule": []},
    "train": {"steps": 6, "validate_every": 2, "validation_sequences": 8},
    "checkpoint": {"every": 2},
}


def _train(corpus: Path, folder: Path, *overrides: str, **sections: dict[str, Any]) -> Path:
    config = write_config(folder.with_suffix(".yaml"), corpus, folder, **sections)
    run(train_in_workers, 2, str(config), ["parallel.tensor=2", *overrides])
    return folder


def _lines(folder: Path) -> list[dict[str, Any]]:
    """The lines of `tracking.jsonl` without the times."""
    lines = [json.loads(line) for line in (folder / "tracking.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


@pytest.fixture(scope="module")
def tracked(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _train(corpus, tmp_path_factory.mktemp("tracked") / "run", "rank.track=true", **DENSE)


def test_a_tracked_run_computes_the_same_numbers(corpus: Path, tmp_path: Path, tracked: Path) -> None:
    plain = _train(corpus, tmp_path / "run", **DENSE)
    assert not (plain / "tracking.jsonl").exists()
    assert curve(tracked) == curve(plain)


def test_a_resumed_run_is_tracked_on(corpus: Path, tmp_path: Path, tracked: Path) -> None:
    folder = _train(corpus, tmp_path / "run", "rank.track=true", **DENSE)
    for step in (4, 6):
        (folder / "checkpoints" / f"step_{step:09d}").rename(tmp_path / str(step))
    config, settings = folder.with_suffix(".yaml"), ["parallel.tensor=2", "rank.track=true"]
    with pytest.raises(ConfigError, match=r"a run with model.initial_std 0.02, now it is 0.03"):
        run(train_in_workers, 2, str(config), [*settings, "model.initial_std=0.03"])
    run(train_in_workers, 2, str(config), settings)
    assert [line["step"] for line in _lines(folder)] == [2, 4, 6]
    assert _lines(folder) == _lines(tracked)


def test_a_tracked_run_shows_what_it_measured(tracked: Path) -> None:
    events = EventAccumulator(str(tracked / "tensorboard"), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    events.Reload()
    numbers = ("spectral_norm", "stable_rank", "effective_rank")
    layers = [f"layer_{layer:02d}" for layer in (0, 1)]
    places = {
        quantity: [f"{a}/{b}" for a in layers for b in ("qkv", "proj", "fc1", "fc2")]
        for quantity in ("update", "gradient")
    }
    places["representation"] = layers
    tags = {
        f"track/{quantity}/{place}/{number}" for quantity in places for place in places[quantity] for number in numbers
    }
    tags |= {f"track/{quantity}/mean_{number}" for quantity in places for number in numbers[1:]}
    assert {tag for tag in events.Tags()["scalars"] if tag.startswith("track/")} == tags
    assert "time/tracking_seconds" in events.Tags()["scalars"]
    pictures = {f"track/{quantity}/singular_values" for quantity in places} | {"track/update/effective_rank_map"}
    assert set(events.Tags()["images"]) == pictures
    assert b"Tracking" in events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]

    for line in _lines(tracked):
        for quantity, where in places.items():
            for place in where:
                described = line[quantity][place]
                shown = {
                    event.step: event.value for event in events.Scalars(f"track/{quantity}/{place}/effective_rank")
                }
                assert shown[line["step"]] == pytest.approx(described["effective_rank"])
                assert 1 <= described["energy_rank_90"] <= described["energy_rank_99"] <= 32
                assert described["singular_values"][0] == pytest.approx(described["spectral_norm"], rel=1e-3)
                assert len(described["singular_values"]) == 32
