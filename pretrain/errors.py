"""Errors a user can mend: one sentence that says what is wrong, with the numbers, and which setting to change.

Everything else is a defect of ours and keeps its traceback.
"""

import os
import sys
from collections.abc import Callable


class EspalierError(Exception):
    """A user's mistake or a fault of the surroundings; `str(error)` is the whole message."""

    exit_code = 1
    agreed = False
    """Whether all processes raise the same error, and know it: then the first one prints it for all."""


class ConfigError(EspalierError):
    """A setting, or a combination of settings, that cannot work."""

    exit_code = 2


class DataError(EspalierError):
    """A corpus, index or tokenizer that is missing, damaged or does not fit the model."""

    exit_code = 2


class CheckpointError(EspalierError):
    """A checkpoint that is missing, incomplete, damaged or of another architecture; or one that could not be
    written."""

    exit_code = 3


class NumericalError(EspalierError):
    """Training that no longer makes numerical sense."""

    exit_code = 4


class HangError(EspalierError):
    """Processes that are lost or have stopped."""

    exit_code = 5


class StopSignal(EspalierError):
    """The run was asked to end, and did so in order."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.agreed = True


def agreed(message: str) -> NumericalError:
    """The error for a figure that is the same on all processes: the first one prints it."""
    error = NumericalError(message)
    error.agreed = True
    return error


def _leave_own_folder_out() -> None:
    """Takes the script's folder off the path, where Python puts it first.

    Else scripts in it (`tools/evaluate.py`) would hide libraries of the same name from later imports. Our own modules
    are imported by their full names.
    """
    script = getattr(sys.modules["__main__"], "__file__", None)
    if script is not None:
        own = os.path.realpath(os.path.dirname(os.path.abspath(script)))
        sys.path[:] = [folder for folder in sys.path if not folder or os.path.realpath(folder) != own]


def run_command(main: Callable[[], None]) -> None:
    """Runs a command-line entry; an `EspalierError` becomes one line on stderr and its exit code."""
    _leave_own_folder_out()
    try:
        main()
    except EspalierError as error:
        # Before processes have met, those of one node read the same files: one of each node prints the error.
        speaker = "RANK" if error.agreed else "LOCAL_RANK" if isinstance(error, ConfigError) else ""
        if os.environ.get(speaker, "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
