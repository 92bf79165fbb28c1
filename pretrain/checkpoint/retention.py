"""Which checkpoints stay, and how folders go so that a kill never leaves half of one under a valid name.

The newest `keep` stay, two at least, and every one whose step is a multiple of `keep_every`. Only whole ones count:
incomplete folders are neither counted nor touched. A folder to be removed is renamed first.
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
"""A single one could turn out damaged."""


@dataclass(frozen=True)
class Retention:
    """How many checkpoints stay."""

    keep: int
    keep_every: int = 0
    """Those of a step that is a multiple of it stay for good; 0: none."""

    def keeps(self, step: int) -> bool:
        return self.keep_every > 0 and step % self.keep_every == 0


def clear_leftovers(root: Path) -> None:
    """Removes what kills left behind, and brings back an older checkpoint that waits for a new one that never came."""
    for path in list(root.iterdir()):
        if LEFTOVER_PATTERN.fullmatch(path.name):
            _remove_what_goes(path)
        elif match := ASIDE_PATTERN.fullmatch(path.name):
            # A kill between the two renames of a commit left the old one aside and no new one.
            if (root / match[1]).exists():
                remove(path)
            else:
                os.rename(path, root / match[1])


def prune(root: Path, step: int, retention: Retention) -> None:
    """Leaves what `retention` keeps up to `step`. Later ones belong to a history that the run has left."""
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
    """Takes a folder out of sight, then removes it."""
    gone = folder.with_name(f".removed_{folder.name.removeprefix('.replaced_')}")
    os.rename(folder, gone)
    heartbeat.at("save.prune")
    _remove_what_goes(gone)


def _remove_what_goes(path: Path) -> None:
    """What is left, such as files that NFS keeps for whoever has them open, the next save removes."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink()


def remove(path: Path) -> None:
    """Removes a folder, or a link or file in its place; what a link points to stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
