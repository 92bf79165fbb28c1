"""Settings made before a device is first used: variables, torch's switches, and how long processes wait."""

import os
from collections.abc import Iterator
from datetime import timedelta
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from model.config import ModelConfig, factored_projections
from model.layers.attention import prefer_fast_kernels
from model.process_groups import initialize_process_groups
from pretrain.config.run import RunConfig, parse_config
from pretrain.device_settings import (
    ALLOCATOR_NAMES,
    CONNECTIONS,
    LONGEST_TIMEOUT,
    WORKSPACE,
    collective_timeout,
    settle_arithmetic,
    settle_device,
)
from pretrain.errors import ConfigError
from tests.support.distributed import run
from tests.support.parallel_engine import Case, SmallRun


def config(**sections: dict) -> RunConfig:
    return parse_config({"data": {"prefix": "corpus", "tokenizer": "tokenizer.model"}, **sections})


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Unsets every variable before a test, and switches everything off after it."""
    for name in (*ALLOCATOR_NAMES, CONNECTIONS, WORKSPACE, "DEEPSPEED_TIMEOUT", "RANK"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    yield
    settle_arithmetic(deterministic=False, tf32=False)


def test_segments_expand_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    settle_device(None)
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64")
    settle_device(None)
    assert "PYTORCH_ALLOC_CONF" not in os.environ


def test_kernels_start_in_order_under_tensor_parallelism_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settle_device(config())
    assert CONNECTIONS not in os.environ
    settle_device(config(parallel={"tensor": 2}))
    assert os.environ[CONNECTIONS] == "1"
    assert capsys.readouterr().err == ""
    monkeypatch.setenv(CONNECTIONS, "8")
    settle_device(config(parallel={"tensor": 2}))
    assert os.environ[CONNECTIONS] == "8"
    monkeypatch.setenv("RANK", "1")
    settle_device(config(parallel={"tensor": 2}))
    assert capsys.readouterr().err == (
        "warning: CUDA_DEVICE_MAX_CONNECTIONS is 8, and with parallel.tensor above 1 messages overlap with computation "
        "as meant only at 1: unset it\n"
    )


@pytest.mark.filterwarnings("error")
def test_tf32_is_off_unless_it_is_asked_for() -> None:
    """Setting it gives no warning; torch 2.13 raises if its old and new switches are mixed."""
    torch.set_float32_matmul_precision("high")  # as a container image may do by an environment variable
    settle_device(config())
    assert torch.get_float32_matmul_precision() == "highest"
    assert torch.backends.cuda.matmul.fp32_precision == "ieee"
    settle_device(config(train={"tf32": True}))
    assert torch.get_float32_matmul_precision() == "high"
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    assert torch.backends.cuda.matmul.allow_tf32


def test_tf32_in_16_bits_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"train\.tf32 is true, and with train\.precision bf16 no product"):
        config(train={"tf32": True, "precision": "bf16"})


def test_deterministic_algorithms_are_a_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    settle_device(config(train={"deterministic": True}))
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert os.environ[WORKSPACE] == ":4096:8"
    monkeypatch.setenv(WORKSPACE, ":0:0")
    with pytest.raises(ConfigError, match="CUBLAS_WORKSPACE_CONFIG is ':0:0': set it to :4096:8 or :16:8, or unset it"):
        settle_device(config(train={"deterministic": True}))
    settle_device(config())
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cuda.cudnn_sdp_enabled()


def _cudnn_attends(deterministic: bool) -> bool:
    """Whether torch may choose cuDNN's attention on a Hopper card after a model was built."""
    settle_device(config(train={"deterministic": deterministic}))
    with patch("torch.cuda.get_device_capability", lambda: (9, 0)):
        prefer_fast_kernels()
    return torch.backends.cuda.cudnn_sdp_enabled()


def test_deterministic_models_never_attend_by_cudnn() -> None:
    assert run(_cudnn_attends, 1, True) == [False]
    assert run(_cudnn_attends, 1, False) == [True]


def _timeouts(stage: int, hang_seconds: float) -> set[timedelta]:
    """Timeouts of all groups that a run makes."""
    initialize_process_groups(2, collective_timeout(hang_seconds))
    config = ModelConfig(family="llama", layers=1, hidden=32, heads=4, sequence_length=16, vocabulary=100)
    small_run = SmallRun(config, {p.name: 4 for p in factored_projections(config)}, Case(tensor=2, stage=stage))
    small_run.train(1)
    groups = [group for group in dist.distributed_c10d._world.pg_map if group is not dist.group.WORLD]
    assert len(groups) > 5
    return {group._get_backend(torch.device("cpu")).options._timeout for group in groups}


def test_every_group_waits_longer_than_the_watchdog() -> None:
    """All groups have the timeout, also one that DeepSpeed might make."""
    for timeouts in run(_timeouts, 2, 3, 7200.0):
        assert timeouts == {timedelta(seconds=7500)}


RAISING = {
    "_adaptive_avg_pool2d_backward", "avg_pool3d_backward", "bincount", "cumsum", "grid_sampler_2d_backward", "histc",
    "kthvalue", "max_unpool2d", "median", "nll_loss2d_forward", "put_", "reflection_pad1d_backward",
    "replication_pad1d_backward", "scatter_reduce", "upsample_bilinear2d_backward", "_ctc_loss_backward",
    "_embedding_bag_backward",
}  # fmt: skip
"""ATen operators without a deterministic form on a GPU, as torch 2.13's `use_deterministic_algorithms` lists them."""


class _Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        on_integers = func.overloadpacket.__name__ == "cumsum" and not args[0].is_floating_point()
        if not on_integers:
            self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def _steps(
    family: str, tensor: int, stage: int
) -> tuple[set[str], list[tuple[float, float]], list[tuple[float, float]]]:
    """Operators of two steps with a growth between them; losses and norms of deterministic steps, and of plain ones."""
    config = ModelConfig(
        family=family, layers=1, hidden=32, heads=4, sequence_length=16, vocabulary=100, hidden_dropout=0.1
    )
    small, large = ({p.name: rank for p in factored_projections(config)} for rank in (4, 8))
    found = []
    seen = _Seen()
    for deterministic in (True, False):
        settle_arithmetic(deterministic=deterministic, tf32=False)
        # On a CPU no operator raises. Filled memory shows whether one reads what was never written.
        torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
        small_run = SmallRun(config, small, Case(tensor=tensor, stage=stage))
        with seen:
            losses = small_run.train(1)
            small_run.grow(large)
            losses += small_run.train(1)
        found.append(losses)
    return seen.names, found[0], found[1]


@pytest.mark.parametrize(("family", "tensor", "stage"), [("gpt2", 1, 1), ("llama", 2, 3)])
def test_no_operator_of_a_step_lacks_a_deterministic_form(family: str, tensor: int, stage: int) -> None:
    """An operator without one would end a run with train.deterministic in its first step on a GPU. The bits are the
    same as without the setting, even if all new memory is filled."""
    for names, filled, plain in run(_steps, tensor, family, tensor, stage):
        assert {"mm", "native_layer_norm", "addmm"} & names
        assert not RAISING & names
        assert filled == plain


def test_a_collective_outlasts_the_watchdog() -> None:
    assert collective_timeout(1800.0) == timedelta(seconds=2100)
    assert collective_timeout(0.0) == LONGEST_TIMEOUT
    assert collective_timeout(1e9) == LONGEST_TIMEOUT
    assert LONGEST_TIMEOUT / timedelta(milliseconds=1) < 2**31


def test_deepspeeds_own_variable_is_said_not_to_count(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DEEPSPEED_TIMEOUT", "5")
    settle_device(None)
    assert capsys.readouterr().err.startswith("warning: DEEPSPEED_TIMEOUT is not read")
