"""Progress is a live bar on a real terminal and plain lines everywhere else; its rates and ETA are right."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import psutil
import pytest

from cli import progress
from cli.progress import Meter, count, duration

ROOT = Path(__file__).parent.parent
JOB = """
import time
from cli import progress
from cli.progress import Meter
progress.PLAIN_EVERY_S = 0.05
with Meter("clean", 1000, "B") as m:
    for _ in range(10):
        m.add(100, "note")
        time.sleep(0.03)
"""


def on_pty(columns: int, rows: int, **env: str) -> str:
    """What the job prints on a terminal of that size."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    clean = {
        k: v for k, v in os.environ.items() if k not in ("COLAB_RELEASE_TAG", "COLUMNS", "LINES", "NO_COLOR", "CI")
    }
    job = subprocess.Popen(
        [sys.executable, "-c", JOB], cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs,
        env={**clean, "TERM": "xterm-256color", **env},
    )  # fmt: skip
    os.close(theirs)
    shown = b""
    try:
        while piece := os.read(ours, 1 << 16):
            shown += piece
    except OSError:
        pass  # Linux says the other end is closed with EIO
    os.close(ours)
    assert job.wait(20) == 0, shown.decode()
    return shown.decode()


def in_pipe() -> str:
    return subprocess.run([sys.executable, "-c", JOB], cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    "show",
    [
        in_pipe,
        lambda: on_pty(0, 0),  # a Colab `!` cell
        lambda: on_pty(80, 24, COLAB_RELEASE_TAG="release-colab_20261101"),
        lambda: on_pty(80, 24, TERM="dumb"),
    ],
    ids=["pipe", "pty 0x0", "Colab", "dumb"],
)
def test_plain_lines_where_nothing_can_move(show):
    """No escape character and no carriage return that overwrites: every line stands on its own."""
    shown = show().replace("\r\n", "\n")
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", shown)
    *lines, last = shown.splitlines()
    assert 2 <= len(lines) <= 9
    for line in lines:
        assert re.fullmatch(r"clean      \d+/1000B  [\d.kM]+B/s  ETA 0:0\d  memory [\d.]+MB  note", line)
    assert re.fullmatch(r"clean      1000B in 0:0\d \([\d.k]+B/s\)", last)


def test_a_live_bar_on_a_real_terminal():
    """On a terminal with a size the bar is redrawn in place, and only the closing line stays."""
    shown = on_pty(100, 30)
    assert "\x1b[" in shown
    assert "━" in shown
    assert re.search(r"clean      1000B in 0:0\d", shown.splitlines()[-1])


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets."""

    class Clock:
        now_s = 1000.0

        def monotonic(self) -> float:
            return self.now_s

    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    monkeypatch.setattr(progress, "is_live_terminal", lambda: False)
    monkeypatch.setattr(progress, "PLAIN_EVERY_S", 1e9)  # the closing line alone
    return clock


def test_rate_and_eta(clock, capsys):
    """Rate and ETA count this run's work; what an earlier run did counts as done only."""
    with Meter("encode", 1_000_000, "B", already=500_000) as m:
        clock.now_s += 20
        m.add(100_000)
        assert without_memory(m.line()) == "600.0k/1.0MB  5000B/s  ETA 1:20"
        clock.now_s += 10
        m.add(50_000, "warm")
        assert without_memory(m.line()) == "650.0k/1.0MB  5000B/s  ETA 1:10  warm"
    assert capsys.readouterr().out == "encode     650.0kB in 0:30 (5000B/s)\n"
    assert m.elapsed_s == 30


def without_memory(line: str) -> str:
    return re.sub(r"  memory [\d.]+[kMG]?B", "", line)


def test_unknown_total_and_no_time(clock, capsys):
    """Without a total there is no ETA; a job that took no time divides by nothing."""
    with Meter("read", None, " docs") as m:
        clock.now_s += 10
        m.add(7)
        assert without_memory(m.line()) == "7 docs  1 docs/s"
    with Meter("nothing", 0, "B") as m:
        assert without_memory(m.line()) == "0B  0B/s"
    read, nothing = capsys.readouterr().out.splitlines()
    assert read == "read       7 docs in 0:10 (1 docs/s)"
    assert nothing == "nothing    0B in 0:00 (0B/s)"


def test_a_silent_step_is_no_silence():
    """Lines come while nothing is counted: a tokenizer that trains for minutes must not look hung."""
    job = JOB.replace("for _ in range(10):", "for _ in range(0):").replace("as m:", "as m:\n    time.sleep(0.3)")
    lines = subprocess.run([sys.executable, "-c", job], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    assert len(lines) >= 3
    assert all(line.startswith("clean      0/1000B") for line in lines[:-1])


def test_memory_counts_every_process():
    """The peak holds what a child held for a moment, though it is gone at the end."""
    size = 200 << 20
    hold = f"import time; held = bytearray({size}); time.sleep(1)"
    with Meter("hold", None, "B") as m:
        before = sum(progress.resident(psutil.Process()))
        subprocess.run([sys.executable, "-c", hold], check=True)
        after = sum(progress.resident(psutil.Process()))
    assert m.peak_memory - before > size
    assert after - before < size


def test_a_failed_job_claims_nothing(clock, capsys):
    """An exception passes through and no closing line says that the work was done."""
    with pytest.raises(ZeroDivisionError), Meter("clean", 10, "B"):
        raise ZeroDivisionError
    assert capsys.readouterr().out == ""


def test_words_for_numbers():
    assert [duration(s) for s in (0, 59.4, 59.6, 3599, 3600, 90061)] == [
        "0:00",
        "0:59",
        "1:00",
        "59:59",
        "1:00:00",
        "25:01:01",
    ]
    assert [count(n) for n in (0, 999, 9999, 10_000, 1_234_567, 2.5e9, 3e12)] == [
        "0",
        "999",
        "9999",
        "10.0k",
        "1.2M",
        "2.5G",
        "3.0T",
    ]
