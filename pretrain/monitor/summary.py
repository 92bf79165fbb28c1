"""Summarizes a run: loss, size and arithmetic compared with the dense model, growth, and commands to go on with.

FLOPs are counted by `model.costs.arithmetic` from the ranks that each step really had, and compared with those of the
same number of tokens through the dense model. The ratio counts arithmetic, not time: how many seconds it saves depends
on the device.
"""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from model.costs.arithmetic import total_parameters, trained_parameters, training_flops_per_token
from pretrain.config.run import RunConfig
from pretrain.loss import perplexity
from pretrain.train_state import RankPeriod, TrainState, Validation


def dense_flops_ratio(config: RunConfig, ranks: Mapping[str, int]) -> float:
    """FLOPs of a token through the dense model, divided by those executed at these ranks."""
    return training_flops_per_token(config.model, {}) / training_flops_per_token(config.model, ranks)


def executed_flops(config: RunConfig, periods: Sequence[RankPeriod]) -> tuple[float, float]:
    """FLOPs of a run so far as executed, and through the dense model."""
    length, dense = config.model.sequence_length, training_flops_per_token(config.model, {})
    executed = sum(length * one.samples * training_flops_per_token(config.model, one.ranks) for one in periods)
    return float(executed), float(dense * length * sum(one.samples for one in periods))


def summarize(
    config: RunConfig,
    ranks: Mapping[str, int],
    state: TrainState,
    *,
    lm_loss: float,
    validation: Validation | None,
    checkpoint: Path | None,
) -> dict[str, Any]:
    """The facts of a run that stands at `state`.

    `ranks`: the present ones; `lm_loss`, `validation`: the last ones; `checkpoint`: the last one committed. For a
    masked objective the perplexity is exp of the loss of a hidden token, a pseudo-perplexity.
    """
    periods = state.rank_periods(ranks)
    executed, dense = executed_flops(config, periods)
    return {
        "objective": config.train.objective,
        "step": state.step,
        "steps": config.train.steps,
        "skipped_steps": state.skipped_steps,
        "consumed_tokens": config.model.sequence_length * state.consumed_samples,
        "lm_loss": lm_loss,
        "validation_loss": None if validation is None else validation.lm_loss,
        "accuracy": None if validation is None else validation.accuracy,
        "perplexity": perplexity(lm_loss if validation is None else validation.lm_loss),
        "mean_rank": _mean(ranks) if ranks else None,
        "parameters": total_parameters(config.model, ranks),
        "trained_parameters": trained_parameters(config.model, ranks),
        "dense_parameters": total_parameters(config.model, {}),
        "training_flops": executed,
        "dense_training_flops": dense,
        "growth": [
            {"step": record.step, "mean_rank": _mean(period.ranks), "seconds": record.seconds}
            for record, period in zip(state.growth, periods[1:], strict=True)
        ],
        "growth_seconds": sum(record.seconds for record in state.growth),
        "checkpoint": None if checkpoint is None else str(checkpoint),
    }


def _mean(ranks: Mapping[str, int]) -> float:
    return sum(ranks.values()) / len(ranks)


def summary_text(facts: Mapping[str, Any], folder: Path) -> str:
    """The facts as text for the end of a run, with the commands to go on with."""
    validation = facts["validation_loss"]
    where = "training" if validation is None else "validation"
    loss = facts["lm_loss"] if validation is None else validation
    executed = facts["training_flops"]
    lines = [
        f"step {facts['step']} of {facts['steps']}, {facts['consumed_tokens']:,} tokens, "
        f"{facts['skipped_steps']} steps skipped",
        f"{where} loss {loss:.4f}, {_perplexity_text(facts)}",
        _compared_with_dense("parameters", facts["parameters"], facts["dense_parameters"], _sizes(facts)),
        _compared_with_dense("training FLOPs", executed, facts["dense_training_flops"], f"{executed:.3e}"),
    ]
    if facts["mean_rank"] is not None:
        lines.append(f"mean rank {facts['mean_rank']:.1f} after {len(facts['growth'])} growth events:")
        lines += [
            f"  step {event['step']}: mean rank {event['mean_rank']:.1f}, {event['seconds']:.2f} s"
            for event in facts["growth"]
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
    """Commands that export the model; a masked model can only be consolidated, as transformers has no class for it."""
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


def _perplexity_text(facts: Mapping[str, Any]) -> str:
    """Perplexity in words; for a masked objective also the share of hidden tokens that the model found."""
    if facts["objective"] == "causal":
        return f"perplexity {facts['perplexity']:.2f}"
    right = "" if facts["accuracy"] is None else f", {100.0 * facts['accuracy']:.1f} % of the hidden tokens found"
    return f"pseudo-perplexity {facts['perplexity']:.2f}{right}"


def _sizes(facts: Mapping[str, Any]) -> str:
    total, trained = facts["parameters"], facts["trained_parameters"]
    return f"{total:,}" if trained == total else f"{total:,} ({trained:,} trained, the others frozen)"


def _compared_with_dense(name: str, ours: float, dense: float, shown: str) -> str:
    """`shown` with what `ours` is as a share of `dense`; without the share if `dense` is 0."""
    return f"{name} {shown}: {100.0 * ours / dense:.1f} % of the dense model's" if dense else f"{name} {shown}"
