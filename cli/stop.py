"""Signals that end a program become one exception, so that it can leave with a word about how to go on."""

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(KeyboardInterrupt):
    """Ctrl-C, SIGTERM or a closed terminal. `code` is the exit code that shells expect: 128 + the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.code = 128 + number


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Within it the first signal raises Stopped in the main thread; a second one leaves at once, whatever hangs."""
    before = {n: signal.getsignal(n) for n in SIGNALS}
    ours = [n for n in SIGNALS if before[n] != signal.SIG_IGN]  # nohup asked to be left alone

    def leave(number: int, frame: FrameType | None) -> None:
        os._exit(128 + number)

    def stop(number: int, frame: FrameType | None) -> None:
        for n in ours:
            signal.signal(n, leave)
        raise Stopped(number)

    for n in ours:
        signal.signal(n, stop)
    try:
        yield
    finally:
        for n in ours:
            signal.signal(n, before[n])
