"""Planned bytes of weights, gradients and optimizer against those of a real engine, before and after a growth."""

from dataclasses import replace

import pytest
from torch import Tensor

from model.config import ModelConfig
from pretrain.config.parallel import ParallelLayout
from pretrain.planning.communication import Links, plan_communication
from pretrain.planning.memory import Setup, ZeroBuffers, plan_memory
from tests.support.distributed import run
from tests.support.parallel_engine import Case, SmallRun, deepspeed_settings, uniform_ranks
from tests.support.parallel_model import positions_of, small_config, some_tokens
from tools.benchmarks.collective_counter import CollectiveCounter

RANKS = (8, 16)
LINKS = Links(1e9, 1e9, 1e9, 0.0, 0.0)
"""Arbitrary links, since the tests are about bytes."""


def _config(family: str, parametrization: str = "factored") -> ModelConfig:
    return small_config(family, parametrization, hidden=64)


def _setup(case: Case, processes: int) -> Setup:
    layout = ParallelLayout(case.tensor, processes // case.tensor, case.accumulation)
    zero = ZeroBuffers.of(deepspeed_settings(case)["zero_optimization"])
    return Setup(layout, case.micro_batch, case.precision, case.stage, case.offload, zero=zero)


def _bytes(tensors: list[Tensor], apart_from: frozenset[int] = frozenset()) -> int:
    """Bytes of all storages but those at the addresses `apart_from`."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(size for place, size in storages.items() if place not in apart_from)


def _held(small: SmallRun) -> dict[str, int]:
    """Bytes that the engine holds between two micro-steps; each storage is counted once."""
    engine, case = small.engine, small.case
    tokens, labels = some_tokens(small.config, case.micro_batch)
    engine.set_gradient_accumulation_boundary(False)
    engine.backward(engine(tokens, positions_of(tokens), None, labels=labels).mean())
    zero = engine.optimizer
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    weights = [p.detach() for p in engine.module.parameters()]
    if case.stage == 2 and not case.offload:
        gradients += [g for group in zero.all_grad_tensors.values() for g in group]
    if case.stage == 3:
        gradients = [] if case.offload else [zero.grad_partitions_flat_buffer]
        weights = [p.ds_tensor for p in engine.module.parameters()]
    weight_storages = frozenset(w.untyped_storage().data_ptr() for w in weights)
    adam = zero if case.stage == 0 else zero.optimizer
    masters = [master for group in adam.param_groups for master in group["params"]]
    if case.stage == 3:
        masters = zero.fp32_partitioned_groups_flat
    moments = [v for state in adam.state.values() for key, v in state.items() if key != "step"]
    if case.offload:
        masters += [master.grad for master in masters] + zero.param_buffer_of_bit16_for_cpu_offload_groups
        masters.append(zero.temp_grad_buffer_for_cpu_offload)
    return {
        "weights": _bytes(weights),
        "gradients": _bytes(gradients),
        "host" if case.offload else "optimizer": _bytes([*masters, *moments], weight_storages),
    }


def _grown(config: ModelConfig, case: Case) -> list[dict[str, int]]:
    """Held bytes before and after a growth, each after a step, so that moments exist."""
    small = SmallRun(config, uniform_ranks(config, RANKS[0]), case)
    small.train(1)
    held = [_held(small)]
    small.engine.optimizer.zero_grad(set_to_none=True)
    small.grow(uniform_ranks(config, RANKS[1]))
    small.train(1)
    return [*held, _held(small)]


def _check(config: ModelConfig, case: Case, processes: int) -> None:
    measured = run(_grown, processes, config, case)
    for moment, rank in enumerate(RANKS if config.parametrization != "dense" else RANKS[:1]):
        planned = plan_memory(config, uniform_ranks(config, rank), _setup(case, processes))
        for key in measured[0][moment]:
            fullest = max(process[moment][key] for process in measured)
            assert getattr(planned, key) == pytest.approx(fullest, rel=0.05), (key, case, rank)


@pytest.mark.parametrize(
    "case",
    [Case(0, accumulation=2), Case(1, "bf16", tensor=2, accumulation=2), Case(2, "bf16", accumulation=2)],
    ids=str,
)
def test_an_engine_holds_what_is_planned(case: Case) -> None:
    _check(_config("gpt2"), case, 2)


@pytest.mark.parametrize("case", [Case(3, "bf16", accumulation=2), Case(2, "bf16", offload=True)], ids=str)
def test_an_engine_without_whole_states_holds_what_is_planned(case: Case) -> None:
    _check(_config("llama"), case, 2)


@pytest.mark.matrix
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(("tensor", "processes"), [(1, 1), (1, 2), (2, 2), (1, 4), (2, 4)])
def test_every_engine_holds_what_is_planned(
    tensor: int, processes: int, stage: int, precision: str, family: str
) -> None:
    if stage == 0 and precision == "bf16":
        pytest.skip("ZeRO 0 trains in fp32")
    case = Case(stage, precision, tensor=tensor, accumulation=2)
    for parametrization in ("factored", "additive"):
        _check(_config(family, parametrization=parametrization), case, processes)


def _sent(config: ModelConfig, case: Case) -> dict[str, int]:
    """Bytes that one process sends in its groups, in its second step."""
    small = SmallRun(config, uniform_ranks(config, RANKS[0]), case)
    small.train(1)
    with CollectiveCounter() as counter:
        small.train(1)
    return {group: counter.total(group=group).bytes for group in ("tensor", "data")}


@pytest.mark.parametrize(
    "case",
    [Case(2, "bf16", accumulation=2), Case(1, "bf16", tensor=2, accumulation=2), Case(3, "bf16", accumulation=2)],
    ids=str,
)
def test_a_step_sends_what_is_planned(case: Case) -> None:
    _check_sent(_config("gpt2"), case, 2)


@pytest.mark.matrix
@pytest.mark.parametrize("parametrization", ["dense", "factored", "additive"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(("tensor", "processes"), [(1, 4), (2, 4)])
def test_every_step_sends_what_is_planned(
    tensor: int, processes: int, stage: int, precision: str, parametrization: str
) -> None:
    if stage == 0 and precision == "bf16":
        pytest.skip("ZeRO 0 trains in fp32")
    case = Case(stage, precision, tensor=tensor, accumulation=2)
    _check_sent(_config("llama", parametrization=parametrization), case, processes)


def _check_sent(config: ModelConfig, case: Case, processes: int) -> None:
    setup, ranks = _setup(case, processes), uniform_ranks(config, RANKS[0])
    planned = plan_communication(config, ranks, setup, LINKS, processes)
    for sent in run(_sent, processes, config, case):
        for group in ("tensor", "data"):
            # The rest is a few numbers: norms, overflow flags and the loss.
            assert planned.bytes(group) == pytest.approx(sent[group], rel=0.05, abs=256), (group, case)


def test_every_trained_number_without_zero_costs_sixteen_bytes() -> None:
    """16 bytes in 16-bit training: weight 2, gradient 2, master 4, moments 8."""
    seven = ModelConfig(
        family="llama", layers=32, hidden=4096, heads=32, ffn=11008, sequence_length=4096, vocabulary=32000,
        parametrization="dense",
    )  # fmt: skip
    plan = plan_memory(seven, {}, Setup(ParallelLayout(1, 1, 1), 1, "bf16", 1))
    assert plan.weights + plan.gradients + plan.optimizer == 16 * 6_738_415_616


def test_a_gpu_with_the_whole_vocabulary_has_two_bytes_of_logits_at_its_loss_where_a_cpu_has_six() -> None:
    config = _config("gpt2").model_copy(update={"vocabulary": 8192, "hidden_dropout": 0.1})
    setup = Setup(ParallelLayout(1, 1, 1), 128, "bf16", 1, zero=ZeroBuffers(reduce_bucket_size=0))
    ranks = uniform_ranks(config, RANKS[0])
    host, device = plan_memory(config, ranks, setup), plan_memory(config, ranks, replace(setup, gpu=True))
    tokens = setup.micro_batch * config.sequence_length
    masks = tokens * config.hidden * (2 * config.layers + 1)
    assert host.activations - device.activations == tokens * 2 * config.padded_vocabulary + masks
    in_output_layer = 2 * config.hidden * (tokens + config.padded_vocabulary)  # where the GPU then needs most memory
    assert host.fullest - device.fullest == tokens * 4 * config.padded_vocabulary + masks - in_output_layer
    split = replace(setup, layout=ParallelLayout(2, 1, 1))
    host, device = plan_memory(config, ranks, split), plan_memory(config, ranks, replace(split, gpu=True))
    assert host.fullest - device.fullest == masks // 2


def test_zero_3_divides_everything_by_the_processes() -> None:
    config = _config("llama", parametrization="dense")
    whole = plan_memory(config, {}, Setup(ParallelLayout(1, 1, 1), 2, "bf16", 1))
    eighth = plan_memory(config, {}, Setup(ParallelLayout(1, 8, 1), 2, "bf16", 3))
    for key in ("weights", "gradients", "optimizer"):
        assert getattr(eighth, key) == pytest.approx(getattr(whole, key) / 8, rel=0.01)


def test_offload_moves_the_optimizer_to_the_host() -> None:
    config = _config("llama", parametrization="dense")
    setup = Setup(ParallelLayout(1, 4, 1), 2, "bf16", 2)
    there, away = plan_memory(config, {}, setup), plan_memory(config, {}, replace(setup, offload=True))
    assert (there.host, away.optimizer) == (0, 0)
    assert away.host >= there.optimizer > 0
