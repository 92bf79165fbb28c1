"""Says what is in a checkpoint: ranks by layer and projection, size against the dense model, growth, parallel layout.

    python tools/inspect_checkpoint.py --checkpoint runs/quickstart
    python tools/inspect_checkpoint.py --checkpoint runs/x/checkpoints/step_000001000 --verify --json facts.json
    python tools/inspect_checkpoint.py --checkpoint merged/

Takes a run folder or its checkpoints folder (the newest valid step), one step's folder, or a consolidated model. Reads
no tensors unless `--verify` asks for the checksums of all files.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from model.config import ModelConfig, projections
from model.costs.arithmetic import total_parameters, trained_parameters, training_flops_per_token
from pretrain.checkpoint.reader import CheckpointReader, locate_checkpoint
from pretrain.convert.consolidated import FACTS_NAME, ConsolidatedModel, Facts, facts_of
from pretrain.disk import replace_bytes
from pretrain.errors import CheckpointError, ConfigError, run_command
from tools.console import table_lines

KINDS = ("qkv", "proj", "fc1", "fc2")


def model_report(facts: Facts) -> dict[str, Any]:
    """What follows from architecture, ranks and history alone."""
    config, ranks = facts.model, facts.ranks
    return {
        "step": facts.train["step"],
        "consumed_tokens": facts.train["consumed_tokens"],
        "model": config.model_dump(mode="json"),
        "ranks": ranks,
        "mean_rank": fmean(ranks.values()) if ranks else None,
        "parameters": total_parameters(config, ranks),
        "trained_parameters": trained_parameters(config, ranks),
        "dense_parameters": total_parameters(config, {}),
        "flops_per_token": training_flops_per_token(config, ranks),
        "dense_flops_per_token": training_flops_per_token(config, {}),
        "growth": facts.growth,
    }


def checkpoint_report(reader: CheckpointReader) -> dict[str, Any]:
    """`model_report`, and how and in which parallel layout the checkpoint was written."""
    return {
        "folder": str(reader.folder),
        **model_report(facts_of(reader)),
        "precision": _setting(reader, "train", "precision"),
        "zero_stage": _setting(reader, "deepspeed", "stage"),
        "tensor_size": reader.tensor_size,
        "shard_files": len(reader.manifest.shards),
        "bytes": sum(record.bytes for record in reader.manifest.files),
    }


def _setting(reader: CheckpointReader, section: str, key: str) -> Any:
    """One setting of the run that wrote the checkpoint; None where the checkpoint does not say."""
    content: Any = reader.state.get("config")
    for name in (section, key):
        content = content.get(name) if isinstance(content, dict) else None
    return content


def consolidated_report(model: ConsolidatedModel) -> dict[str, Any]:
    """`model_report` of a consolidated folder."""
    return {
        "folder": str(model.folder),
        **model_report(Facts.model_validate(model.facts)),
        "bytes": sum(path.stat().st_size for path in model.folder.iterdir()),
    }


def rank_table(config: ModelConfig, ranks: Mapping[str, int]) -> list[str]:
    """One line a layer, `rank/break-even rank` a projection: at the second, factors are as large as the weight."""
    cells: dict[tuple[int, str], str] = {}
    for projection in projections(config):
        rank = ranks.get(projection.name)
        cells[projection.layer, projection.kind] = f"{rank}/{projection.break_even_rank}" if rank else "dense"
    rows = [[str(layer), *(cells[layer, kind] for kind in KINDS)] for layer in range(config.layers)]
    return table_lines(["layer", *KINDS], rows)


def report_lines(report: Mapping[str, Any]) -> list[str]:
    """The report for people."""
    config = ModelConfig.model_validate(report["model"])
    lines = [
        f"{report['folder']}: step {report['step']}, {report['consumed_tokens']:,} tokens",
        f"{config.family} {config.parametrization}{', bidirectional' if config.bidirectional else ''}, "
        f"{config.layers} layers, hidden {config.hidden}, "
        f"{config.heads} heads, vocabulary {config.vocabulary}",
        _against_dense("parameters", report["parameters"], report["dense_parameters"]),
        *_frozen_line(report),
        _against_dense("training FLOPs a token", report["flops_per_token"], report["dense_flops_per_token"]),
    ]
    if "tensor_size" in report:
        lines.append(
            f"written by {report['tensor_size']} tensor-parallel processes in {report['shard_files']} shard files, "
            f"precision {report['precision']} with fp32 masters, ZeRO stage {report['zero_stage']}"
        )
    lines.append(f"{report['bytes'] / 1e9:.3f} GB on disk")
    if report["mean_rank"] is not None:
        lines += ["", f"ranks (rank/break-even rank), mean {report['mean_rank']:.1f}", ""]
        lines += rank_table(config, report["ranks"])
    if report["growth"]:
        lines += ["", "growth"]
        for event in report["growth"]:
            before, after = event["before"], event["after"]
            lines.append(
                f"step {event['step']:>9,}: {len(after)} layers, mean rank {fmean(before.values()):.1f} -> "
                f"{fmean(after.values()):.1f}, {event['seconds']:.2f} s"
            )
    return lines


def _frozen_line(report: Mapping[str, Any]) -> list[str]:
    trained = report["trained_parameters"]
    if trained == report["parameters"]:
        return []
    return [_against_dense("trained, the others frozen", trained, report["dense_parameters"])]


def _against_dense(what: str, number: int, dense: int) -> str:
    return f"{what}: {number:,}, {number / dense:.1%} of the dense model's {dense:,}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Say what is in a checkpoint.")
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        help="a run folder, its checkpoints folder, one step's folder, or a consolidated model",
    )
    parser.add_argument("--verify", action="store_true", help="read all files and compare their checksums")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the same facts as JSON")
    arguments = parser.parse_args()

    if (arguments.checkpoint / FACTS_NAME).exists():
        if arguments.verify:
            raise CheckpointError(
                f"{arguments.checkpoint} is a consolidated model, which has no checksums: leave out --verify"
            )
        report = consolidated_report(ConsolidatedModel(arguments.checkpoint))
    else:
        reader = CheckpointReader(locate_checkpoint(arguments.checkpoint))
        if arguments.verify:
            reader.verify()
        report = checkpoint_report(reader)
    print("\n".join(report_lines(report)))
    if arguments.verify:
        print("\nall checksums are right")
    if arguments.json is not None:
        try:
            replace_bytes(arguments.json, (json.dumps(report, indent=2) + "\n").encode())
        except OSError as error:
            raise ConfigError(f"{arguments.json} cannot be written ({error.strerror}): give another --json") from error


if __name__ == "__main__":
    run_command(main)
