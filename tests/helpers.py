"""What several test files need: running the project's programs in this process or as real ones, and comparing results."""

import contextlib
import importlib
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cli.errors import USER_ERRORS
from prep import tokenize_bpe
from store import lock
from train import checkpoint, run

ROOT = Path(__file__).resolve().parent.parent


def prepare(*arguments: object) -> int:
    """prep/tokenize_bpe.py in this process, one worker."""
    try:
        return tokenize_bpe.main([*map(str, arguments), "--workers", "1"])
    finally:
        lock.let_go()


def train(*arguments: object) -> int:
    """train/run.py in this process; signal handlers are put back, its watchdog ends."""
    handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        return run.main([*map(str, arguments)])
    finally:
        lock.let_go()
        if (watched := signal.set_wakeup_fd(-1)) != -1:
            os.close(watched)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def saves_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step waits for the save in flight: steps of milliseconds outrun it on a busy disk, and saves would be of others."""
    due = run.Saver.due
    monkeypatch.setattr(run.Saver, "due", lambda saver, step: saver.wait() and due(saver, step))


def command(script: str, *arguments: object) -> list[str]:
    """The command line of one of the project's programs."""
    return [sys.executable, str(ROOT / script), *map(str, arguments)]


def start(script: str, *arguments: object, **options: object) -> subprocess.Popen:
    """Start a program for real, in a folder of its own choosing: programs must work from anywhere."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command(script, *arguments), env=environment, text=True, **options)


def error_of(main: object, *arguments: object) -> str:
    """The one line a program would print for a user's error. Fails when there is none."""
    with pytest.raises(USER_ERRORS) as caught:
        main(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by relative name, but for timing.js: the one that differs between equal runs."""
    found = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != "timing.js")
    return {str(p.relative_to(folder)): p.read_bytes() for p in found}


def save(out: Path, step: int, *, floats: int = 50) -> checkpoint.Manifest:
    """Commit a state of three times as many floats, another one at every step."""
    tensors = {n: {"w": torch.full((floats,), float(step))} for n in checkpoint.TENSOR_PARTS}
    state = {"step": step, "elapsed_s": 1.0, "val_loss": None, "scaler": {}, "config": {}, "model": {},
             "data": {"fingerprint": "f", "vocab_size": 9}}  # fmt: skip
    return checkpoint.save(out, step=step, run_id="r", attempt=1, val_loss=None, tensors=tensors, state=state)


def result(out: Path) -> dict[str, object]:
    """What two runs must share: hashes of the newest checkpoint's tensors, and every logged loss."""
    newest = checkpoint.committed(str(out))[-1]
    hashes = {name: newest.parts[name]["sha256"] for name in checkpoint.TENSOR_PARTS}
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {"step": newest.step, **hashes, "metrics": lines}


def help_of(script: str) -> str:
    """What `python SCRIPT --help` prints, without the seconds that a process of its own would import for."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), pytest.raises(SystemExit) as end:
        importlib.import_module(script.removesuffix(".py").replace("/", ".")).main(["--help"])
    assert not end.value.code
    return said.getvalue()
