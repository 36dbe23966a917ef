"""--dry-run says what a run takes and writes nothing; --preflight does it for real, small, and leaves nothing behind."""

import re
import resource
import shutil
import signal
import subprocess
import time

import pytest

from store import fs
from tests.helpers import files, start, train
from tests.test_train import QUICK, SHAPE
from train import checks, rehearsal


def test_a_dry_run_tells_and_writes_nothing(data, tmp_path, capsys):
    """Nowhere: not in --out, not beside it, not in the cache."""
    flags = ("--data", data, "--out", tmp_path / "a" / "out", "--cache", tmp_path / "cache", "--dry-run", *SHAPE)
    assert train(*flags, "--batch", 4, "--steps", 1000) == 0
    told = capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    assert "run        1000 steps of 4 x 64 = 256.0k tokens" in told
    assert re.search(
        r"memory     \S+B at micro-batch 4 in fp32: weights (6\d\d\.\dkB), gradients \1, moments 1\.4MB", told
    )
    for gpu in ("T4", "L4", "A100", "H100"):
        assert re.search(rf"^{gpu} .* \d:\d\d +\d+\.\d\d  \S+/h: ", told, re.M)
    assert "go         as far as can be seen" in told
    assert "NO" not in told


def test_before_there_is_data(tmp_path, capsys):
    """What it will cost is asked before a corpus is prepared."""
    flags = ("--data", tmp_path / "nothing", "--out", tmp_path / "out", "--model", "gpt2_small", "--dry-run")
    assert train(*flags) == 2
    told = capsys.readouterr().out
    assert re.search(r"^run .* = 2\.7G tokens, assumed: 32,000 ids, 20 tokens a parameter;", told, re.M)
    assert re.search(r"^A100 .* [\d:]+ +\d+\.\d\d  \S+/h: ", told, re.M)
    assert re.findall(r"^no go .*", told, re.M) == re.findall(r"^no go      data: .*", told, re.M) != []
    assert train(*flags, "--tokens", "28B") == 2
    assert re.search(r"^run .* = 28\.0G tokens, assumed: 32,000 ids;", capsys.readouterr().out, re.M)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_was_begun_is_looked_at_from_where_it_is(data, tmp_path, capsys):
    flags = ("--data", data, "--out", tmp_path / "out", "--resume")
    assert train(*flags, *QUICK) == 0
    before = files(tmp_path / "out")
    capsys.readouterr()
    assert train(*flags, "--steps", 6, "--dry-run", "--price-per-hour", 3.6) == 0
    assert "run        4 steps (of 6) of 4 x 64 = 1024 tokens" in (told := capsys.readouterr().out)
    assert "--price-per-hour" in told
    assert train(*flags, "--steps", 6, "--block-size", 32, "--dry-run") == 2
    assert "no go      settings: --block-size 32: the checkpoint was trained with 64" in capsys.readouterr().out
    assert files(tmp_path / "out") == before


def test_every_obstacle_is_named_at_once(data, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    flags = ("--data", tmp_path / "nothing", "--out", tmp_path / "file", "--device", "tpu", "--dry-run")
    assert train(*flags) == 2
    told = capsys.readouterr().out
    for name in ("settings: --out", "device: --device tpu", "data: "):
        assert f"no go      {name}" in told
    monkeypatch.setattr(checks, "ROOT", tmp_path)
    (tmp_path / "requirements.txt").write_text("numpy>=99.0,<100\nno-such-thing>=1\n")
    assert train("--data", data, "--out", tmp_path / "out", *QUICK, "--dry-run") == 2
    told = capsys.readouterr().out
    assert re.search(r"no go      versions: numpy is \S+, expected 99\.0 or later; no-such-thing is missing", told)


def test_a_disk_too_small_and_a_quota(tmp_path, monkeypatch):
    """What is free is asked for, and given back: a limit that the disk's own figures do not show refuses it."""
    assert checks.room(tmp_path, 1 << 20, "two checkpoints").ok
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, before[1]))
    try:
        refused = checks.room(tmp_path, 1 << 20, "two checkpoints")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not refused.ok
    assert "two checkpoints take 1.0MB and were refused (File too large): a quota?" in refused.text
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(10, 9, 1))
    full = checks.room(tmp_path, 1 << 20, "two checkpoints")
    assert not full.ok
    assert "has 1B free" in full.text
    assert list(tmp_path.iterdir()) == []


def test_a_bucket_that_refuses_is_an_obstacle(gcs):
    """Writing is tried with the run's own credentials; a probe that cannot be removed is one too."""
    assert checks.out_of("gs://bucket/run").ok
    assert fs.list_folder("gs://bucket/run") == []
    gcs.fail("upload", 403, times=99)
    refused = checks.out_of("gs://bucket/run")
    assert not refused.ok
    assert "gs://bucket/run" in refused.text


@pytest.fixture
def short(monkeypatch):
    """A rehearsal whose rate need not be trusted."""
    monkeypatch.setattr(rehearsal, "MEASURE_S", 0.05)


def test_a_rehearsal_on_a_bucket_trains_saves_and_restores_and_leaves_nothing(data, tmp_path, capfd, gcs, short):
    cache = tmp_path / "cache"
    flags = ("--data", data, "--out", "gs://bucket/run", "--cache", cache, *SHAPE, "--batch", 4, "--steps", 5000)
    assert train(*flags, "--preflight", "--price-per-hour", 2) == 0
    told = capfd.readouterr().out
    assert re.search(r"^  stored     gs://bucket/run-preflight-\w+/step-00000003-0001", told, re.M)
    assert re.search(
        r"^  out        gs://bucket/run-preflight-\w+: run \w+, attempt 2, goes on from step 3$", told, re.M
    )
    rate = re.search(r"^measured   ([\d.]+)(k?) tok/s, .* a save .*; restored and training again \d", told, re.M)
    rate = float(rate[1]) * (1000 if rate[2] else 1)
    cost = re.search(
        r"^whole run  5000 steps in \d+:\d\d.*; [\d.]+ at 2 an hour .*, ([\d.]+) per million tokens$", told, re.M
    )
    assert float(cost[1]) == pytest.approx(2 / 3600 / rate * 1e6, rel=0.1, abs=1e-4)
    assert told.rstrip().splitlines()[-1].startswith("go ")
    assert not gcs.objects
    assert list((cache / "runs").iterdir()) == []


def test_a_rehearsal_meets_what_a_look_cannot(data, tmp_path, capfd, short):
    """A flipped byte in a shard: its size is right, only reading it tells."""
    shutil.copytree(data, tmp_path / "data")
    for shard in (tmp_path / "data").glob("train-*"):
        raw = bytearray(shard.read_bytes())
        raw[len(raw) // 2] ^= 1
        shard.write_bytes(raw)
    flags = ("--data", tmp_path / "data", "--out", tmp_path / "out", *QUICK)
    assert train(*flags, "--dry-run") == 0
    assert train(*flags, "--preflight") == 2
    assert re.search(r"^no go      rehearsal: .*train-.*damaged.* \(exit code 2\)$", capfd.readouterr().out, re.M)
    assert [p.name for p in tmp_path.iterdir()] == ["data"]


def test_a_rehearsal_that_is_stopped_cleans_up(data, tmp_path):
    flags = ("--data", data, "--out", tmp_path / "out", *SHAPE, "--batch", 4, "--steps", 10**6, "--preflight")
    job = start("train/run.py", *flags, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    for line in job.stdout:
        if "attempt 1, starts" in line:
            break
    assert list(tmp_path.iterdir()) != []
    began_s = time.monotonic()
    job.send_signal(signal.SIGTERM)
    job.stdout.read()
    assert job.wait(20) == 130
    assert time.monotonic() - began_s < 5
    assert list(tmp_path.iterdir()) == []
