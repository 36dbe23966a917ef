"""Progress of a long job: a rich bar on a real terminal, plain single lines on Colab, in pipes and in logs."""

import os
import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

PLAIN_EVERY_S = 10.0


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


class Meter:
    """`with Meter("clean", total, "B") as m: m.add(n)`: rate and ETA while it runs, one closing line at the end.

    `already` units were done by an earlier run: they count as done, not towards the rate.
    """

    def __init__(self, what: str, total: float | None, unit: str, *, already: float = 0) -> None:
        self.what, self.total, self.unit = what, total, unit
        self.done = self.already = already
        self.start_s = self.last_plain_s = time.monotonic()
        self.live: Progress | None = None

    def __enter__(self) -> "Meter":
        if is_live_terminal():
            columns = (TextColumn("{task.description:<10}"), BarColumn(bar_width=30), TextColumn("{task.fields[line]}"))
            self.live = Progress(*columns, console=Console(), transient=True)
            self.task = self.live.add_task(self.what, total=self.total, completed=self.done, line="")
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live:
            self.live.stop()
        if kind is None:
            elapsed_s = time.monotonic() - self.start_s
            print(
                f"{self.what:<10} {count(self.done)}{self.unit} in {duration(elapsed_s)} ({self._rate()})", flush=True
            )

    def _rate(self) -> str:
        elapsed_s = max(time.monotonic() - self.start_s, 1e-9)
        return f"{count((self.done - self.already) / elapsed_s)}{self.unit}/s"

    def add(self, n: float, note: str = "") -> None:
        """Count `n` more units and show it when it is time to."""
        self.done += n
        now_s = time.monotonic()
        rate = (self.done - self.already) / max(now_s - self.start_s, 1e-9)
        parts = [count(self.done) + (f"/{count(self.total)}" if self.total else "") + self.unit, self._rate()]
        if self.total and rate > 0:
            parts.append(f"ETA {duration(max(self.total - self.done, 0) / rate)}")
        line = "  ".join([*parts, note]).rstrip()
        if self.live:
            self.live.update(self.task, completed=self.done, line=line)
        elif now_s - self.last_plain_s >= PLAIN_EVERY_S:
            self.last_plain_s = now_s
            print(f"{self.what:<10} {line}", flush=True)
