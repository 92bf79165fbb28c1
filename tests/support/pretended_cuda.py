"""A GPU pretended on the host: real numbers in storages marked `cuda:0`, so that whole runs show without a GPU what one
would refuse, wait for and launch.

    with PretendedCuda() as gpu:            # torch.cuda answers, DeepSpeed takes its CUDA accelerator, NCCL is gloo
        before = gpu.count()
        trainer.train_step()
        print(gpu.count() - before)         # kernels and host waits, by part of the step, with places
    assert not gpu.problems                 # mixed devices, host memory given to NCCL, wrong generators, ...

Before torch, DeepSpeed and Triton are imported the process needs `tests.support.pretending.ENVIRONMENT`; tests get such
processes from the fixture `pretending`. At a shell, waits and kernels of a plain step with their places:

    python -m tests.support.plain_step model.family=gpt2 train.precision=bf16

What it cannot see: time, memory, races between streams, numbers of CUDA's own kernels. Kernels are counted by operator,
one each: an operator that allocates or returns a view has none, a Triton kernel is one launch, a fused or foreach
operator of CUDA may launch several.
"""

from collections import Counter
from contextlib import ExitStack
from typing import Any

from tests.support.cuda_answers import answers
from tests.support.device_ledger import Count
from tests.support.device_marks import Marks
from tests.support.device_modes import Functions, Operators, Pretence
from tests.support.varlen_attention import provide


class PretendedCuda:
    """A GPU that is not there: torch answers as if it were, and everything computes on the CPU."""

    def __init__(self) -> None:
        self._pretence = Pretence()
        self._stack = ExitStack()

    def __enter__(self) -> "PretendedCuda":
        provide()
        functions = Functions(self._pretence)
        with ExitStack() as stack:
            stack.enter_context(answers(self._pretence, functions))
            stack.enter_context(Operators(self._pretence))
            stack.enter_context(functions)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *raised: Any) -> None:
        self._stack.close()

    @property
    def problems(self) -> Counter[str]:
        """What a GPU would have refused or got wrong, with places."""
        return self._pretence.ledger.problems

    @property
    def marks(self) -> Marks:
        return self._pretence.marks

    def count(self) -> Count:
        """Kernels, host waits and copied bytes up to now."""
        return self._pretence.ledger.count()
