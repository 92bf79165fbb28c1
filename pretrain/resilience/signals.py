"""The signals that ask a run to save and leave."""

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from pretrain.agreement import SIGNALS

_IMPATIENCE_SECONDS = 3.0
"""Shortest time after which a second SIGTERM counts: scheduler and launcher may each send one for the same end."""


class Signals:
    """SIGTERM and SIGUSR1 as a request to save and leave; a second SIGTERM, seconds later, ends the process at once.

    A thread reads them from a pipe, because Python runs its handlers only when the main thread comes back from the
    collective that it is in.
    """

    def __init__(self) -> None:
        self.received = 0

    @contextmanager
    def caught(self) -> Iterator[None]:
        listening, waking = socket.socketpair()
        waking.setblocking(False)
        before = {number: signal.signal(number, lambda _number, _frame: None) for number in SIGNALS}
        descriptor = signal.set_wakeup_fd(waking.fileno(), warn_on_full_buffer=False)
        listener = threading.Thread(target=self._listen, args=(listening,), name="signals", daemon=True)
        listener.start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(descriptor)
            for number, handler in before.items():
                signal.signal(number, handler)
            waking.close()
            listener.join()
            listening.close()

    def _listen(self, listening: socket.socket) -> None:
        first = 0.0
        while numbers := listening.recv(1):
            number = numbers[0]
            now = time.monotonic()
            if number == self.received == signal.SIGTERM and now - first > _IMPATIENCE_SECONDS:
                os._exit(128 + number)
            first = first if self.received else now
            if number in SIGNALS:  # others, such as SIGINT, keep their own handlers
                self.received = max(self.received, number)
