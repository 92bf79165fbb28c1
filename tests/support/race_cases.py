"""A small race, records of its runs, and a text for it."""

import json
import math
from pathlib import Path
from typing import Any

from tools.experiments.race_plan import Run

GRID = (1e-3, 2e-3, 4e-3)
RACE: dict[str, Any] = {
    "text": {"held_out": ["out/"], "vocabulary": 400},
    "steps": 8,
    "tuning_steps": 4,
    "baseline": "dense",
    "settings": {
        "model": {"layers": 1, "hidden": 16, "heads": 2, "sequence_length": 16},
        "train": {
            "micro_batch": 2,
            "global_batch": 2,
            "validate_every": "50%",
            "validation_sequences": 2,
            "log_every": 1,
        },
        "schedule": {"warmup_steps": "25%"},
        "rank": {"quantum": 2},
        "checkpoint": {"every": "25%", "keep": 2},
        "deepspeed": {"stage": 0},
    },
    "speed_steps": 4,
    "speed_repeats": 1,
    "speed_ranks": [2, 4],
    "methods": {
        "dense": {
            "title": "dense",
            "settings": {"model": {"parametrization": "dense"}},
            "learning_rates": list(GRID),
            "seeds": [1, 2],
        },
        "growing": {
            "title": "growing",
            "order": 2,
            "group": "small",
            "settings": {"rank": {"policy": "schedule", "initial": 2, "schedule": [{"step": "50%", "rank": 4}]}},
            "learning_rates": list(GRID),
        },
    },
}


def write_race(path: Path, **changes: Any) -> Path:
    path.write_text(json.dumps({**RACE, **changes}))  # which is YAML, too
    return path


def record(run: Run, loss: float, **facts: Any) -> dict[str, Any]:
    diverged = math.isinf(loss)
    identity = {"method": run.method, "learning_rate": run.learning_rate, "seed": run.seed, "steps": run.steps}
    return {
        **identity,
        "diverged": diverged,
        "validation_loss": None if diverged else loss,
        "step_seconds": 0.5,
        **facts,
    }


def write_text(path: Path) -> Path:
    """Writes documents of two sources."""
    modules = [Path(__import__(name).__file__ or "").read_text() for name in ("ast", "argparse", "bisect", "inspect")]
    sources = ["in/a", "out/a", "in/b", "in/c"]
    lines = [json.dumps({"text": text, "source": source}) for text, source in zip(modules, sources, strict=True)]
    path.write_text("\n".join(lines) + "\n")
    return path
