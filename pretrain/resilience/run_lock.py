"""Keeps a second run out of a run's folder.

The lock is the kernel's (`flock`): it ends with the process that holds it, however that ends. On NFS the server may
keep the lock of a node that crashed for its lease, a minute or two. The file says who holds it, for people.
"""

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pretrain.distributed import is_first_process, together
from pretrain.errors import ConfigError

LOCK_FILE = ".lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Inside it this run has `folder` for itself; process 0 holds the lock, and all processes raise if it cannot."""
    lock = together(lambda: _take(folder) if is_first_process() else None)
    try:
        yield
    finally:
        if lock is not None:
            with contextlib.suppress(OSError):  # the folder may have gone
                if [path.name for path in folder.iterdir()] == [LOCK_FILE]:  # the run could not begin
                    (folder / LOCK_FILE).unlink()
                    folder.rmdir()
            os.close(lock)


def _take(folder: Path) -> int:
    """The descriptor that holds the lock."""
    path = folder / LOCK_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        raise ConfigError(
            f"run.folder {folder} cannot be written ({error.strerror}): set run.folder to another place"
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(lock, 200).decode(errors="replace").strip()
        os.close(lock)
        raise ConfigError(
            f"run.folder {folder} is in use by {holder}: end that run, or set run.folder to another folder"
        ) from None
    except OSError as error:
        os.close(lock)
        raise ConfigError(
            f"run.folder {folder} cannot be locked ({error.strerror}): set run.folder to a file system that has flock"
        ) from error
    with contextlib.suppress(OSError):  # a full disk: the lock holds without a name
        os.ftruncate(lock, 0)
        os.write(lock, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return lock
