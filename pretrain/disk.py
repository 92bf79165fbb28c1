"""A folder that appears only when it is complete, and takes the place of an earlier one then."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from pretrain.checkpoint.format import sync_folder
from pretrain.errors import CheckpointError


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A folder beside `output` that takes its name at the end, or is removed when anything goes wrong.

    Whether `output` may be replaced is for the caller to know.
    """
    staging = output.with_name(f".{output.name}.partial")
    aside = output.with_name(f".{output.name}.replaced")
    try:
        if staging.exists():
            shutil.rmtree(staging)  # of a run that was killed
        staging.mkdir(parents=True)
        yield staging
        sync_folder(staging)
        if aside.exists():
            shutil.rmtree(aside)
        if output.exists():
            output.rename(aside)
        try:
            staging.rename(output)
        except OSError:
            if aside.exists():
                aside.rename(output)
            raise
        sync_folder(output.parent)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{output} could not be written ({error}): free space there, make it writable, or give another --output"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if output.exists():
            shutil.rmtree(aside, ignore_errors=True)
