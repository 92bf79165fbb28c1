"""Whole runs on a pretended GPU (`tests/support/pretended_cuda.py`) do nothing that a GPU would refuse, and have no new
host waits or kernels."""

from pathlib import Path

import pytest
import torch

from tests.support.distributed import WorkerPool
from tests.support.plain_step import SETTINGS
from tests.support.training_runs import make_corpus
from tests.support.whole_runs import grown_run, plain_step, problems_of_run, problems_of_tool, waits_with_planted_read

HOST_WAITS_OF_PLAIN_STEP = 1
"""Host waits of a plain step: the one in `pretrain/agreement.py`."""
HOST_WAITS_OF_EVENT = 15
"""Host waits of a growth event without those in DeepSpeed's code, whose number grows with the layers at stage 3."""
FIXED = ["rank.policy=fixed", "rank.schedule=[]"]
GPT2 = ["model.family=gpt2"]
DENSE = [*FIXED, "model.parametrization=dense"]
DROPOUT = ["model.hidden_dropout=0.1", "model.attention_dropout=0.1"]
KERNELS_OF_PLAIN_STEP = {
    "llama": (FIXED, 248),
    "llama dense": (DENSE, 266),
    "llama documents": ([*FIXED, "data.within_documents=true"], 258),
    "llama dropout": ([*FIXED, *DROPOUT], 307),
    "gpt2": ([*GPT2, *FIXED], 233),
    "gpt2 dense": ([*GPT2, *DENSE], 186),
}
"""Settings and most kernels of a plain step of two layers in bf16 at ZeRO 1: the count when this was written, plus 2 %.
Lower a number whenever the step becomes smaller."""

SMALL = [
    "model.layers=2", "model.hidden=32", "model.heads=4", "model.query_groups=0", "model.sequence_length=4",
    "train.micro_batch=2", "train.global_batch=2", "train.validate_every=4", "train.validation_sequences=2",
    "train.log_every=1", "checkpoint.every=4", "schedule.warmup_steps=1", "optimizer.learning_rate=3e-3",
    "rank.initial=4", "rank.quantum=2", "rank.stop_step=5", "rank.buffer=2", "rank.probe=2", "guard.hang_seconds=0",
]  # fmt: skip
SCHEDULE = ["rank.stop_step=null", "rank.schedule=[{step: 3, rank: 8}]"]
GRADIENT = ["rank.policy=gradient", "rank.schedule=[]", "rank.check_every=3", "rank.threshold=0.5"]
EXPLAINED = ["rank.policy=explained_ratio", "rank.schedule=[]", "rank.check_every=2"]
EXCESS = ["rank.policy=excess_explained_ratio", "rank.schedule=[]", "rank.check_every=2"]
BF16, FP16, FP32 = (["train.precision=" + name] for name in ("bf16", "fp16", "fp32"))
FACTORS, LAYERS = ["train.recompute=factors"], ["train.recompute=layers"]
DOCUMENTS, OFFLOAD, TRACK = ["data.within_documents=true"], ["deepspeed.offload_optimizer=true"], ["rank.track=true"]
ZERO = {stage: [f"deepspeed.stage={stage}"] for stage in range(4)}
RESUMED, STRAIGHT = [4, 5], [4]
ONE_LAYER, FOUR_SEQUENCES = ["model.layers=1"], ["train.global_batch=4"]

RUNS: dict[str, tuple[int, list[int], list[str]]] = {
    "schedule": (
        1, RESUMED, [
            *SCHEDULE, *ZERO[1], *BF16, *FACTORS, *DOCUMENTS, *FOUR_SEQUENCES, *ONE_LAYER, "checkpoint.background=true",
        ],
    ),
    "gradient": (1, RESUMED, [*GPT2, *GRADIENT, *ZERO[3], *BF16, *LAYERS, *ONE_LAYER, "model.hidden_dropout=0.1"]),
    "additive": (1, STRAIGHT, [*GRADIENT, *ZERO[2], *FP16, *OFFLOAD, *ONE_LAYER, "model.parametrization=additive"]),
    "excess": (
        1, STRAIGHT, [
            *GPT2, *EXCESS, *ZERO[2], *BF16, *TRACK, *ONE_LAYER, "rank.truncate=0.01", "model.factored_layers=mlp",
            "train.deterministic=true",
        ],
    ),
    "explained": (1, STRAIGHT, [*EXPLAINED, *ZERO[0], *FP32, *ONE_LAYER, "train.objective=mlm", "train.tf32=true"]),
    "dense": (1, STRAIGHT, [*GPT2, *DENSE, *ZERO[3], *FP16, *OFFLOAD, *LAYERS, *TRACK, "model.attention_dropout=0.1"]),
    "compiled": (1, STRAIGHT, [*SCHEDULE, *ZERO[1], *BF16, "train.compile=true"]),
    "tensor": (2, STRAIGHT, [*GPT2, *SCHEDULE, *ZERO[2], *BF16, *FACTORS, *ONE_LAYER, "parallel.tensor=2"]),
    "tensor llama": (2, STRAIGHT, [*EXCESS, *ZERO[1], *BF16, *LAYERS, *ONE_LAYER, "parallel.tensor=2"]),
    "data": (
        2, STRAIGHT, [
            *GRADIENT, *ZERO[3], *BF16, *FACTORS, *DOCUMENTS, *FOUR_SEQUENCES, *ONE_LAYER, "model.query_groups=2",
        ],
    ),
}  # fmt: skip
"""Processes, the steps at which the run stops (and resumes), and settings. The runs cover every policy, stage,
precision, parametrization and recomputation. A step has two sequences, one micro-step, or four."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Settings of section `data` for a small corpus."""
    folder = tmp_path_factory.mktemp("corpus")
    make_corpus(folder, mask_token=True)
    return [f"data.prefix={folder}/corpus", f"data.tokenizer={folder}/tokenizer.model", "data.split=80,20,0"]


@pytest.mark.parametrize("name", RUNS)
def test_run_asks_nothing_that_a_gpu_refuses(
    name: str, pretending: WorkerPool, corpus: list[str], tmp_path: Path
) -> None:
    processes, lengths, settings = RUNS[name]
    settings = [*SMALL, *corpus, *settings, f"run.folder={tmp_path / 'run'}"]
    found = pretending.run(problems_of_run, processes, 300.0, (settings, lengths), {})
    assert found == [[]] * processes


@pytest.mark.parametrize("name", KERNELS_OF_PLAIN_STEP)
def test_plain_step_waits_and_launches_no_more_than_stated(
    name: str, pretending: WorkerPool, corpus: list[str], tmp_path: Path
) -> None:
    settings, kernels = KERNELS_OF_PLAIN_STEP[name]
    settings = [*SETTINGS, "model.query_groups=0", *corpus, *settings, f"run.folder={tmp_path / 'run'}"]
    ((count, problems),) = pretending.run(plain_step, 1, 300.0, (settings,), {})
    assert problems == []
    assert count.waits.total() <= HOST_WAITS_OF_PLAIN_STEP, count.waits
    assert 0 < count.kernels.total() <= kernels, count.operators


@pytest.mark.parametrize("stage", [1, 3])
def test_growth_event_waits_seldom_and_moves_no_state_where_the_device_has_room(
    stage: int, pretending: WorkerPool, corpus: list[str], tmp_path: Path
) -> None:
    growth = ["rank.policy=schedule", *SCHEDULE, "rank.initial=4", "rank.quantum=2", "train.steps=4"]
    settings = [*SETTINGS, *corpus, *ZERO[stage], *growth]
    found = {}
    for peak_bytes in (0, 10**9):
        run = [*settings, f"run.folder={tmp_path / str(peak_bytes)}"]
        ((cost, masters, problems),) = pretending.run(grown_run, 1, 300.0, (run, peak_bytes), {})
        assert problems == []
        moved = [number for way, number in cost.copied_bytes.items() if "pretrain/growth/stash.py" in way]
        waits = {cause: number for (_, cause), number in cost.waits.items() if " > deepspeed" not in cause}
        assert sum(waits.values()) <= HOST_WAITS_OF_EVENT, waits
        found[peak_bytes] = masters, sum(moved)
    (there, moved), (kept, moved_with_room) = found[0], found[10**9]
    # Before the event: ranks 4 instead of 8. New rows of A wait in host memory in any case.
    grown = sum(tensor.numel() / 2 for name, tensor in kept.items() if name.endswith((".A", ".B")))
    assert moved - moved_with_room == 12 * (sum(tensor.numel() for tensor in kept.values()) - grown)
    assert there.keys() == kept.keys()
    assert all(torch.equal(there[name], kept[name]) for name in there)


def test_planted_read_in_a_step_is_counted(pretending: WorkerPool, corpus: list[str], tmp_path: Path) -> None:
    settings = [*SETTINGS, *corpus, f"run.folder={tmp_path / 'run'}"]
    (waits,) = pretending.run(waits_with_planted_read, 1, 300.0, (settings,), {})
    assert [number for cause, number in waits.items() if "whole_runs.py" in cause] == [1]


# Tools ----------------------------------------------------------------------------------------------------------------


def test_tools_take_what_came_out(pretending: WorkerPool, corpus: list[str], tmp_path: Path) -> None:
    run, merged, dense = (str(tmp_path / name) for name in ("run", "merged", "dense"))
    short = [*SMALL, *corpus, *FIXED, *BF16, "rank.stop_step=null", f"run.folder={run}"]
    assert pretending.run(problems_of_run, 1, 300.0, (short, [2]), {}) == [[]]
    text = tmp_path / "text.py"
    text.write_text("def answer(question):\n    return 42\n")  # Triton's interpreter takes its time
    for tool, flags, said in (
        ("consolidate_checkpoint", ["--checkpoint", run, "--output", merged], "step 2"),
        ("densify_checkpoint", ["--input", merged, "--output", dense], "exported step 2"),
        ("evaluate", ["--model", run, "--text", str(text)], "perplexity"),
        ("evaluate", ["--model", dense, "--text", str(text), "--within-documents"], "perplexity"),
        ("generate", ["--model", merged, "--prompt", "def", "--max-new-tokens", "3"], ""),
        ("generate", ["--model", dense, "--prompt", "def", "--max-new-tokens", "3", "--greedy"], ""),
    ):
        ((problems, output),) = pretending.run(problems_of_tool, 1, 300.0, (tool, flags), {})
        assert problems == [], tool
        assert said in output


@pytest.mark.slow
def test_benchmarks_run(pretending: WorkerPool) -> None:
    step = ["--layers", "1", "--hidden", "64", "--heads", "4", "--sequence", "16", "--vocabulary", "500"]
    # No profile: CUDA itself records a profile's events.
    step += ["--micro-batch", "1", "--warm-up", "1", "--repeats", "1"]
    growth = ["--hidden", "64", "--layers", "1", "--width", "128", "--vocabulary", "500", "--sequence", "16"]
    growth += ["--batch", "1", "--events", "1", "--steps", "2", "--repeats", "1", "--only", "spectra", "events"]
    for tool, flags in (("benchmarks.step", step), ("benchmarks.growth", growth)):
        ((problems, output),) = pretending.run(problems_of_tool, 1, 300.0, (tool, flags), {})
        assert problems == [], tool
        assert "NVIDIA H100" in output
