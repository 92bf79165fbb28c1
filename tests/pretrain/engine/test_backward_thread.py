"""Training with backward passes in a thread of their own, as autograd runs them on CUDA, gives the same losses to the
last bit. Anything that depends on the thread (context variables, grad mode, hooks of ZeRO) would show."""

import threading
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from pretrain.config.run import load_config
from pretrain.engine.build import tear_down
from pretrain.train import run_training
from tests.support.distributed import run
from tests.support.training_runs import curve, write_config

DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
GRADIENT = {"policy": "gradient", "schedule": [], "check_every": 3, "stop_step": 4, "probe": 2, "threshold": 0.5}
GROWING = {"schedule": [{"step": 2, "rank": 6}]}
FIXED = {"policy": "fixed", "schedule": []}


def _case(stage: int, recompute: str, dropout: bool) -> dict[str, dict[str, Any]]:
    model = DROPOUT if dropout else {}
    return {"model": model, "train": {"recompute": recompute}, "deepspeed": {"stage": stage}, "rank": GROWING}


CASES: dict[str, dict[str, dict[str, Any]]] = {
    "zero_1_dropout": _case(1, "none", True),
    "zero_2_factors": _case(2, "factors", True),
    "zero_3_layers": _case(3, "layers", False),
    "gradient": {"rank": GRADIENT, "deepspeed": {"stage": 3}, "train": {"recompute": "factors"}},
    "tracking": {"model": {"parametrization": "dense"}, "rank": {**FIXED, "track": True}},
}
MATRIX = {
    f"zero_{stage}_{recompute}_{'dropout' if dropout else 'plain'}": _case(stage, recompute, dropout)
    for stage, recompute, dropout in product((1, 2, 3), ("none", "factors", "layers"), (False, True))
}


def elsewhere(run_backward: Callable[..., Any]) -> Callable[..., Any]:
    """`run_backward` in a new thread with the caller's grad mode, as in autograd's threads."""

    def run_in_thread(*args: Any, **kwargs: Any) -> Any:
        results: list[Any] = []
        errors: list[BaseException] = []
        grad_enabled = torch.is_grad_enabled()

        def work() -> None:
            try:
                with torch.set_grad_enabled(grad_enabled):
                    results.append(run_backward(*args, **kwargs))
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        if errors:
            raise errors[0]
        return results[0]

    return run_in_thread


def train_both_ways(config: str, folders: list[str]) -> list[int]:
    """Trains in `folders[0]` as usual, and in `folders[1]` with backward passes in another thread; the number of
    backward passes of each."""
    run_backward, passes = torch.autograd._engine_run_backward, []
    for folder, around in zip(folders, (lambda function: function, elsewhere), strict=True):
        count = 0

        def counted(*args: Any, around: Any = around, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            return around(run_backward)(*args, **kwargs)

        torch.autograd._engine_run_backward = counted
        try:
            trainer = run_training(load_config(config, [f"run.folder={folder}"]), dist.get_world_size())
        finally:
            torch.autograd._engine_run_backward = run_backward
        assert trainer is not None
        tear_down(trainer.engine)
        parallel_state.destroy_model_parallel()
        passes.append(count)
    return passes


def _check(case: dict[str, dict[str, Any]], corpus: Path, tmp_path: Path) -> None:
    train = {"steps": 4, "micro_batch": 2, "global_batch": 2, "precision": "bf16", **case.get("train", {})}
    model = {"layers": 2, "hidden": 32, "heads": 4, "sequence_length": 16, **case.get("model", {})}
    sections = {**case, "train": {**train, "validation_sequences": 2}, "model": model}
    config = write_config(tmp_path / "run.yaml", corpus, tmp_path / "unused", **sections)
    folders = [str(tmp_path / name) for name in ("here", "elsewhere")]
    ((here, there),) = run(train_both_ways, 1, str(config), folders, timeout_seconds=300.0)
    assert here == there >= 4
    losses = [[line["lm_loss"] for line in curve(Path(folder))] for folder in folders]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 4


@pytest.mark.parametrize("name", CASES)
def test_backward_in_another_thread_gives_the_same_bits(name: str, corpus: Path, tmp_path: Path) -> None:
    _check(CASES[name], corpus, tmp_path)


@pytest.mark.matrix
@pytest.mark.parametrize("name", MATRIX)
def test_backward_in_another_thread_in_every_combination(name: str, corpus: Path, tmp_path: Path) -> None:
    _check(MATRIX[name], corpus, tmp_path)
