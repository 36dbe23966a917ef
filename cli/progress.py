"""Progress of a long job: a rich bar on a real terminal, plain single lines on Colab, in pipes and in logs."""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextvars import ContextVar
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import psutil

PLAIN_EVERY_S = 10.0
SAMPLE_EVERY_S = 0.25


def is_live_terminal() -> bool:
    """True where cursor movement works. A Colab `!` cell is a tty of size 0x0 that prints cursor-up as text."""
    if not sys.stdout.isatty() or os.environ.get("COLAB_RELEASE_TAG") or os.environ.get("TERM") == "dumb":
        return False
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns > 0
    except OSError:
        return False


def duration(seconds: float) -> str:
    """h:mm:ss, or m:ss below an hour."""
    s = int(seconds + 0.5)
    return f"{s // 3600}:{s // 60 % 60:02d}:{s % 60:02d}" if s >= 3600 else f"{s // 60}:{s % 60:02d}"


def count(n: float) -> str:
    """1234567 -> 1.2M."""
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if n >= limit:
            return f"{n / (1e3 if unit == 'k' else limit):.1f}{unit}"
    return f"{n:.0f}"


def resident(process: "psutil.Process | None" = None) -> list[int]:
    """Bytes of memory that a process (this one) and each of its descendants hold now; pages they share count in each."""
    import psutil  # not before a program has begun its work

    process, sizes = process or psutil.Process(), []
    with contextlib.suppress(psutil.Error):
        for p in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.Error):  # it ended just now; the others count
                sizes.append(p.memory_info().rss)
    return sizes


_finished: ContextVar[list["Meter"] | None] = ContextVar("finished", default=None)


@contextlib.contextmanager
def recorded() -> Iterator[list["Meter"]]:
    """`with recorded() as meters:` collects the Meters that finish well inside the block."""
    token = _finished.set([])
    try:
        yield _finished.get()
    finally:
        _finished.reset(token)


class Meter:
    """`with Meter("clean", total, "B") as m: m.add(n)`: rate, ETA and memory while it runs, one closing line at the end.

    It shows itself from a thread, so that a long step without an `add` is no silence. Afterwards `done`, `elapsed_s` and
    `peak_memory`, sampled over all processes, say what it came to. `already` units were done by an earlier run: they
    count as done, not towards the rate.
    """

    def __init__(self, what: str, total: float | None, unit: str, *, already: float = 0) -> None:
        self.what, self.total, self.unit = what, total, unit
        self.done = self.already = already
        self.note = ""
        self.memory = self.peak_memory = 0
        self.start_s = time.monotonic()
        self.ended_s: float | None = None
        self.live = None  # or rich's Progress
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Meter":
        if is_live_terminal():
            from rich.console import Console  # 45 ms, which logs and worker processes need not pay
            from rich.progress import BarColumn, Progress, TextColumn

            columns = (TextColumn("{task.description:<10}"), BarColumn(bar_width=30), TextColumn("{task.fields[line]}"))
            self.live = Progress(*columns, console=Console(), transient=True)
            self._task = self.live.add_task(self.what, total=self.total, completed=self.done, line="")
            self.live.start()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()
        self.ended_s = time.monotonic()
        if self.live:
            self.live.stop()
        if kind is None:
            if (finished := _finished.get()) is not None:
                finished.append(self)
            print(
                f"{self.what:<10} {self.amount()} in {duration(self.elapsed_s)} ({self.rate()})",
                flush=True,
            )

    @property
    def elapsed_s(self) -> float:
        """Seconds since it was made, up to its end."""
        return max((self.ended_s or time.monotonic()) - self.start_s, 1e-9)

    def add(self, n: float, note: str = "") -> None:
        """Count `n` more units; `note` is shown until the next one."""
        self.done += n
        self.note = note

    def amount(self) -> str:
        """What is done: 138.3MB."""
        return f"{count(self.done)}{self.unit}"

    def rate(self) -> str:
        """What is done a second: 54.0MB/s."""
        return f"{count((self.done - self.already) / self.elapsed_s)}{self.unit}/s"

    def line(self) -> str:
        words = [count(self.done) + (f"/{count(self.total)}" if self.total else "") + self.unit, self.rate()]
        if self.total and self.done > self.already:
            left = max(self.total - self.done, 0)
            words.append(f"ETA {duration(left * self.elapsed_s / (self.done - self.already))}")
        return "  ".join([*words, f"memory {count(self.memory)}B", self.note]).rstrip()

    def _watch(self) -> None:
        last_plain_s = self.start_s
        while True:
            self.memory = sum(resident())
            self.peak_memory = max(self.peak_memory, self.memory)
            if self.live:
                self.live.update(self._task, completed=self.done, line=self.line())
            elif time.monotonic() - last_plain_s >= PLAIN_EVERY_S:
                last_plain_s = time.monotonic()
                try:
                    print(f"{self.what:<10} {self.line()}", flush=True)
                except OSError:
                    return  # a reader that is gone: whoever prints next in the main thread deals with it
            if self._end.wait(min(SAMPLE_EVERY_S, PLAIN_EVERY_S)):
                return
