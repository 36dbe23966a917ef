"""Being told to stop, and leaving in time: signals, GCE's preemption notice (train/gce.py) and --stop-after.

Whoever asks a process to stop kills it after a grace. So the loop saves and leaves within --grace-seconds, and where it
cannot (a long compilation, storage that hangs), a watchdog thread ends the process: what is committed stays committed.
"""

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

from train import clock
from train.exits import STOPPED
from train.heartbeat import Heartbeat

T = TypeVar("T")
STOP_AFTER = "--stop-after"

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
ONE_REQUEST_S = 0.1  # kernel and shell both hang up on a closed terminal; wrappers pass on what their group got already
LAST_CHANCE_S = 0.4  # after a second signal: Colab's second press on Stop is SIGTERM, and SIGKILL half a second later
UNWIND_S = 1.0  # for the main thread to leave by itself when there is nothing to save
SPARE_S = 0.1  # of the grace, for the exit itself
SAY_S = 0.5  # for the last words: a terminal that was halted must not keep the process


class Interrupted(KeyboardInterrupt):
    """Told to stop where nothing is lost by leaving at once."""


class StopSignal:
    """Call it anywhere to ask whether to stop. One for the life of a process, made in the main thread.

    A signal that comes within 0.1 s of the first is the same request. A later one leaves 0.4 s at most for what is being
    committed, then ends the process with 128 + its number.
    """

    def __init__(self, *, grace_s: float = 30.0, stop_after_s: float | None = None) -> None:
        self.name: str | None = None  # who asked
        self.grace_s = grace_s  # between being told and being killed
        self.stop_after_s = stop_after_s  # of the process's life
        self.reserve_s = 0.0  # what the last save will take, for `stop_after_s`
        self.nothing_to_save = True  # a signal ends the program at once: nothing new has been learnt yet
        self.alone = True  # else other processes wait for this one: it leaves nothing in its middle
        self.silent = False  # another process says it
        self.interrupted = False  # Interrupted was raised: what the program ends with now comes of it
        self.record: Callable[..., None] = lambda event, **fields: None  # writes an event: RunFolder.event, once open
        self._beat = Heartbeat()  # whoever asks whether to stop is alive
        self._interruptible = False
        self._deadline_s: float | None = None
        self._code = STOPPED
        self._first_s: float | None = None  # when the first signal came
        # The C handler writes a signal's number here at once, while Python's runs only when the main thread comes to its
        # next bytecode: not in a long kernel, not while storage hangs.
        read, write = os.pipe()
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup asked to be left alone
                signal.signal(number, self._on_signal)
        threading.Thread(target=self._watch, args=(read,), daemon=True, name="stop").start()

    def __call__(self) -> bool:
        self._beat()
        return self.name is not None

    def seconds_left(self) -> float:
        """Of the grace: what a save may still take. All of it before anybody asked."""
        if self._deadline_s is None:
            return self.grace_s
        return max(self._deadline_s - SPARE_S - time.monotonic(), 0.0)

    def ask(self, name: str) -> None:
        """Ask to stop, in somebody's name; the grace of whoever asked first counts. Any thread may."""
        grace_s = min(self.grace_s, UNWIND_S) if self.nothing_to_save else self.grace_s
        self._limit(max(grace_s, self.reserve_s) if name == STOP_AFTER else grace_s)
        self.name = self.name or name

    def unless_stopped(self, action: Callable[[], T]) -> T | None:
        """What `action` returns; None when it had not ended, or begun, as a signal came. It may change nothing that is
        saved: it is left in its middle."""
        if not self.alone:
            return action()
        try:
            self._interruptible = True
            return None if self() else action()
        except BaseException:  # a library that is interrupted may raise another exception in its place
            if not self.interrupted:
                raise
            self.interrupted = False
            return None
        finally:
            self._interruptible = False

    def _limit(self, seconds: float) -> None:
        limit_s = time.monotonic() + seconds
        self._deadline_s = limit_s if self._deadline_s is None else min(self._deadline_s, limit_s)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """Python's handler, in the main thread. What may block is the watcher's: this may have come inside a print."""
        self.ask(signal.Signals(number).name)
        if (self.nothing_to_save or self._interruptible) and not self.interrupted:
            self.interrupted, self._interruptible = True, False
            raise Interrupted

    def _watch(self, read: int) -> None:
        """The watchdog: counts signals, says what happens, and ends the process when its time is over."""
        poll = select.poll()
        poll.register(read, select.POLLIN)
        told = False
        while True:
            # a second at most: another thread may have asked
            left_s = 1.0 if self._deadline_s is None else min(1.0, self._deadline_s - time.monotonic())
            if poll.poll(1000 * max(left_s, 0.0)):
                numbers = os.read(read, 64)
                if not numbers:  # the other end was closed: nobody is to be watched any more
                    return os.close(read)
                for number in numbers:
                    self._count(number)
            if (
                self.stop_after_s is not None
                and clock.up_s() + self.reserve_s >= self.stop_after_s
                and self.name is None
            ):
                self.ask(STOP_AFTER)
            if self.name and not told:
                told = True
                words = f"\n{self.name}: saving, then stopping; once more to leave at once\n"
                self._say("" if self.nothing_to_save else words, "signal", name=self.name)
            if self._deadline_s is not None and time.monotonic() >= self._deadline_s:
                self._leave()

    def _count(self, number: int) -> None:
        if number not in SIGNALS:
            return
        now_s = time.monotonic()
        self._first_s = self._first_s or now_s
        self.ask(signal.Signals(number).name)
        if now_s - self._first_s > ONE_REQUEST_S:
            self._code = 128 + number
            self._limit(LAST_CHANCE_S)

    def _leave(self) -> None:
        try:
            if self._code != STOPPED:
                line = (
                    f"{signal.Signals(self._code - 128).name}, the second signal: left with what was committed before\n"
                )
            elif self.nothing_to_save:
                line = f"stopped by {self.name} with nothing new to save; the same command with --resume goes on\n"
            else:
                line = (f"stopped by {self.name}: its grace is over (--grace-seconds {self.grace_s:g}), left with what was "
                        "committed before; the same command with --resume goes on from there\n")  # fmt: skip
            self._say(line, "stopped", signal=self.name, code=self._code, in_time=False).join(SAY_S)
        finally:
            os._exit(self._code)

    def _say(self, line: str, event: str, **fields: Any) -> threading.Thread:
        """A line on stderr and an event, in a thread of their own: either may hang, the watchdog may not."""

        def say() -> None:
            if not self.silent:
                _write(line)
            self.record(event, **fields)

        thread = threading.Thread(target=say, daemon=True)
        thread.start()
        return thread


def _write(line: str) -> None:
    """To stderr, where there is one, past Python's buffer: its lock may be held by a print that was interrupted."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.write(sys.stderr.fileno(), line.encode())


def leave_at_once() -> None:
    """Until a StopSignal is made: the imports of a trainer take seconds, and have nothing to lose."""

    def leave(number: int, frame: FrameType | None) -> None:
        _write(f"stopped by {signal.Signals(number).name} before it began; nothing is lost by that\n")
        os._exit(STOPPED)

    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, leave)
