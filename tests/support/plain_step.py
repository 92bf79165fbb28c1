"""Host waits and kernels of one plain training step, counted on a pretended GPU in a whole run.

    python -m tests.support.plain_step                                   (a Llama of 2 layers, factored, ZeRO 1, bf16)
    python -m tests.support.plain_step model.family=gpt2 model.layers=24 model.parametrization=dense rank.policy=fixed
    python -m tests.support.plain_step data.within_documents=true --kernels

Arguments are settings as on the command line of `pretrain/train.py`, laid over `SETTINGS`; the corpus is some modules
of the standard library. A plain step is one turn of the run's loop without a log line, a validation, an event or a
checkpoint: from the beginning of `Trainer.train_step` to the beginning of the next. Numbers of kernels depend on layers
and settings and hardly on sizes, which are tiny because Triton's interpreter takes milliseconds for a program.
"""

import argparse
import contextlib
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.support.pretending import ENVIRONMENT

if TYPE_CHECKING:
    from tests.support.device_ledger import Count

SETTINGS = [
    "model.layers=2", "model.hidden=64", "model.heads=4", "model.sequence_length=4", "train.micro_batch=2",
    "train.global_batch=2", "train.steps=5", "train.validate_every=0", "train.validation_sequences=2",
    "train.precision=bf16", "train.log_every=100", "schedule.warmup_steps=2", "rank.policy=fixed", "rank.initial=16",
    "rank.schedule=[]", "checkpoint.every=0", "guard.hang_seconds=0", "data.split=80,20,0",
]  # fmt: skip
PLAIN_STEP = 3
"""Behind the first steps, in which libraries set themselves up."""


def count_plain_step(config: Any, gpu: Any, processes: int, step: int = PLAIN_STEP) -> "Count":
    """Trains as `config` says, on the present process groups and the pretended `gpu`."""
    from pretrain.train import run_training
    from pretrain.trainer import Trainer

    at_beginning: dict[int, Count] = {}
    train_step = Trainer.train_step

    def counted(trainer: Trainer, *args: Any, **kwargs: Any) -> Any:
        at_beginning[trainer.state.step] = gpu.count()
        return train_step(trainer, *args, **kwargs)

    Trainer.train_step = counted  # type: ignore[assignment,method-assign]
    try:
        run_training(config, processes)
    finally:
        Trainer.train_step = train_step  # type: ignore[method-assign]
    return at_beginning[step + 1] - at_beginning[step]


def report(count: "Count", kernels: bool) -> str:
    """The totals; one line a wait, one a copy, and if asked for one an operator, the most frequent first."""
    lines = [str(count)]
    lines += [f"  wait x{number} ({part}): {cause}" for (part, cause), number in count.waits.most_common()]
    lines += [f"  {size:,} bytes, {way}" for way, size in count.copied_bytes.most_common()]
    lines += [f"  {number:6,} {operator}" for operator, number in count.operators.most_common() if kernels]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Count host waits and kernels of a plain training step.")
    parser.add_argument("--kernels", action="store_true", help="list the operators that launch kernels")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings laid over the small run's")
    arguments = parser.parse_intermixed_args()

    from pretrain.config.run import load_config
    from pretrain.distributed import check_precision, joined_processes
    from tests.support.pretended_cuda import PretendedCuda
    from tests.support.training_runs import make_corpus

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_corpus(folder, mask_token=True)
        family = "_gpt2" if "model.family=gpt2" in arguments.overrides else ""
        files = [f"data.prefix={folder}/corpus", f"data.tokenizer={folder}/tokenizer.model", f"run.folder={folder}/run"]
        config = load_config(f"quickstart{family}", [*SETTINGS, *files, *arguments.overrides])
        with PretendedCuda() as gpu, contextlib.redirect_stdout(sys.stderr):
            check_precision(config.train.precision)
            with joined_processes() as processes:
                count = count_plain_step(config, gpu, processes)
    print(report(count, arguments.kernels))
    for problem, number in gpu.problems.most_common():
        print(f"  PROBLEM x{number}: {problem}")


if __name__ == "__main__":
    os.environ.update(ENVIRONMENT)
    main()
