"""The display on a terminal: one panel, drawn anew in place at log steps and at no other time.

No thread, no hidden cursor and no second screen: a killed process leaves a terminal as it should be, the last panel on it.
"""

import math
import os
import sys
import time
from dataclasses import dataclass
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cli.progress import count, duration, is_live_terminal
from train.config import TrainConfig
from train.folder import RunFolder, read_lines
from train.ledger import ENDS

FRAME_S = 0.25  # between two frames: a tiny model logs many times a second
LEAST = (50, 14)  # columns and lines; a smaller terminal gets plain lines
WIDEST = 110
MOST_LOSSES = 8192
BARS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Line:
    """What is known at a log step."""

    step: int
    total: int
    loss: float
    val_loss: float | None
    lr: float
    norm: float
    tokens_per_s: float
    mfu: float | None
    epoch: float
    elapsed_s: float  # of all attempts
    eta_s: float

    def __str__(self) -> str:
        """One plain line."""
        return " | ".join(
            [
                f"step {self.step}/{self.total}",
                f"loss {self.loss:.4f}",
                *([f"val {self.val_loss:.4f}"] if self.val_loss is not None else []),
                f"lr {self.lr:.2e}",
                f"norm {self.norm:.2f}",
                f"{count(self.tokens_per_s)} tok/s",
                *([f"mfu {self.mfu:.1%}"] if self.mfu is not None else []),
                f"epoch {self.epoch:.2f}",
                duration(self.elapsed_s),
                f"eta {duration(self.eta_s)}",
            ]
        )


class Display:
    """Shows Lines: as they are, or on a terminal as a panel with the run's last save and sample. A Watcher of the folder."""

    def __init__(self, config: TrainConfig, folder: RunFolder) -> None:
        self.title = f"{config.model} · {os.path.basename(folder.url.rstrip('/'))} · run {folder.run_id}"
        self.price_per_hour = config.price_per_hour
        self.losses: list[float] = []
        self.val = self.saved = self.stored = self.said = ""
        self.last: Line | None = None
        self.drawn_s = 0.0
        self.live: Live | None = None
        if config.display == "auto" and is_live_terminal():
            console = Console()
            if console.width >= LEAST[0] and console.height >= LEAST[1]:
                self._begin(console, folder)

    def _begin(self, console: Console, folder: RunFolder) -> None:
        self.losses = [m["loss"] for m in read_lines(folder.local / "metrics.jsonl") if m.get("loss") is not None]
        # what others print goes above the panel; a stderr that is a file stays one
        self.live = Live(console=console, auto_refresh=False, redirect_stderr=sys.stderr.isatty())
        self.live.start()
        console.show_cursor(True)
        folder.watchers.append(self)

    def show(self, line: Line, losses: list[float]) -> None:
        """Once at each log step; `losses`: of the steps since the last one."""
        if self.live is None:
            print(line, flush=True)
            return
        self.last = line
        self.losses += [x for x in losses if math.isfinite(x)]
        while len(self.losses) > MOST_LOSSES:  # memory does not grow with steps
            self.losses = [(a + b) / 2 for a, b in zip(self.losses[::2], self.losses[1::2], strict=False)]
        if line.val_loss is not None:
            self.val = f"val {line.val_loss:.4f} at step {line.step}"
            print(line, flush=True)  # above the panel, to stay
        self._draw()

    def _draw(self, *, at_once: bool = False) -> None:
        now_s = time.monotonic()
        if self.live and self.last and (at_once or now_s - self.drawn_s >= FRAME_S):
            self.drawn_s = now_s
            width = min(self.live.console.width, WIDEST)
            # an empty line below, where the cursor rests: what a shell prints next does not touch the panel
            self.live.update(Group(self.panel(width), Text("")), refresh=True)

    def panel(self, width: int) -> Panel:
        """The panel of the last Line, for a terminal of that width."""
        line = self.last
        bar = Table.grid(padding=(0, 2), expand=True)
        bar.add_column(no_wrap=True)
        bar.add_column(ratio=1)
        bar.add_column(no_wrap=True, justify="right")
        bar.add_row(
            f"step {line.step}/{line.total}",
            ProgressBar(total=line.total, completed=line.step),
            f"epoch {line.epoch:.2f}",
        )
        rows = Table.grid(padding=(0, 2))
        rows.add_column(style="dim", no_wrap=True)
        rows.add_column(no_wrap=True, overflow="ellipsis")
        curve = sparkline(self.losses, max(width - 50, 10))
        rows.add_row("loss", Text.assemble((f"{line.loss:.4f}", "bold"), "  ", (curve, "cyan"), "  ", self.val))
        speed = f"{count(line.tokens_per_s)} tok/s" + (f"   mfu {line.mfu:.1%}" if line.mfu is not None else "")
        rows.add_row("speed", f"{speed}   lr {line.lr:.2e}   norm {line.norm:.2f}")
        money = ""
        if self.price_per_hour is not None:
            spent, all_of_it = (self.price_per_hour * s / 3600 for s in (line.elapsed_s, line.elapsed_s + line.eta_s))
            money = f"   money {spent:.2f} of {all_of_it:.2f}"
        rows.add_row("time", f"{duration(line.elapsed_s)}   eta {duration(line.eta_s)}{money}")
        if self.saved:
            rows.add_row("saved", Text(self.saved + self.stored))
        if self.said:
            rows.add_row("sample", Text(self.said))
        return Panel(Group(bar, rows), title=Text(self.title), title_align="left", width=width, border_style="dim")

    # ---- a Watcher --------------------------------------------------------------------------------------------------

    def metrics(self, lines: list[dict[str, Any]]) -> None:
        """They come as Lines."""

    def event(self, line: dict[str, Any]) -> None:
        if line["event"] == "saved":
            at = time.strftime("%H:%M:%S")
            if line["tier"] == "local":
                self.saved = f"step {line['step']} at {at} ({count(line['bytes'])}B in {line['seconds']:.1f} s)"
            else:
                self.stored = f", step {line['step']} stored at {at}"
        elif line["event"] == "signal" and self.live:
            # train/preempt.py has just written past Python's streams: the next panel is drawn below, not over that
            self.live._live_render._shape = None
        elif line["event"] in ENDS:
            self.close()

    def sample(self, step: int, text: str) -> None:
        self.said = f"{text.splitlines()[0].removeprefix('sample').strip()} (step {step})"

    def close(self) -> None:
        """Leave the last panel, and the terminal to whoever prints next."""
        if self.live:
            self._draw(at_once=True)
            live, self.live = self.live, None
            live.stop()


def sparkline(values: list[float], width: int) -> str:
    """The curve of the values in at most `width` characters, each a mean; heights are logarithmic, as losses fall."""
    n = min(width, len(values))
    means = [
        sum(part) / len(part) for i in range(n) if (part := values[i * len(values) // n : (i + 1) * len(values) // n])
    ]
    logs = [math.log(max(m, 1e-9)) for m in means]
    low, high = min(logs, default=0.0), max(logs, default=0.0)
    return "".join(BARS[round((x - low) / max(high - low, 1e-9) * (len(BARS) - 1))] for x in logs)
