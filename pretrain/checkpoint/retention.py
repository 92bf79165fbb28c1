"""Removes old checkpoints so that a kill never leaves half of one under a valid name.

The newest `keep` stay, two at least, and every one whose step is a multiple of `keep_every`. Incomplete folders are
neither counted nor touched. A folder is renamed before it is removed.
"""

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from pretrain.checkpoint.format import LATEST_NAME
from pretrain.checkpoint.reader import ASIDE_PATTERN, read_manifest, step_folders
from pretrain.errors import CheckpointError
from pretrain.resilience import heartbeat

LEFTOVER_PATTERN = re.compile(rf"\.(staging|removed)_step_[0-9]{{9,12}}|\.{LATEST_NAME}\.[0-9]+")
FEWEST = 2
"""Fewest checkpoints that stay: a single one could turn out damaged."""


@dataclass(frozen=True)
class Retention:
    """How many checkpoints stay."""

    keep: int
    keep_every: int = 0
    """Checkpoints whose step is a multiple of it stay for good; 0: none."""

    def keeps(self, step: int) -> bool:
        return self.keep_every > 0 and step % self.keep_every == 0


def clear_leftovers(root: Path) -> None:
    """Removes what kills left behind, and gives a checkpoint that was moved aside for a new one its name back if the
    new one never came."""
    for path in list(root.iterdir()):
        if LEFTOVER_PATTERN.fullmatch(path.name):
            _try_to_remove(path)
        elif match := ASIDE_PATTERN.fullmatch(path.name):
            # A kill between the two renames of a commit: the old checkpoint is aside, and there is no new one.
            if (root / match[1]).exists():
                remove(path)
            else:
                os.rename(path, root / match[1])


def prune(root: Path, step: int, retention: Retention) -> None:
    """Removes checkpoints that `retention` does not keep, and those after `step`, from which the run has gone back."""
    valid = []
    for folder in step_folders(root):
        try:
            valid.append((read_manifest(folder).step, folder))
        except CheckpointError:
            continue
    earlier = [(number, folder) for number, folder in valid if number <= step]
    kept = [folder for _, folder in earlier[: retention.keep]]
    kept += [folder for number, folder in earlier if retention.keeps(number)]
    for _, folder in valid:
        if folder not in kept:
            discard(folder)


def discard(folder: Path) -> None:
    """Renames a folder so that no reader finds it, then removes it."""
    gone = folder.with_name(f".removed_{folder.name.removeprefix('.replaced_')}")
    os.rename(folder, gone)
    heartbeat.at("save.prune")
    _try_to_remove(gone)


def _try_to_remove(path: Path) -> None:
    """Removes what can be removed of `path`. The next save removes the rest, such as files that NFS keeps while a
    process has them open."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink()


def remove(path: Path) -> None:
    """Removes a folder, or a link or file in its place, but not what a link points to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
