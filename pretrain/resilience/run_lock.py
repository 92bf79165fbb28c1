"""Keeps a second run out of a run's folder.

The lock is the kernel's (`flock`), so it ends with the process that holds it, however that process ends. On NFS the
server may keep the lock of a crashed node for a minute or two, the time of its lease. The file names the holder, for
people.
"""

import contextlib
import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from pretrain.distributed import is_first_process, together
from pretrain.errors import ConfigError

LOCK_FILE = ".lock"
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Context in which this run alone uses `folder`. Process 0 holds the lock; if it cannot, all processes raise."""
    lock = together(lambda: _take(folder) if is_first_process() else None)
    try:
        yield
    finally:
        if lock is not None:
            with contextlib.suppress(OSError):  # the folder may have been removed
                if [path.name for path in folder.iterdir()] == [LOCK_FILE]:  # the run could not begin
                    (folder / LOCK_FILE).unlink()
                    folder.rmdir()
            lock.release()


def _take(folder: Path) -> FileLock:
    """Takes the lock, and returns it."""
    # A file system without flock is refused: a mere file as a lock would stay after a killed run.
    lock = FileLock(folder / LOCK_FILE, blocking=False, fallback_to_soft=False, on_acquired=_write_holder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        holder = (folder / LOCK_FILE).read_bytes()[:200].decode(errors="replace").strip()
        raise ConfigError(
            f"run.folder {folder} is in use by {holder}: end that run, or set run.folder to another folder"
        ) from None
    except OSError as error:
        if error.errno in _NO_LOCKS:
            raise ConfigError(
                f"run.folder {folder} cannot be locked ({error.strerror}): set run.folder to a file system that has "
                "flock"
            ) from error
        raise ConfigError(
            f"run.folder {folder} cannot be written ({error.strerror}): set run.folder to another place"
        ) from error
    return lock


def _write_holder(descriptor: int) -> None:
    with contextlib.suppress(OSError):  # on a full disk the lock holds without the holder's name
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
