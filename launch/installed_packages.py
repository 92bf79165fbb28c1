"""Whether a Python has what Espalier needs, built for it: the check of `launch/environment.sh` without an installation.

    python launch/installed_packages.py

Needs nothing but the standard library, since the answer may be that there is nothing else. Wheels that were carried
along (`launch/offline_wheels.sh`) and unpacked for another Python are found by `import`, and end in a traceback.
"""

import re
import sys
from collections.abc import Iterable
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pretrain.errors import ConfigError, run_command

NEEDED = (
    "torch", "deepspeed", "filelock", "jinja2", "liger-kernel", "matplotlib", "megatron-core", "numpy", "psutil",
    "pydantic", "pydantic_core", "pyyaml", "rich", "safetensors", "sentencepiece", "tensorboard", "tokenizers",
    "transformers", "typing_extensions", "xxhash", "zstandard",
)  # fmt: skip


def check(names: Iterable[str]) -> None:
    """ConfigError that names what is missing, or built for another Python."""
    missing, foreign = [], []
    for name in names:
        try:
            found = distribution(name)
        except PackageNotFoundError:
            missing.append(name)
            continue
        if tags := foreign_tags(found, sys.version_info[:2]):
            foreign.append(f"{name} for {tags}")
    if missing:
        raise ConfigError(
            f"{sys.executable} has no {', '.join(missing)}: install them, or unset ESPALIER_USE_CURRENT_PYTHON"
        )
    if foreign:
        version = f"{sys.version_info[0]}.{sys.version_info[1]}"
        raise ConfigError(
            f"{sys.executable} is Python {version} and finds wheels of another one, {', '.join(foreign)}: collect them "
            f"with bash launch/offline_wheels.sh --out DIR --python {version}"
        )


def foreign_tags(found: Distribution, version: tuple[int, int]) -> str:
    """The Pythons that a distribution was built for, where `version` is none of them; empty where it is, or where
    nothing is said."""
    tags = re.findall(r"^Tag: *(\S+)", found.read_text("WHEEL") or "", re.MULTILINE)
    built = sorted({tag.split("-")[0] for tag in tags})
    if not tags or any(_suits(tag, version) for tag in tags):
        return ""
    return ", ".join(built)


def _suits(tag: str, version: tuple[int, int]) -> bool:
    """Whether `cp312-cp312-linux_x86_64` and the like go with a Python; the platform is pip's business."""
    interpreters, abi, _ = tag.split("-", 2)
    for interpreter in interpreters.split("."):
        kind, major, minor = re.fullmatch(r"([a-z]+)(\d)(\d*)", interpreter).groups()  # type: ignore[union-attr]
        if kind == "py" and int(major) == version[0]:
            return True
        if (
            kind == "cp"
            and int(major) == version[0]
            and (int(minor) == version[1] or ("abi3" in abi and int(minor) <= version[1]))
        ):
            return True
    return False


def main() -> None:
    check(NEEDED)


if __name__ == "__main__":
    run_command(main)
