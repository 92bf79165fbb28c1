"""Shows what the processes of a run log: all of process 0, and of the others what begins with `error:`."""

import re
import sys
import threading
from pathlib import Path

_PROCESS = re.compile(r"(?:_rank|rank\.)([0-9]+)")
"""Number of the process in the names of log files, of deepspeed (`20261126113258_rank0.log`) and mpirun
(`1/rank.0/stdout`)."""
_POLL_SECONDS = 0.2


class Follower(threading.Thread):
    """Shows what a run's processes write to their logs from now on."""

    def __init__(self, logs: Path) -> None:
        super().__init__(daemon=True)
        self.logs, self.ended = logs, threading.Event()
        self.read = {path: path.stat().st_size for path in self._files()}

    def _files(self) -> list[Path]:
        return [path for path in self.logs.rglob("*") if path.is_file() and self._process(path) is not None]

    def _process(self, path: Path) -> int | None:
        match = _PROCESS.search(str(path.relative_to(self.logs)))
        return int(match[1]) if match else None

    def run(self) -> None:
        while not self.ended.wait(_POLL_SECONDS):
            self._show()
        self._show()

    def _show(self) -> None:
        for path in self._files():
            with path.open("rb") as file:
                file.seek(self.read.get(path, 0))
                whole, newline, _ = file.read().rpartition(b"\n")
            self.read[path] = self.read.get(path, 0) + len(whole + newline)
            for line in whole.decode(errors="replace").splitlines():
                if self._process(path) == 0:
                    print(line, flush=True)
                elif line.startswith("error: "):
                    print(line, file=sys.stderr, flush=True)

    def end(self) -> None:
        """Shows what is left and ends."""
        self.ended.set()
        self.join()
