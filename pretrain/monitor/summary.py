"""What a run came to: loss, size and arithmetic against the dense model, growth, and what to do next.

FLOPs are counted from the ranks each step really had, by `model.costs.arithmetic`; against them stands the same number
of tokens through the dense model. That ratio is arithmetic, not time: what of it is gained in seconds depends on the
device.
"""

import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from model.costs.arithmetic import total_parameters, trained_parameters, training_flops_per_token
from pretrain.config.run import RunConfig


def perplexity(lm_loss: float) -> float:
    """exp of a loss in nats per token; infinite where it would overflow."""
    return math.inf if lm_loss > 700.0 else math.exp(lm_loss)


def dense_flops_ratio(config: RunConfig, ranks: Mapping[str, int]) -> float:
    """FLOPs of a token through the dense model, divided by those executed at these ranks."""
    return training_flops_per_token(config.model, {}) / training_flops_per_token(config.model, ranks)


def executed_flops(
    config: RunConfig, ranks: Mapping[str, int], growth: Sequence[Mapping[str, Any]], consumed_samples: int
) -> tuple[float, float]:
    """FLOPs of a run so far as executed, and through the dense model; `ranks`: after the last growth."""
    current = dict(ranks)
    executed = 0.0
    end = consumed_samples
    length = config.model.sequence_length
    for event in reversed(growth):
        executed += length * (end - event["consumed_samples"]) * training_flops_per_token(config.model, current)
        current |= event["before"]
        end = event["consumed_samples"]
    executed += length * end * training_flops_per_token(config.model, current)
    dense = length * consumed_samples * training_flops_per_token(config.model, {})
    return float(executed), float(dense)


def summarize(
    config: RunConfig,
    ranks: Mapping[str, int],
    growth: Sequence[Mapping[str, Any]],
    *,
    step: int,
    consumed_samples: int,
    lm_loss: float,
    validation_loss: float | None,
    skipped_steps: int,
    checkpoint: Path | None,
    accuracy: float | None = None,
) -> dict[str, Any]:
    """The facts of a run that took `step` steps.

    `growth` is as in a checkpoint's state, `ranks` are the present ones, `checkpoint` is the last one committed,
    `accuracy` is a masked objective's. There the perplexity is exp of the loss of a hidden token, a pseudo-perplexity.
    """
    executed, dense = executed_flops(config, ranks, growth, consumed_samples)
    best = validation_loss if validation_loss is not None else lm_loss
    return {
        "objective": config.train.objective,
        "step": step,
        "steps": config.train.steps,
        "skipped_steps": skipped_steps,
        "consumed_tokens": config.model.sequence_length * consumed_samples,
        "lm_loss": lm_loss,
        "validation_loss": validation_loss,
        "accuracy": accuracy,
        "perplexity": perplexity(best),
        "mean_rank": sum(ranks.values()) / len(ranks) if ranks else None,
        "parameters": total_parameters(config.model, ranks),
        "trained_parameters": trained_parameters(config.model, ranks),
        "dense_parameters": total_parameters(config.model, {}),
        "training_flops": executed,
        "dense_training_flops": dense,
        "augmentations": [
            {"step": event["step"], "mean_rank": rank, "seconds": event["seconds"]}
            for event, rank in zip(growth, _mean_ranks_after(ranks, growth), strict=True)
        ],
        "augmentation_seconds": sum(event["seconds"] for event in growth),
        "checkpoint": None if checkpoint is None else str(checkpoint),
    }


def _mean_ranks_after(ranks: Mapping[str, int], growth: Sequence[Mapping[str, Any]]) -> list[float]:
    """Mean rank after each event, from the present ranks backwards."""
    current, means = dict(ranks), []
    for event in reversed(growth):
        means.append(sum(current.values()) / len(current))
        current |= event["before"]
    return means[::-1]


def rank_history(ranks: Mapping[str, int], growth: Sequence[Mapping[str, Any]]) -> list[tuple[int, dict[str, int]]]:
    """The steps at which ranks changed and the ranks from there on, walked back from the present ones."""
    if not ranks:
        return []
    current = dict(ranks)
    history = []
    for event in sorted(growth, key=lambda event: event["step"], reverse=True):
        history.append((event["step"], dict(current)))
        current |= event["before"]
    history.append((0, current))
    return history[::-1]


def summary_text(facts: Mapping[str, Any], folder: Path) -> str:
    """The facts for a reader at the end of a run, with the commands that follow."""
    validation = facts["validation_loss"]
    where = "training" if validation is None else "validation"
    loss = facts["lm_loss"] if validation is None else validation
    executed = facts["training_flops"]
    lines = [
        f"step {facts['step']} of {facts['steps']}, {facts['consumed_tokens']:,} tokens, "
        f"{facts['skipped_steps']} steps skipped",
        f"{where} loss {loss:.4f}, {_understanding(facts)}",
        _against("parameters", facts["parameters"], facts["dense_parameters"], _sizes(facts)),
        _against("training FLOPs", executed, facts["dense_training_flops"], f"{executed:.3e}"),
    ]
    if facts["mean_rank"] is not None:
        lines.append(f"mean rank {facts['mean_rank']:.1f} after {len(facts['augmentations'])} augmentations:")
        lines += [
            f"  step {event['step']}: mean rank {event['mean_rank']:.1f}, {event['seconds']:.2f} s"
            for event in facts["augmentations"]
        ]
    if facts["checkpoint"] is not None:
        lines += [
            f"checkpoint {facts['checkpoint']}",
            f"curves, ranks, spectra:  tensorboard --logdir {shlex.quote(str(folder))}",
            f"the same in one file:    python tools/report.py --run {shlex.quote(str(folder))}",
            *_export_commands(folder, causal=facts["objective"] == "causal"),
        ]
    return "\n".join(lines)


def _export_commands(folder: Path, *, causal: bool) -> list[str]:
    """How to take the model out of the run; transformers has no class for a masked one."""
    merged = shlex.quote(str(folder / "consolidated"))
    consolidate = f"  python tools/consolidate_checkpoint.py --checkpoint {shlex.quote(str(folder))} --output {merged}"
    if not causal:
        return ["as one model:", consolidate]
    return [
        "as a dense Hugging Face model:",
        consolidate,
        f"  python tools/densify_checkpoint.py --input {merged} --output {shlex.quote(str(folder / 'export'))}",
        "which three lines of Python load:",
        "  from transformers import AutoModelForCausalLM, AutoTokenizer",
        f'  model = AutoModelForCausalLM.from_pretrained("{folder / "export"}")',
        f'  tokenizer = AutoTokenizer.from_pretrained("{folder / "export"}")',
    ]


def _understanding(facts: Mapping[str, Any]) -> str:
    if facts["objective"] == "causal":
        return f"perplexity {facts['perplexity']:.2f}"
    right = "" if facts["accuracy"] is None else f", {100.0 * facts['accuracy']:.1f} % of the hidden tokens found"
    return f"pseudo-perplexity {facts['perplexity']:.2f}{right}"


def _sizes(facts: Mapping[str, Any]) -> str:
    total, trained = facts["parameters"], facts["trained_parameters"]
    return f"{total:,}" if trained == total else f"{total:,} ({trained:,} trained, the others frozen)"


def _against(name: str, ours: float, dense: float, shown: str) -> str:
    return f"{name} {shown}: {100.0 * ours / dense:.1f} % of the dense model's" if dense else f"{name} {shown}"
