"""Prints the rank every policy reaches on factors that were never trained: what a criterion finds in nothing.

    python tools/null_rank.py [--json FILE] [--widths 64 128] [--seeds 1 2 3] [--trained]

A policy decides as in a run, one decision after the other, and what it grows is grown, but no optimizer takes a step.
Its gradients come from real text (bytes of the standard library's source) and, once more, from the same text with its
labels shuffled. `--trained` adds what the measuring policies reach when AdamW does train between decisions, on the text
and on shuffled labels, in which there is nothing to learn but their frequencies (Adam begins anew at every growth, and
new rows are random). Beside them stands the published rule of InRank-Efficient (arXiv 2306.11250) with its published
settings: its code stops at the ranks its README reports for *trained* GPT-2 models.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.config import Family, ModelConfig, factored_projections
from model.gpt import EspalierModel, build_model
from model.initialization import generator_for, new_directions
from model.process_groups import single_process
from pretrain.errors import ConfigError, run_command
from pretrain.growth.event import RankMeasurement, layer_measurements
from pretrain.growth.probe import GradientProbe
from pretrain.growth.spectra import measure_spectra, measure_updates, row_norms
from pretrain.policies.budget import affordable_parameters
from pretrain.policies.explained_ratio import explaining_rank
from pretrain.policies.gradient import PROBED_STEPS
from pretrain.policies.limits import decide_ranks
from pretrain.policies.policy import RankConfig, ScheduleEntry
from pretrain.policies.select import build_policy
from tools.console import progress, table_lines
from tools.corpus.documents import find_files, read_documents

PUBLISHED = {768: ("GPT-2 small", 254), 1024: ("GPT-2 medium", 287)}
"""Width: the model and the rank its README reports."""

DECISIONS, TRAINED_DECISIONS = 40, 10
"""A policy that has not come to rest by then is reported with the rank it has."""
CHECK_EVERY, TRAINED_CHECK_EVERY = 10, 40
"""Steps between two decisions."""
_LEARNING_RATE = 4e-3

MEASURING = ("excess_explained_ratio", "gradient")
POLICIES: dict[str, dict[str, Any]] = {
    "fixed": {},
    "schedule": {"schedule": (ScheduleEntry(step=10, rank=16), ScheduleEntry(step=20, rank=24))},
    "explained_ratio": {"buffer": 4},
    "excess_explained_ratio": {"buffer": 4},
    "gradient": {"budget": 0.5, "probe": 8},
}


@dataclass(frozen=True)
class NullRank:
    """What one policy came to, without training or after some."""

    policy: str
    labels: str
    trained: bool
    family: str
    width: int
    initial_rank: int
    ranks: list[float]
    """Mean over all layers, one a seed."""
    decisions: int


def published_null(width: int, seed: int) -> int:
    """Where the published rule stops on factors set up as in the published code: rank 2, buffer 100, threshold 0.9, A
    and B uniform with at most width/2 directions, the MLP's first layer (4·width x width)."""
    buffer, largest = 100, width // 2
    generator = np.random.default_rng(seed)
    A = generator.uniform(-1.0, 1.0, (largest, width)) / np.sqrt(width)
    B = generator.uniform(-1.0, 1.0, (4 * width, largest)) / np.sqrt(largest)
    used = 2
    while True:
        rank = used + buffer
        root = np.linalg.cholesky(A[:rank] @ A[:rank].T)
        squares = np.linalg.eigvalsh(root.T @ (B[:, :rank].T @ B[:, :rank]) @ root)
        wanted = min(explaining_rank(np.sqrt(squares[::-1]), width, used, buffer, 0.9), largest - buffer - 1)
        if wanted == used:
            return used
        used = wanted


@dataclass(frozen=True)
class Rest:
    """Where one run of decisions came to rest."""

    mean_rank: float
    decisions: int
    largest_demand: float
    """Largest measured value over all layers and decisions; 0 for a policy that measures none."""


def null_rank(
    policy: str, family: Family, width: int, seed: int, text: Tensor, *, shuffled: bool, trained: bool = False
) -> Rest:
    """Where a policy rests on one model, or is after `DECISIONS`; a process group of one must be there.

    `text (sequences, length + 1)`: token ids; `shuffled`: predict the same labels in another order; `trained`: take
    AdamW's steps between decisions.
    """
    config = ModelConfig(
        family=family, layers=2, hidden=width, heads=4, sequence_length=text.shape[1] - 1, vocabulary=256
    )
    decisions, every = (TRAINED_DECISIONS, TRAINED_CHECK_EVERY) if trained else (DECISIONS, CHECK_EVERY)
    common = {"policy": policy, "initial": 8, "quantum": 4, "check_every": every}
    rank = RankConfig.model_validate(common | POLICIES[policy])
    factored = factored_projections(config)
    model = build_model(config, {projection.name: rank.initial for projection in factored}, seed=seed)
    factors = model.factored_layers().items()
    start = {name: (layer.A.detach().clone(), layer.B.detach().clone()) for name, layer in factors}
    decider, probe = build_policy(rank, decisions * every), GradientProbe(rank.probe, seed)
    decision, largest_demand, adam = 0, 0.0, _adam(model)
    while decision < decisions:
        decision += 1
        step = decision * every
        for training_step in range(step - every, step) if trained else ():
            adam.zero_grad()
            _loss(model, text, training_step, seed, shuffled).backward()
            adam.step()
        if not decider.due(step):
            continue
        for left in range(PROBED_STEPS, 0, -1) if "demand" in decider.needs else ():
            probe.attach(model, step - left, left)
            _loss(model, text, step - left, seed, shuffled).backward()
            probe.collect(model, 1.0)
        measured = RankMeasurement(
            measure_spectra(model), measure_updates(model, start), probe.demand(model) if probe.measuring else {}
        )
        layers = layer_measurements(model, measured)
        largest_demand = max(largest_demand, *(float(layer.demand[:1].sum()) for layer in layers))
        affordable = affordable_parameters(rank, factored, model.ranks(), [], step, decisions * every)
        grown = decide_ranks(decider, rank, step, layers, affordable)
        if not grown and not trained:
            break
        for name, new_rank in grown.items():
            _grow(model, name, new_rank, step, seed)
        adam = _adam(model) if grown else adam
    return Rest(_mean_rank(model), decision, largest_demand)


def _adam(model: EspalierModel) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)


def _loss(model: EspalierModel, text: Tensor, step: int, seed: int, shuffled: bool) -> Tensor:
    generator = generator_for(seed, "batch", step)
    batch = text[torch.randperm(len(text), generator=generator)[:8]]
    tokens, labels = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()
    if shuffled:
        labels = labels.flatten()[torch.randperm(labels.numel(), generator=generator)].view_as(labels)
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    return model(tokens, positions, None, labels=labels).mean()


@torch.no_grad()
def _grow(model: EspalierModel, name: str, new_rank: int, step: int, seed: int) -> None:
    layer = model.factored_layers()[name]
    added = new_rank - layer.rank
    norm = row_norms(model, [name])[name]
    rows = new_directions(name, step, added, layer.A.shape[1], norm, seed)
    layer.set_factors(torch.cat([layer.A, rows]), torch.cat([layer.B, layer.B.new_zeros(len(layer.B), added)], dim=1))


def _mean_rank(model: EspalierModel) -> float:
    ranks = model.ranks().values()
    return sum(ranks) / len(ranks)


def text_of_the_standard_library(length: int, sequences: int) -> Tensor:
    """`(sequences, length + 1)` bytes of its source, as token ids."""
    source = bytearray()
    for document in read_documents(find_files(["stdlib"]), ["text"]):
        source += document.text.encode()
        if len(source) > 50 * sequences * (length + 1):
            break
    starts = np.linspace(0, len(source) - length - 1, sequences).astype(int)
    return torch.tensor(np.stack([np.frombuffer(source, np.uint8, length + 1, start) for start in starts])).long()


def all_null_ranks(widths: Sequence[int], seeds: Sequence[int], trained: bool) -> list[NullRank]:
    """Every policy, both families, all widths and seeds; with `trained` the measuring ones once more on what training
    makes of factors."""
    text = text_of_the_standard_library(32, 256)
    families: tuple[Family, ...] = ("llama", "gpt2")
    kinds = [(policy, False, False) for policy in POLICIES] + [("gradient", True, False)]
    if trained:
        kinds += [(policy, shuffled, True) for policy in MEASURING for shuffled in (False, True)]
    cases = [(*kind, family, width) for kind in kinds for family in families for width in widths]
    rows = []
    with progress("null ranks", len(cases)) as bar:
        for policy, shuffled, train, family, width in cases:
            found = [null_rank(policy, family, width, seed, text, shuffled=shuffled, trained=train) for seed in seeds]
            ranks, decisions = [rest.mean_rank for rest in found], max(rest.decisions for rest in found)
            rows.append(NullRank(policy, "shuffled" if shuffled else "text", train, family, width, 8, ranks, decisions))
            bar.advance()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Prints the rank every policy reaches on untrained factors.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the same rows there")
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128], help="hidden sizes, multiples of 8")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--trained", action="store_true", help="also after training, on text and on shuffled labels")
    arguments = parser.parse_args()
    if odd := [width for width in arguments.widths if width < 64 or width % 8]:
        raise ConfigError(f"--widths holds {odd[0]}, and a width is a multiple of 8 and at least 64: change it")
    if min(arguments.seeds) < 0:
        raise ConfigError(f"--seeds holds {min(arguments.seeds)}: give seeds from 0 on")
    if arguments.json is not None and not arguments.json.absolute().parent.is_dir():
        raise ConfigError(f"--json {arguments.json} lies in no folder: make it, or name another")
    with single_process():
        rows = all_null_ranks(arguments.widths, arguments.seeds, arguments.trained)
    published = {width: [published_null(width, seed) for seed in arguments.seeds] for width in PUBLISHED}
    head = ["policy", "labels", "family", "steps", "width", "start", *(f"seed {seed}" for seed in arguments.seeds)]
    cells = []
    for row in rows:
        steps = row.decisions * TRAINED_CHECK_EVERY * row.trained
        figures = [f"{number:g}" for number in (steps, row.width, row.initial_rank, *row.ranks)]
        cells.append([row.policy, row.labels, row.family, *figures])
    print("\n".join(table_lines(head, cells, left=3)))
    print("\nthe published rule (rank 2, buffer 100, threshold 0.9, the published initialization)")
    for width, found in published.items():
        name, reported = PUBLISHED[width]
        print(f"width {width}: untrained {' '.join(map(str, found))}; reported for trained {name}: {reported}")
    if arguments.json is not None:
        content = {
            "policies": [asdict(row) for row in rows],
            "published_rule": [
                {"width": width, "model": PUBLISHED[width][0], "untrained": found, "reported": PUBLISHED[width][1]}
                for width, found in published.items()
            ],
        }
        arguments.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    run_command(main)
