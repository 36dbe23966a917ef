"""Signals that end a program become one exception, so that it can leave with a word about how to go on."""

import contextlib
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass
class Stop:
    """Which signal came."""

    number: int = signal.SIGINT

    @property
    def code(self) -> int:
        """The exit code that shells expect."""
        return 128 + self.number


@contextlib.contextmanager
def stoppable() -> Iterator[Stop]:
    """Within it the first of SIGNALS raises KeyboardInterrupt; a second one leaves at once, whatever hangs."""
    stop = Stop()
    before = {n: signal.getsignal(n) for n in SIGNALS}
    ours = [n for n in SIGNALS if before[n] != signal.SIG_IGN]  # nohup asked to be left alone

    def leave(number: int, frame: FrameType | None) -> None:
        os._exit(128 + number)

    def first(number: int, frame: FrameType | None) -> None:
        stop.number = number
        for n in ours:
            signal.signal(n, leave)
        raise KeyboardInterrupt  # no class of our own: a library that is interrupted may raise another in its place

    for n in ours:
        signal.signal(n, first)
    try:
        yield stop
    finally:
        for n in ours:
            signal.signal(n, before[n])
