"""Training is seen on a real terminal as one panel in place, and everywhere else as plain lines; killed, it leaves no mess."""

import fcntl
import io
import os
import pty
import re
import signal
import struct
import subprocess
import termios
import threading
import time
from types import SimpleNamespace

import pytest
from rich.console import Console

from tests.helpers import command
from tests.test_train import SHAPE
from train import live
from train.config import TrainConfig
from train.folder import RunFolder
from train.live import Display, Line, sparkline

LINE = Line(step=10, total=40, loss=2.5, val_loss=None, lr=1e-3, norm=0.5, tokens_per_s=27_700.0, mfu=None, epoch=0.25,
            elapsed_s=3600.0, eta_s=10_800.0)  # fmt: skip


class Terminal:
    """A program on a pty of a size; what it wrote so far is `text`."""

    def __init__(self, columns: int, rows: int, *arguments: object, **env: str) -> None:
        self.ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        clean = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR", "CI")}
        self.job = subprocess.Popen(
            command("train/run.py", *arguments), stdin=theirs, stdout=theirs, stderr=theirs,
            env={**clean, "TERM": "xterm-256color", **env},
        )  # fmt: skip
        os.close(theirs)
        self.raw = b""
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def _read(self) -> None:
        try:
            while piece := os.read(self.ours, 1 << 16):
                self.raw += piece
        except OSError:
            pass  # Linux says with EIO that the other end is closed
        os.close(self.ours)

    @property
    def text(self) -> str:
        return self.raw.decode(errors="replace")

    def wait_for(self, pattern: str) -> None:
        limit_s = time.monotonic() + 60
        while not re.search(pattern, self.text) and time.monotonic() < limit_s:
            time.sleep(0.02)
        assert re.search(pattern, self.text)

    def end(self) -> int:
        code = self.job.wait(60)
        self.reader.join(10)
        return code


def flags(data, out, *more):
    return ("--data", data, "--out", out, *SHAPE, "--batch", 4, "--log-every", 1, "--eval-every", 0, "--sample-every", 0,
            "--resume", *more)  # fmt: skip


def cursor_is_hidden(raw: bytes) -> bool:
    return raw.rfind(b"\x1b[?25l") > raw.rfind(b"\x1b[?25h")


def test_a_panel_on_a_terminal_and_lines_in_a_colab_cell(data, tmp_path):
    """Killed on a terminal of a size; and the same on Colab's pty of size 0x0."""
    seen = Terminal(90, 30, *flags(data, tmp_path / "out", "--steps", 100_000, "--save-every", 20))
    seen.wait_for(r"step \d\d+/100000")
    seen.wait_for("saved")
    assert "tiny · out · run" in seen.text
    seen.job.send_signal(signal.SIGKILL)
    assert seen.end() == -signal.SIGKILL
    assert not cursor_is_hidden(seen.raw)
    assert "\x1b[?1049h" not in seen.text  # no second screen to be left in
    assert re.search(r"╯(\x1b\[0m)?\s*\r\n *$", seen.text)  # the cursor rests on a line of its own
    plain = Terminal(0, 0, *flags(data, tmp_path / "colab", "--steps", 45))
    assert plain.end() == 0
    text = plain.text.replace("\r\n", "\n")
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", text)
    assert re.search(r"^step 45/45 \| loss \d\.\d+ \| val .* \| eta 0:00$", text, re.M)
    assert "╭" not in text


def display_on(monkeypatch, tmp_path, width, height, **config):
    """A Display that draws on a recording console of that size."""
    console = Console(width=width, height=height, record=True, force_terminal=True, file=io.StringIO())
    monkeypatch.setattr(live, "is_live_terminal", lambda: True)
    monkeypatch.setattr(live, "Console", lambda: console)
    monkeypatch.setattr(live, "FRAME_S", 0.0)
    return Display(TrainConfig(model="tiny", **config), RunFolder(str(tmp_path / "out"))), console


def shown(display) -> str:
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(display.panel(100))
    return console.export_text()


def test_what_the_panel_tells(monkeypatch, tmp_path):
    display, _ = display_on(monkeypatch, tmp_path, 100, 30, price_per_hour=2.0)
    display.show(LINE, [8.0, 4.0, 2.5])
    display.event({"event": "saved", "tier": "local", "step": 8, "bytes": 2_000_000, "seconds": 0.5})
    display.event({"event": "saved", "tier": "remote", "step": 4, "bytes": 2_000_000, "seconds": 3.0})
    display.sample(9, "sample     [red]Hi -> you\nsample     second")
    text = shown(display)
    for told in ("step 10/40", "2.5000  █▄▁", "27.7k tok/s", "time    1:00:00   eta 3:00:00   money 2.00 of 8.00",
                 "(2.0MB in 0.5 s), step 4 stored at", "[red]Hi -> you (step 9)"):  # fmt: skip
        assert told in text
    display.close()
    display.show(LINE, [2.0])  # after its end it is plain lines


def test_after_a_signals_words_the_panel_is_drawn_below_them(monkeypatch, tmp_path):
    """They are written past Python's streams: going up over the old panel would wipe them out."""
    display, console = display_on(monkeypatch, tmp_path, 100, 30)
    up = re.compile(r"\x1b\[\d*A")
    for event, goes_up in (("progress", True), ("signal", False)):
        display.show(LINE, [2.5])
        display.event({"event": event})
        written = len(console.file.getvalue())
        display.show(LINE, [2.5])
        assert bool(up.search(console.file.getvalue()[written:])) == goes_up
    display.event({"event": "stopped"})
    assert display.live is None
    assert not cursor_is_hidden(console.file.getvalue().encode())


def test_without_a_price_no_money_and_on_a_small_terminal_no_panel(monkeypatch, tmp_path, capsys):
    display, _ = display_on(monkeypatch, tmp_path, 100, 30)
    display.show(LINE, [2.5])
    assert "money" not in shown(display)
    display.close()
    small, _ = display_on(monkeypatch, tmp_path, 40, 10)
    small.show(LINE, [2.5])
    asked, _ = display_on(monkeypatch, tmp_path, 100, 30, display="lines")
    asked.show(LINE, [2.5])
    assert small.live is None
    assert asked.live is None
    assert (
        capsys.readouterr().out.count("step 10/40 | loss 2.5000 | lr 1.00e-03 | norm 0.50 | 27.7k tok/s | epoch") == 2
    )


def test_frames_are_few_and_memory_is_bounded(monkeypatch, tmp_path):
    """A tiny model logs a thousand times a second; a long run has a million steps."""
    display, _ = display_on(monkeypatch, tmp_path, 100, 30)
    frames = []
    monkeypatch.setattr(display.live, "update", lambda *a, **k: frames.append(1))
    monkeypatch.setattr(live, "FRAME_S", 0.25)
    clock = SimpleNamespace(now_s=100.0)
    monkeypatch.setattr(live.time, "monotonic", lambda: clock.now_s)
    for _ in range(1000):
        clock.now_s += 0.001
        display.show(LINE, [3.0] * 50)
    assert len(frames) <= 5
    assert len(display.losses) <= live.MOST_LOSSES


@pytest.mark.parametrize(
    ("values", "width", "bars"),
    [([], 9, ""), ([1.0], 9, "▁"), ([4, 2, 1], 3, "█▅▁"), ([8, 8, 4, 4, 2, 2, 1, 1], 4, "█▆▃▁")],
)
def test_sparkline(values, width, bars):
    assert sparkline(values, width) == bars
