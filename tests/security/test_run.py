"""A real run in a process of its own: what it unpickles, what it leaves of its environment, and what a resumed one does
with a checkpoint that means harm."""

import contextlib
import io
import json
import os
import pickle
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from megatron.core import parallel_state

from pretrain.checkpoint.reader import CheckpointReader
from pretrain.config.run import load_config
from pretrain.engine.deepspeed_config import deepspeed_dict
from pretrain.errors import ConfigError
from pretrain.train import run_training
from tests.security.payloads import pickled
from tests.security.planting import command, plant
from tests.support.distributed import run_alone
from tests.support.training_runs import write_config
from tools import consolidate_checkpoint, densify_checkpoint

SECRETS = {
    name: f"marked_secret_{number}"
    for number, name in enumerate(
        ["HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY", "GITHUB_TOKEN", "NCCL_ESPALIER_SECRET", "PYTHON_SECRET"]
    )
}
SHOWN = "folder_that_is_shown"
"""Marks what a run does write down, so that a search that finds nothing is known to search."""
SECTIONS: dict[str, dict[str, Any]] = {
    "model": {"layers": 1, "hidden": 16, "heads": 2, "sequence_length": 16},
    "train": {
        "steps": 5, "micro_batch": 2, "global_batch": 2, "log_every": 1, "validate_every": 2, "validation_sequences": 2,
    },
    "rank": {
        "policy": "gradient", "probe": 2, "initial": 2, "quantum": 2, "check_every": 4, "stop_step": 9, "budget": 0.9,
        "schedule": [], "track": True,
    },
    "checkpoint": {"every": 1, "keep": 3},
}  # fmt: skip
DISTRIBUTED = "distributed_c10d.py"


def audited_runs(folder: str, config: str) -> None:
    """Trains; trains further from a checkpoint whose probe file is a pickle. `found.json` says what was unpickled, and
    how the second run ended."""
    unpickled: list[tuple[str, list[str]]] = []

    def listen(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "pickle.find_class":
            files = [Path(frame.filename).name for frame in traceback.extract_stack()]
            unpickled.append((".".join(map(str, arguments[-2:])), files))

    sys.addaudithook(listen)
    with _output_in(Path(folder, "output.txt")):
        trainer = run_training(load_config(config), dist.get_world_size())
        assert trainer is not None
        during_training = len(unpickled)
        pickle.loads(pickle.dumps(Path("x")))  # the listener listens
        parallel_state.destroy_model_parallel()
        step = CheckpointReader(Path(trainer.config.run.folder, "checkpoints", "step_000000003")).folder
        plant(step / "probe.safetensors", pickled(Path(folder, "canary")))
        for newer in step.parent.glob("step_00000000[45]"):
            newer.rename(Path(folder, newer.name))
        refusal = ""
        try:
            run_training(load_config(config), dist.get_world_size())
        except Exception as error:
            refusal = f"{type(error).__name__}: {error}"
    found = {"training": unpickled[:during_training], "own": unpickled[during_training:], "refusal": refusal}
    Path(folder, "found.json").write_text(json.dumps(found))


@contextlib.contextmanager
def _output_in(path: Path) -> Iterator[None]:
    """Whatever this process prints, from Python and below, goes into a file."""
    with path.open("wb") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
        yield
        sys.stdout.flush()
        sys.stderr.flush()


@pytest.fixture(scope="module")
def trained(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What `audited_runs` leaves, with a consolidated model and an export of it, all made in an environment with
    secrets."""
    folder = tmp_path_factory.mktemp("trained")
    config = write_config(folder / "run.yaml", world / "corpus", folder / SHOWN, **SECTIONS)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SECRETS.items():
            patch.setenv(name, value)
        assert run_alone(audited_runs, 1, str(folder), str(config)) == [0]
        last = folder / "step_000000005"
        with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.redirect_stderr(output):
            command(consolidate_checkpoint, "--checkpoint", last, "--output", folder / "consolidated")
            command(densify_checkpoint, "--input", folder / "consolidated", "--output", folder / "dense")
        (folder / "tools.txt").write_text(output.getvalue())
        yield folder


def found(folder: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((folder / "found.json").read_text())
    return facts


def test_a_run_unpickles_nothing_but_what_processes_tell_each_other(trained: Path) -> None:
    facts = found(trained)
    assert [name for name, _ in facts["own"]][:1] == ["pathlib.PosixPath"]
    assert facts["training"], "process 0 gathers records of shards"
    assert [name for name, files in facts["training"] if DISTRIBUTED not in files] == []


@pytest.mark.faults
def test_a_pickle_among_the_extra_files_ends_a_resumed_run(trained: Path) -> None:
    refusal = found(trained)["refusal"]
    assert refusal.startswith("CheckpointError: ")
    assert "probe.safetensors is not a whole safetensors file" in refusal
    assert "\n" not in refusal
    assert not (trained / "canary").exists()


def files_with(folder: Path, text: str) -> list[str]:
    """Files below `folder` that hold `text`, also as 16-bit characters, or have it in their name."""
    forms = (text.encode(), text.encode("utf-16-le"))
    return sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and (any(form in path.read_bytes() for form in forms) or text in path.name)
    )


def test_secrets_of_the_environment_are_written_nowhere(trained: Path) -> None:
    shown = files_with(trained, SHOWN)
    for file in ("config.yaml", "events.jsonl", "summary.json", "checkpoints/step_000000003/manifest.json"):
        assert f"{SHOWN}/{file}" in shown
    assert {"output.txt", "step_000000005/manifest.json"} <= set(shown)
    assert any("tfevents" in file for file in files_with(trained, "train/lm_loss"))
    kinds = {path.suffix for path in trained.rglob("*") if path.is_file()}
    assert {".json", ".jsonl", ".yaml", ".safetensors", ".model", ".npy", ".txt"} <= kinds
    for secret in [*SECRETS, *SECRETS.values()]:
        assert files_with(trained, secret) == []


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"wandb": {"enabled": True, "api_key": "marked_secret"}}, "wandb"),
        ({"comet": {"enabled": True, "api_key": "marked_secret"}}, "comet"),
        ({"hf_token": "marked_secret"}, "hf_token"),
        ({"zero_optimization": {"stage": 1, "token": "marked_secret"}}, "zero_optimization.token"),
    ],
)
def test_a_key_in_a_deepspeed_file_is_refused_and_not_repeated(
    content: dict[str, Any], named: str, world: Path, tmp_path: Path
) -> None:
    (tmp_path / "deepspeed.json").write_text(json.dumps(content))
    config = load_config(str(world / "settings" / "run.yaml"), [f"deepspeed.config={tmp_path / 'deepspeed.json'}"])
    with pytest.raises(ConfigError) as refused:
        deepspeed_dict(config, config.parallel_layout(1))
    assert named in str(refused.value)
    assert "marked_secret" not in str(refused.value)


@pytest.mark.parametrize("override", ["run.token=marked_secret", "secrets.token=marked_secret"])
def test_a_setting_that_does_not_exist_is_refused_and_not_repeated(override: str, world: Path) -> None:
    with pytest.raises(ConfigError, match="there is no setting") as refused:
        load_config(str(world / "settings" / "run.yaml"), [override])
    assert "marked_secret" not in str(refused.value)
