"""What a container's health check sees of a real trainer."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.helpers import ROOT, command
from train import heartbeat

FLAGS = ("--model", "tiny", "--n-embd", 32, "--n-head", 2, "--block-size", 32, "--batch", 4, "--device", "cpu",
         "--sample-every", 0, "--eval-every", 0, "--steps", 10**6)  # fmt: skip


def health(path: object) -> subprocess.CompletedProcess:
    """The program that the Dockerfile names, as it is called there."""
    environment = {"PATH": os.environ["PATH"]} | ({heartbeat.NAME: str(path)} if path else {})
    check = [sys.executable, str(ROOT / "train/heartbeat.py")]
    return subprocess.run(check, env=environment, capture_output=True, text=True)


def test_a_trainer_that_gets_on_is_seen_and_one_that_hangs_too(data, tmp_path, monkeypatch):
    path = tmp_path / "beat"
    assert health(path).returncode == 1  # none yet
    environment = {**os.environ, "OMP_NUM_THREADS": "1", heartbeat.NAME: str(path)}
    arguments = command("train/run.py", "--data", data, "--out", tmp_path / "out", *FLAGS)
    with subprocess.Popen(arguments, env=environment, stdout=subprocess.DEVNULL) as trainer:
        try:
            beats = set()
            deadline_s = time.monotonic() + 60
            while len(beats) < 3 and time.monotonic() < deadline_s:  # it began, and it goes on
                time.sleep(0.2)
                if path.exists():
                    beats.add(path.stat().st_mtime_ns)
            assert len(beats) == 3
            done = health(path)
            assert (done.returncode, done.stdout.split()[:4]) == (0, ["the", "trainer", "came", "round"])
            trainer.send_signal(signal.SIGSTOP)
            time.sleep(0.2)
            last = path.stat().st_mtime_ns
            time.sleep(heartbeat.EVERY_S + 0.5)
            assert path.stat().st_mtime_ns == last
        finally:
            trainer.kill()
    os.utime(path, (time.time() - heartbeat.MOST_S - 5,) * 2)
    assert health(path).returncode == 1


def test_without_a_name_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.delenv(heartbeat.NAME, raising=False)
    monkeypatch.chdir(tmp_path)
    heartbeat.Heartbeat()()
    assert not any(tmp_path.iterdir())
    assert health(None).returncode == 2


@pytest.mark.parametrize("where", ["nowhere/beat", "."])
def test_a_place_that_cannot_be_written_stops_nothing(tmp_path, monkeypatch, where):
    monkeypatch.setenv(heartbeat.NAME, str(tmp_path / where))
    heartbeat.Heartbeat()()
