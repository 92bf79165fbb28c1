"""How a run is laid over its processes: tensor parallelism, data parallelism and gradient accumulation.

processes = tensor x data            global batch = micro_batch x data x accumulation
"""

from dataclasses import dataclass

from model.config import ModelConfig
from pretrain.errors import ConfigError
from pretrain.schedule import BatchRamp


@dataclass(frozen=True)
class ParallelLayout:
    """Processes along each axis, and micro-steps in a step of the full global batch."""

    tensor: int
    data: int
    accumulation: int


def check_tensor_split(model: ModelConfig, tensor: int) -> None:
    """ConfigError if the model cannot be split over `tensor` processes."""
    splits = {
        "model.heads": model.heads,
        "the width of queries, keys and values": (model.heads + 2 * model.groups) * model.head_size,
        "model.hidden": model.hidden,
        "model.ffn": model.ffn_width,
    }
    if model.vocabulary:
        splits[f"the padded vocabulary (model.vocabulary_multiple {model.vocabulary_multiple})"] = (
            model.padded_vocabulary
        )
    for name, size in splits.items():
        if size % tensor:
            raise ConfigError(f"parallel.tensor {tensor} does not divide {name}, {size}: change one of them")
    if model.groups % tensor and tensor % model.groups:
        raise ConfigError(
            f"{model.groups} query groups and parallel.tensor {tensor} do not divide one another: "
            "change model.query_groups or parallel.tensor"
        )


def lay_out(
    model: ModelConfig, processes: int, tensor: int, micro_batch: int, global_batch: int, ramp: BatchRamp | None
) -> ParallelLayout:
    """The parallel layout on `processes` processes; ConfigError, with the numbers, if the run does not divide
    evenly."""
    if processes % tensor:
        raise ConfigError(
            f"{processes} processes do not divide into groups of parallel.tensor {tensor}: "
            "change parallel.tensor or the number of processes"
        )
    check_tensor_split(model, tensor)
    data = processes // tensor
    quantum = micro_batch * data
    sizes = {"train.global_batch": global_batch}
    if ramp is not None:
        sizes |= {"train.batch_ramp.start": ramp.start, "train.batch_ramp.increment": ramp.increment}
    for name, size in sizes.items():
        if size % quantum:
            below, above = size // quantum * quantum, -(-size // quantum) * quantum
            choice = f"{below} or {above}" if below else f"{above}"
            raise ConfigError(
                f"{name} {size} is not a whole number of micro-steps: micro_batch {micro_batch} x {data} data-parallel "
                f"process{'es' if data > 1 else ''} = {quantum} sequences each; set {name} to {choice}, "
                "or change train.micro_batch"
            )
    return ParallelLayout(tensor, data, global_batch // quantum)
