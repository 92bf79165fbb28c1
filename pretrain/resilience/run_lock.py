"""Keeps a second run out of a run's folder.

The lock is the kernel's (`flock`): it ends with the process that holds it, however that ends. On NFS the server may
keep the lock of a node that crashed for its lease, a minute or two. The file says who holds it, for people.
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
            lock.release()


def _take(folder: Path) -> FileLock:
    """The lock, which is held."""
    # A file system without flock is refused: a lock that is a mere file would stay behind a killed run.
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
    with contextlib.suppress(OSError):  # a full disk: the lock holds without a name
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
