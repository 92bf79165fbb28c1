"""Counts the operators of whole training steps without a GPU, and prices them as a GPU would run them one by one.

    python tools/benchmarks/step_roofline.py                                           (GPT-2 medium, 16 k tokens)
    python tools/benchmarks/step_roofline.py --family llama --layers 12 --hidden 2048 --vocabulary 32000 --json x.json
    python tools/benchmarks/step_roofline.py --layers 2 --hidden 64 --heads 4 --sequence 64 --vocabulary 500 --batch 2
    python tools/benchmarks/step_roofline.py --detail 30                               (the dearest operators)

A step is forward, loss, backward, the look at all gradients, and DeepSpeed's `engine.step()` with AdamW, all of them
the product's own code on fake tensors (`tools/benchmarks/operator_costs.py`, which says what is assumed). The step
counted is the second one, when the optimizer has its state.

All layers are alike, so models of one and of two layers are counted, whose difference is a layer:

    step(L) = step(1) + (L - 1) (step(2) - step(1))          blocks alone = L (step(2) - step(1))

"blocks alone" is what is left without embedding, output layer and loss, which both kinds have in common.

What this cannot say: how well a kernel really runs, what the host takes to start it (a step whose kernels are short
waits for Python), and what `torch.compile` fuses; the step is taken as eager code starts it. A layer's dropout is not
counted, and ZeRO 3 gathers by messages that fake process groups do not have.
"""

import argparse
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from model.config import Recompute
from model.gpt import build_model
from pretrain.config.run import RunConfig
from pretrain.disk import json_text, replace_text
from pretrain.engine.build import build_engine, tear_down
from pretrain.engine.deepspeed_config import deepspeed_dict
from pretrain.engine.gradient_scan import set_squared_norm, squared_norm
from pretrain.errors import ConfigError, run_command
from pretrain.provenance import git_revision, installed_versions
from tools.arguments import output_file, positive
from tools.benchmarks.operator_costs import (
    ATTENTION_SHARE,
    BANDWIDTH_SHARE,
    CARDS,
    CATEGORIES,
    FLOOR_SECONDS,
    FP32_FLOPS,
    PRODUCT_SHARE,
    Operator,
    counted_operators,
)
from tools.benchmarks.step_contestants import DENSE, FACTORED, contestant_config

PHASES = ("forward", "backward", "optimizer")

Row = dict[str, Any]
Sums = dict[str, float]


@dataclass(frozen=True)
class CountedStep:
    """The operators of one step."""

    parameters: int
    operators: list[Operator]
    host_waits: dict[str, int]
    """Times that the host waits for the device, by phase."""


def main() -> None:
    arguments = _arguments()
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it
    facts: Row = {
        "model": "operators counted on fake tensors, prices assumed: nothing was measured",
        "settings": {key: value for key, value in vars(arguments).items() if key != "json"},
        "assumptions": _assumptions(arguments.card),
        "versions": installed_versions(),
        "commit": git_revision(),
    }
    counted = {kind: _one_and_two_layers(kind, arguments) for kind in arguments.kinds}
    facts["rows"] = [row_of(kind, *steps, arguments.layers, arguments.card) for kind, steps in counted.items()]
    facts["ratios"] = _ratios(facts["rows"])
    print("\n".join(_lines(facts)))
    if arguments.detail:
        for kind, steps in counted.items():
            print("\n".join(["", *_detail(kind, *steps, arguments)]))
    if arguments.json is not None:
        replace_text(arguments.json, json_text(facts, indent=2) + "\n")


def _one_and_two_layers(kind: str, arguments: argparse.Namespace) -> tuple[CountedStep, CountedStep]:
    return count_step(_config(kind, arguments, 1)), count_step(_config(kind, arguments, 2))


def count_step(config: RunConfig) -> CountedStep:
    """The second training step of a config on one process."""
    with counted_operators(config.model.padded_vocabulary) as counter:
        recompute: Recompute = config.train.recompute
        model = build_model(config.model, config.initial_ranks(), seed=config.run.seed, recompute=recompute)
        # DeepSpeed moves the module to its device, and torch cannot move fake parameters that have weak references.
        model.__dict__["to"] = lambda *_, **__: model
        engine = build_engine(model, config.optimizer, deepspeed_dict(config, config.parallel_layout(1)))
        shape = (config.train.micro_batch, config.model.sequence_length)
        tokens, labels = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
        positions = torch.arange(shape[1]).expand(shape[0], -1)
        for step in (1, 2):
            counter.phase = None if step == 1 else "forward"
            loss = engine(tokens, positions, None, labels=labels).mean()
            counter.phase = None if step == 1 else "backward"
            engine.backward(loss)
            counter.phase = None if step == 1 else "optimizer"
            squared_norm(engine)
            set_squared_norm(engine, 1.0)  # what the trainer reads and tells, for fake gradients have no norm
            engine.step()
        counter.phase = None
        parameters = sum(parameter.numel() for parameter in model.parameters())
        tear_down(engine)
    return CountedStep(parameters, counter.operators, counter.host_waits)


def row_of(kind: str, one: CountedStep, two: CountedStep, layers: int, card: str) -> Row:
    """Sums of a step of `layers` layers."""

    def sums(phase: str | None = None, category: str | None = None, first: int = 1) -> Sums:
        found = []
        for step in (one, two):
            chosen = [operator for operator in step.operators if phase in (None, operator.phase)]
            found.append(_sums([operator for operator in chosen if category in (None, operator.category)], card))
        return _extended(found[0], found[1], first, layers - first)

    waits = [sum(step.host_waits.values()) for step in (one, two)]
    return {
        "kind": kind,
        "parameters": one.parameters + (layers - 1) * (two.parameters - one.parameters),
        "host_waits": waits[0] + (layers - 1) * (waits[1] - waits[0]),
        **sums(),
        "phases": {name: sums(phase=name) for name in PHASES},
        "categories": {name: sums(category=name) for name in CATEGORIES},
        "blocks": sums(first=0),
    }


def _sums(operators: Sequence[Operator], card: str) -> Sums:
    return {
        "kernels": len(operators),
        "ms": 1e3 * sum(one.seconds(card) for one in operators),
        "gb": sum(one.bytes for one in operators) / 1e9,
        "tflop": sum(one.flops for one in operators) / 1e12,
    }


def _extended(one: Sums, two: Sums, first: int, more: int) -> Sums:
    """`first` times the model of one layer, and `more` layers."""
    return {key: first * one[key] + more * (two[key] - one[key]) for key in one}


def _ratios(rows: Sequence[Row]) -> dict[str, float]:
    """Milliseconds and kernels of the factored model as shares of the dense one's; empty unless both are there."""
    by_kind = {row["kind"]: row for row in rows}
    if not {DENSE, FACTORED} <= by_kind.keys():
        return {}
    dense, factored = by_kind[DENSE], by_kind[FACTORED]
    return {
        "ms": factored["ms"] / dense["ms"],
        "kernels": factored["kernels"] / dense["kernels"],
        "blocks_ms": factored["blocks"]["ms"] / dense["blocks"]["ms"],
        "forward_and_backward_kernels": _kernels_of_passes(factored) / _kernels_of_passes(dense),
    }


def _kernels_of_passes(row: Row) -> float:
    return float(row["phases"]["forward"]["kernels"] + row["phases"]["backward"]["kernels"])


def _assumptions(card: str) -> dict[str, float]:
    peak, bandwidth = CARDS[card]
    return {
        "floor_seconds": FLOOR_SECONDS,
        "product_flops_per_second": peak * PRODUCT_SHARE,
        "attention_flops_per_second": peak * ATTENTION_SHARE,
        "fp32_product_flops_per_second": FP32_FLOPS,
        "bytes_per_second": bandwidth * BANDWIDTH_SHARE,
    }


def _lines(facts: Mapping[str, Any]) -> Iterator[str]:
    settings, assumed = facts["settings"], facts["assumptions"]
    yield (
        f"Modelled, not measured: {settings['card']}, at least {assumed['floor_seconds'] * 1e6:.1f} µs an operator; "
        f"{assumed['product_flops_per_second'] / 1e12:.0f} TFLOP/s in products, "
        f"{assumed['attention_flops_per_second'] / 1e12:.0f} in attention, "
        f"{assumed['fp32_product_flops_per_second'] / 1e12:.0f} in fp32; "
        f"{assumed['bytes_per_second'] / 1e12:.2f} TB/s. Commit {facts['commit']}."
    )
    for row in facts["rows"]:
        yield ""
        yield f"{row['kind']}: {row['parameters'] / 1e6:.1f} M parameters, {row['host_waits']} host waits a step"
        yield ""
        yield "| | kernels | ms | GB | TFLOP |"
        yield "|---|---|---|---|---|"
        for title, sums in (
            ("whole step", row), *row["phases"].items(), *row["categories"].items(), ("blocks alone", row["blocks"]),
        ):  # fmt: skip
            yield f"| {title} | {sums['kernels']:,.0f} | {sums['ms']:.2f} | {sums['gb']:.2f} | {sums['tflop']:.2f} |"
    if facts["ratios"]:
        ratios = facts["ratios"]
        yield ""
        yield (
            f"factored / dense: step {ratios['ms']:.3f}, blocks alone {ratios['blocks_ms']:.3f}, "
            f"kernels {ratios['kernels']:.2f} (forward and backward {ratios['forward_and_backward_kernels']:.2f})"
        )


def _detail(kind: str, one: CountedStep, two: CountedStep, arguments: argparse.Namespace) -> Iterator[str]:
    """The dearest operators, alike ones together."""
    alike: dict[tuple[str, str, str, str], tuple[list[Operator], list[Operator]]] = {}
    for place, step in enumerate((one, two)):
        for operator in step.operators:
            key = (operator.phase, operator.category, operator.name, str(list(operator.shape)))
            alike.setdefault(key, ([], []))[place].append(operator)
    rows = []
    for key, (first, second) in alike.items():
        sums = _extended(_sums(first, arguments.card), _sums(second, arguments.card), 1, arguments.layers - 1)
        rows.append((key, sums))
    yield f"| {kind} | operator | ms | times | GB |"
    yield "|---|---|---|---|---|"
    for (phase, category, name, shape), sums in sorted(rows, key=lambda row: -row[1]["ms"])[: arguments.detail]:
        yield f"| {phase}, {category} | {name} {shape} | {sums['ms']:.2f} | {sums['kernels']:.0f} | {sums['gb']:.2f} |"


def _config(kind: str, arguments: argparse.Namespace, layers: int) -> RunConfig:
    model = {
        "family": arguments.family,
        "layers": layers,
        "hidden": arguments.hidden,
        "heads": arguments.heads,
        "sequence_length": arguments.sequence,
        "vocabulary": arguments.vocabulary,
        **({"query_groups": arguments.query_groups} if arguments.query_groups else {}),
    }
    recompute = arguments.recompute if kind == FACTORED or arguments.recompute == "layers" else "none"
    return contestant_config(
        kind,
        model,
        arguments.rank,
        arguments.batch,
        train={"precision": "bf16", "recompute": recompute},
        deepspeed={"stage": arguments.stage},
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Count and price the operators of training steps, without a GPU.")
    parser.add_argument("--kinds", nargs="+", choices=(DENSE, FACTORED), default=[DENSE, FACTORED], help="(both)")
    parser.add_argument("--family", choices=("gpt2", "llama"), default="gpt2", help="architecture (gpt2)")
    parser.add_argument("--layers", type=positive, default=24, help="of every model (24)")
    parser.add_argument("--hidden", type=positive, default=1024, help="width (1024)")
    parser.add_argument("--heads", type=positive, default=16, help="of attention (16)")
    parser.add_argument("--query-groups", type=positive, help="key and value heads of llama (as many as heads)")
    parser.add_argument("--sequence", type=positive, default=1024, help="tokens of a sequence (1024)")
    parser.add_argument("--batch", type=positive, default=16, help="sequences of a step (16)")
    parser.add_argument("--vocabulary", type=positive, default=50257, help="tokens of the output layer (50257)")
    parser.add_argument("--rank", type=positive, help="of every factored layer (hidden/4)")
    parser.add_argument("--recompute", choices=("none", "factors", "layers"), default="none", help="(none)")
    parser.add_argument("--stage", type=int, choices=(1, 2), default=1, help="of ZeRO (1)")
    parser.add_argument("--card", choices=tuple(CARDS), default="h100", help="whose prices (h100)")
    parser.add_argument("--detail", type=int, default=0, metavar="ROWS", help="print the dearest operators, too")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write all rows as JSON")
    arguments = parser.parse_args()
    arguments.rank = arguments.rank or max(1, arguments.hidden // 4)
    if torch.cuda.is_available():
        raise ConfigError("this counts without a GPU, and there is one: set CUDA_VISIBLE_DEVICES= to hide it")
    return arguments


if __name__ == "__main__":
    run_command(main)
