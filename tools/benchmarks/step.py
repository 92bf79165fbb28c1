"""Times whole training steps of dense and factored models: forward, backward, clipping and AdamW, through DeepSpeed.

    python tools/benchmarks/step.py --json step.json --profile profile/
    python tools/benchmarks/step.py --layers 24 --repeats 5                   (all of GPT-2 medium)
    python tools/benchmarks/step.py --layers 2 --hidden 64 --heads 4 --sequence 64 --vocabulary 500 --repeats 2
    python tools/benchmarks/step.py --ranks 240 248 256 264 272               (which ranks do the matrix products like?)
    python tools/benchmarks/step.py --contestants dense factored --blocks --settings train.recompute=layers
    python tools/benchmarks/step.py --largest --hidden 4096 --heads 32        (on a GPU alone)

Contestants (`tools/benchmarks/step_contestants.py`) share one process and take their steps in turn, so that whatever
else the machine does meets all of them. Without a GPU: fp32, 4 layers, sequence 512, batch 4; with one: bf16, 24
layers, sequence 1024, batch 16. Beside the whole steps stand the matrix products of one layer alone, the limit of what
factors can gain. Attention counts whole squares, as everywhere in Espalier; "causal" below the table counts half.

With --blocks, what is left without embedding, output layer and loss, which all contestants share: for L layers
L / (L - L/2) times the difference to a model of half the layers, sample by sample.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from model.process_groups import initialize_process_groups
from pretrain.disk import json_text, replace_text
from pretrain.distributed import check_precision, joined_processes
from pretrain.errors import ConfigError, run_command
from tools.arguments import output_file, positive
from tools.benchmarks.step_contestants import DENSE, FACTORED, NAMES, Contestant, build_contestant, contestant_config
from tools.benchmarks.step_gemms import rank_rows, time_gemms
from tools.benchmarks.step_largest import CONTESTANTS, DoesNotFitError, largest_models, largest_table
from tools.benchmarks.step_profile import PeakMemory, profile_step, write_picture
from tools.benchmarks.step_report import (
    against_dense,
    machine,
    machine_lines,
    profile_table,
    rank_table,
    rates,
    spread,
    step_table,
    synchronize,
    verdicts,
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    facts: dict[str, Any] = {"benchmark": "step", "settings": _settings(arguments), **machine()}
    if arguments.largest:
        names = [name for name in arguments.contestants if name in CONTESTANTS]
        facts["rows"] = largest_models(
            _trial_flags(arguments), names or CONTESTANTS, arguments.largest_from, arguments.largest_step
        )
        lines = list(largest_table(facts["rows"]))
    else:
        with joined_processes() as processes:
            if processes > 1:
                raise ConfigError(f"this benchmark is of one process, and {processes} were started: start it alone")
            initialize_process_groups(1)
            if arguments.ranks:
                rows = time_gemms(*_gemm_settings(arguments), ranks=arguments.ranks)
                facts["rows"] = rank_rows(rows)
                lines = list(rank_table(facts["rows"]))
            else:
                lines = _benchmark_steps(arguments, facts)
    print("\n".join([*lines, "", *machine_lines(facts)]))
    if arguments.json is not None:
        replace_text(arguments.json, json_text(facts, indent=2) + "\n")


def _benchmark_steps(arguments: argparse.Namespace, facts: dict[str, Any]) -> list[str]:
    """Fills `facts` with rows and profiles; what there is to print."""
    try:
        contestants, peaks = _build(arguments)
        rows, blocks = _time_steps(arguments, contestants)
    except RuntimeError as error:
        # cuBLAS has an error of its own for it.
        if not isinstance(error, torch.OutOfMemoryError) and "ALLOC_FAILED" not in str(error):
            raise
        raise DoesNotFitError(
            f"{arguments.layers} layers do not fit the device: lower --layers, --micro-batch or --contestants"
        ) from error
    for row, peak in zip(rows, peaks, strict=True):
        row["peak_bytes"] = peak
    profiles = {}
    if arguments.profile is not None:
        arguments.profile.mkdir(parents=True, exist_ok=True)
        width = contestants[0].engine.module.model_config.padded_vocabulary
        for contestant in contestants[: len(arguments.contestants)]:
            if contestant.name in (DENSE, FACTORED):
                profiles[contestant.name] = profile_step(contestant, width, arguments.profile)
        write_picture(profiles, arguments.profile / "profile.png")
    ranks = [None, *([arguments.rank] if {*arguments.contestants} != {DENSE} else [])]
    gemms = time_gemms(*_gemm_settings(arguments), ranks=ranks)
    for group in (rows, blocks, gemms):
        if not group:
            continue
        for row in group:
            row |= rates(row, arguments.precision)
            if group[0]["rank"] is None and row["rank"] is not None:
                row |= against_dense(row, group[0])
    facts["rows"] = [*rows, *blocks, *gemms]
    facts["profiles"] = profiles
    lines = [
        *step_table(facts["rows"]),
        "",
        *_causal_ratios(rows),
        *verdicts([*rows, *blocks], arguments.precision, arguments.family),
    ]
    return [*lines, "", *profile_table(profiles)] if profiles else lines


def _build(arguments: argparse.Namespace) -> tuple[list[Contestant], list[int | None]]:
    """Contestants after their first steps, and the most memory each takes in a step; with --blocks behind them the
    same of half their layers, whose memory does not count."""
    contestants: list[Contestant] = []
    peaks = []
    depths = [arguments.layers, *([arguments.layers // 2] if arguments.blocks else [])]
    for layers in depths:
        for name in arguments.contestants:
            with PeakMemory() as memory:
                contestant = build_contestant(name, _config(name, arguments, layers))
                for step in range(1, arguments.warm_up + 1):
                    if step == arguments.warm_up:
                        memory.last_step_begins()
                    contestant.step()
            contestants.append(contestant)
            peaks.append(memory.bytes)
    return contestants, peaks[: len(arguments.contestants)]


def _time_steps(
    arguments: argparse.Namespace, contestants: Sequence[Contestant]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of whole steps, and with --blocks those of the blocks alone."""
    seconds: list[list[float]] = [[] for _ in contestants]
    for _ in range(arguments.repeats):
        for contestant, samples in zip(contestants, seconds, strict=True):
            synchronize()
            start = time.perf_counter()
            contestant.step()
            synchronize()
            samples.append(time.perf_counter() - start)
    rows = []
    for contestant, samples in zip(contestants, seconds, strict=True):
        row: dict[str, Any] = {
            "name": contestant.name,
            "rank": contestant.rank,
            "parameters": contestant.parameters,
            "flops": contestant.flops_per_token * contestant.tokens,
            "flops_causal": contestant.causal_flops_per_token * contestant.tokens,
            **spread(samples),
        }
        rows.append({**row, "tokens_per_second": contestant.tokens / row["median_seconds"]})
    count = len(arguments.contestants)
    scale = arguments.layers / (arguments.layers - arguments.layers // 2)
    blocks = []
    for whole, half, longer, shorter in zip(rows[:count], rows[count:], seconds[:count], seconds[count:], strict=False):
        differences = [scale * (one - other) for one, other in zip(longer, shorter, strict=True)]
        sizes = {key: round(scale * (whole[key] - half[key])) for key in ("parameters", "flops", "flops_causal")}
        name = f"{whole['name']}, blocks alone"
        blocks.append({"name": name, "rank": whole["rank"], **sizes, **spread(differences)})
    return rows[:count], blocks


def _causal_ratios(rows: Sequence[dict[str, Any]]) -> list[str]:
    """FLOP ratios with half of the attention, which is what causal kernels execute."""
    if rows[0]["name"] != DENSE or len(rows) == 1:
        return []
    found = [f"{row['name']} {rows[0]['flops_causal'] / row['flops_causal']:.3f}" for row in rows[1:]]
    return [f"FLOP ratio if attention counts half (causal): {', '.join(found)}"]


def _config(name: str, arguments: argparse.Namespace, layers: int | None = None) -> Any:
    model = {
        "family": arguments.family,
        "layers": layers or arguments.layers,
        "hidden": arguments.hidden,
        "heads": arguments.heads,
        "sequence_length": arguments.sequence,
        "vocabulary": arguments.vocabulary,
    }
    return contestant_config(
        name,
        model,
        arguments.rank,
        arguments.micro_batch,
        arguments.settings,
        train={"precision": arguments.precision},
        deepspeed={"stage": arguments.stage},
    )


def _gemm_settings(arguments: argparse.Namespace) -> tuple[Any, ...]:
    """Model, tokens, type, warm-up and repeats of `time_gemms`."""
    model = _config(DENSE, arguments).model
    tokens = arguments.micro_batch * arguments.sequence
    return model, tokens, DTYPES[arguments.precision], arguments.warm_up, arguments.repeats


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    left_out = ("json", "profile")
    return {key: value for key, value in vars(arguments).items() if key not in left_out}


def _trial_flags(arguments: argparse.Namespace) -> list[str]:
    kept = ("family", "hidden", "heads", "sequence", "vocabulary", "rank", "precision", "stage", "threads")
    flags = [text for key in kept for text in (f"--{key}", str(getattr(arguments, key)))]
    return [*flags, *(["--settings", *arguments.settings] if arguments.settings else [])]


def _arguments() -> argparse.Namespace:
    gpu = torch.cuda.is_available()
    layers, sequence, batch, precision = (24, 1024, 16, "bf16") if gpu else (4, 512, 4, "fp32")
    parser = argparse.ArgumentParser(description="Time whole training steps, dense and factored.")
    parser.add_argument("--contestants", nargs="+", choices=NAMES, default=list(NAMES), help="models to compare (all)")
    parser.add_argument("--family", choices=("gpt2", "llama"), default="gpt2", help="architecture (gpt2)")
    parser.add_argument("--layers", type=positive, default=layers, help=f"of every model ({layers})")
    parser.add_argument("--hidden", type=positive, default=1024, help="width (1024)")
    parser.add_argument("--heads", type=positive, default=16, help="of attention (16)")
    parser.add_argument("--sequence", type=positive, default=sequence, help=f"tokens of a sequence ({sequence})")
    parser.add_argument("--micro-batch", type=positive, default=batch, help=f"sequences of a step ({batch})")
    parser.add_argument("--vocabulary", type=positive, default=50257, help="tokens of the output layer (50257)")
    parser.add_argument("--rank", type=positive, help="of every factored layer (hidden/4)")
    parser.add_argument("--precision", choices=tuple(DTYPES), default=precision, help=f"({precision})")
    parser.add_argument("--stage", type=int, default=1, help="of ZeRO (1)")
    parser.add_argument("--warm-up", type=positive, default=2, help="steps of each before the timed ones (2)")
    parser.add_argument("--repeats", type=positive, default=7, help="timed steps of each (7)")
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads(), help="of this process")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write all rows as JSON")
    parser.add_argument("--profile", type=Path, metavar="DIR", help="write tables and a picture of where time goes")
    parser.add_argument(
        "--blocks", action="store_true", help="time half the layers, too: the difference is the blocks alone"
    )
    parser.add_argument(
        "--settings",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="laid over the configs (train.recompute=layers; train.compile=true reaches all but the dense one)",
    )
    parser.add_argument("--ranks", type=positive, nargs="+", help="only time the factor pairs of one layer at these")
    parser.add_argument("--largest", action="store_true", help="only look for the largest models that fit a GPU")
    parser.add_argument("--largest-from", type=positive, default=1, help="layers to try first (1)")
    parser.add_argument("--largest-step", type=positive, default=1, help="layers between what fits and does not (1)")
    arguments = parser.parse_args()
    arguments.rank = arguments.rank or max(1, arguments.hidden // 4)
    if arguments.profile is not None and not {DENSE, FACTORED} & {*arguments.contestants}:
        raise ConfigError("--profile looks at dense and factored, and --contestants names neither: add one of them")
    if arguments.blocks and arguments.layers < 2:
        raise ConfigError("--blocks compares with half the layers, and --layers is 1: set it to 2 or more")
    if DENSE in arguments.contestants:  # what all others are compared with comes first
        arguments.contestants = [DENSE, *(name for name in arguments.contestants if name != DENSE)]
    check_precision(arguments.precision)
    return arguments


if __name__ == "__main__":
    run_command(main)
