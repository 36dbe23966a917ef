"""A crash at every single storage operation of a resume, the saves after it and the deletion of old steps.

An audit hook sees each open-for-writing, rename, link, truncation, removal and new folder before it happens. From the one
that is chosen on, every further one of the process raises: to the files that is SIGKILL, `finally` blocks included.
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

from store import drive
from tests.helpers import result, train
from tests.test_resume import SMALL
from train import checkpoint, mirror, run
from train.folder import read_lines
from train.saver import Saver

OPERATIONS = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


STRIDE = int(os.environ.get("PERENNIAL_CRASH_STRIDE", "4"))  # 1: at every one, some minutes


class Killed(BaseException):
    """Nothing catches it."""


class Storage:
    """Counts the operations below a folder, and lets the process die at one of them."""

    def __init__(self):
        self.folder, self.count, self.dies_at = "\0", 0, None
        sys.addaudithook(self.see)

    def see(self, event, args):
        if event not in OPERATIONS and not (event == "open" and isinstance(args[2], int) and args[2] & WRITING):
            return
        if isinstance(args[0], str | os.PathLike) and os.fspath(args[0]).startswith(self.folder):
            self.count += 1
            if self.dies_at is not None and self.count >= self.dies_at:
                raise Killed

    def watch(self, folder, dies_at=None):
        self.folder, self.count, self.dies_at = str(folder), 0, dies_at


storage = Storage()  # an audit hook cannot be taken back


@pytest.fixture
def tmp_path():
    """In memory, where there is such a place: this is about the order of operations, and fsync would cost minutes."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        yield Path(folder)


@pytest.fixture(params=["one tier", "two tiers"])
def places(request, tmp_path, monkeypatch):
    """(where the run is, its cache, where storage is watched): a plain folder, or one on a Drive with a local tier."""
    if request.param == "two tiers":
        monkeypatch.setattr(drive, "MOUNT", tmp_path / "world" / "drive")
        (tmp_path / "world" / "drive" / "MyDrive").mkdir(parents=True)
        monkeypatch.setattr(mirror, "PAUSE_S", 0.01)
        return tmp_path / "world" / "drive" / "MyDrive" / "out", tmp_path / "world" / "cache", tmp_path / "world"
    return tmp_path / "world" / "out", tmp_path / "world" / "cache", tmp_path / "world"


def flags_of(data, out, cache, steps):
    return ("--data", data, "--steps", steps, "--save-every", 2, "--keep", 1, *SMALL, "--warmup", 1, "--dropout", 0.1,
            "--schedule", "constant", "--resume", "--out", out, "--cache", cache)  # fmt: skip


def run_until(monkeypatch, dies_at, world, *flags):
    """Train with the process dying at that operation; its threads have ended. True when it died."""
    savers = []
    storage.watch(world, dies_at)
    try:
        with monkeypatch.context() as m:
            m.setattr(run, "Saver", lambda *args, **kwargs: savers.append(Saver(*args, **kwargs)) or savers[-1])
            m.setattr("threading.excepthook", lambda args: None)
            train(*flags)
        return False
    except Killed:
        return True
    finally:
        for saver in savers:
            saver.wait(20)
        storage.watch("\0")


def places_of(out, cache):
    return {str(out), *map(str, (cache / "runs").glob("*"))}


def promised(out, cache):
    """The highest step that any log says was saved."""
    lines = (line for place in places_of(out, cache) for line in read_lines(Path(place) / "events.jsonl"))
    return max(e["step"] for e in lines if e["event"] == "saved")


def test_a_crash_at_every_operation_loses_nothing_that_was_promised(data, tmp_path, monkeypatch, places):
    out, cache, world = places
    for steps in (4, 8):
        assert train(*flags_of(data, tmp_path / "quiet", tmp_path / "quiet-cache", steps)) == 0
    quiet = result(tmp_path / "quiet")
    assert train(*flags_of(data, out, cache, 4)) == 0
    shutil.copytree(world, tmp_path / "before")

    k, died = 1 - STRIDE, True
    while died:
        k += STRIDE
        shutil.rmtree(world)
        shutil.copytree(tmp_path / "before", world)
        died = run_until(monkeypatch, k, world, *flags_of(data, out, cache, 8))
        steps = [m.step for place in places_of(out, cache) for m in checkpoint.committed(place)]
        assert max(steps) >= promised(out, cache) >= 4, k
        assert train(*flags_of(data, out, cache, 8)) == 0, k
        assert result(out) == quiet, k
    assert k > 40
