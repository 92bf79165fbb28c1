"""What a figure was computed with and on: versions of packages, revision of this source tree, and hardware."""

import contextlib
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "deepspeed", "megatron-core", "numpy", "sentencepiece")


def installed_versions() -> dict[str, str]:
    """Versions of the packages that decide what a run computes."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def git_revision() -> str:
    """Revision of the source tree, marked `-dirty` if files differ from it; `unknown` outside a work tree."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return "unknown"
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10.0, check=False)
    except (OSError, subprocess.TimeoutExpired):  # no git here, or a work tree on a slow file system: not worth a run
        return "unknown"
    return answer.stdout.strip() or "unknown"


def hardware() -> dict[str, Any]:
    """What the run was computed on."""
    model = platform.processor() or platform.machine()
    processors = Path("/proc/cpuinfo")
    if processors.is_file():
        for line in processors.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    return {"processor": model, "cores": os.cpu_count(), "threads": int(os.environ.get("OMP_NUM_THREADS", "1"))}
