"""What was reported as saved is found again: with manifests or config.json lost, machines that came between, clocks off."""

import errno
import json
import os
import shutil
import signal
import subprocess
import time

import pytest

from store import fs, lease, lock, remote, retry
from store.errors import DataError, StoreError
from tests.faulty_disk import FaultyDisk
from tests.helpers import error_of, save, saves_in_time, start, train
from tests.test_resume import SMALL, train_until_killed
from tests.test_saver import gave_up
from train import checkpoint, run, saver
from train.exits import FENCED, STOPPED
from train.folder import RunFolder, parse_lines
from train.mirror import Mirror

FLAGS = ("--save-every", 4, *SMALL, "--resume", "--schedule", "constant")


def starts(out: str) -> list[tuple[int, int]]:
    """(attempt, step) of every start."""
    lines = parse_lines(fs.read_bytes(fs.join(out, "events.jsonl")))
    return [(e["attempt"], e["step"]) for e in lines if e["event"] == "start"]


@pytest.fixture
def saves(monkeypatch):
    """The steps whose save was tried; the first try fails."""
    real, tried = checkpoint.save, []

    def save(out, **rest):
        tried.append(rest["step"])
        if len(tried) == 1:
            raise StoreError("Stale file handle")
        return real(out, **rest)

    monkeypatch.setattr(checkpoint, "save", save)
    return tried


def test_a_lost_manifest_is_damage_and_never_a_fresh_start(data, tmp_path, capsys):
    out = tmp_path / "out"
    for steps in (4, 8, 12):  # each ends with a save, however busy the machine
        assert train("--data", data, *FLAGS, "--steps", steps, "--keep", 5, "--out", out) == 0
    (out / "step-00000012-0003" / "MANIFEST.json").unlink()
    assert train("--data", data, *FLAGS, "--steps", 12, "--keep", 5, "--out", out) == 0
    assert "step-00000012-0003 is damaged (MANIFEST.json is missing)" in capsys.readouterr().err
    assert starts(str(out))[-1] == (4, 8)
    for manifest in out.glob("step-*/MANIFEST.json"):
        manifest.unlink()
    for _ in range(2):
        assert "every checkpoint is damaged" in error_of(train, "--data", data, *FLAGS, "--steps", 14, "--out", out)
    assert {p.name[:13] for p in (out / "quarantine").iterdir()} == {"step-00000004", "step-00000008", "step-00000012"}


def test_steps_that_are_gone_are_missed(data, tmp_path):
    out = tmp_path / "out"
    assert train("--data", data, *FLAGS, "--steps", 8, "--out", out) == 0
    for step in out.glob("step-*"):
        shutil.rmtree(step)
    message = error_of(train, "--data", data, *FLAGS, "--steps", 8, "--out", out)
    assert "no checkpoint is left, though step-00000008-0001 was reported as saved" in message


def test_an_upload_that_was_killed_is_no_damage(data, tmp_path, capsys):
    """The step was promised on this machine alone; with the machine its promise is gone."""
    url = f"memory://half/{tmp_path.name}"
    assert train("--data", data, *FLAGS, "--steps", 4, "--out", url, "--cache", tmp_path / "first") == 0
    fs.delete(f"{url}/step-00000004-0001/MANIFEST.json")
    lines = [e for e in parse_lines(fs.read_bytes(f"{url}/events.jsonl")) if e.get("tier") != "remote"]
    fs.put_bytes(f"{url}/events.jsonl", b"".join(json.dumps(e).encode() + b"\n" for e in lines))
    for name in fs.list_folder(f"{url}/leases"):
        fs.delete(f"{url}/leases/{name.name}")
    assert train("--data", data, *FLAGS, "--steps", 4, "--out", url, "--cache", tmp_path / "second") == 0
    assert starts(url)[-1][1] == 0
    assert "damaged" not in capsys.readouterr().err


def test_a_machine_that_came_between_and_saved_nothing_costs_nothing(data, tmp_path, monkeypatch):
    url = f"memory://between/{tmp_path.name}"
    flags = ("--data", data, *FLAGS, "--out", url)
    assert train(*flags, "--steps", 4, "--cache", tmp_path / "first") == 0
    with gave_up(monkeypatch, url):
        train(*flags, "--steps", 16, "--cache", tmp_path / "first")  # step 16 is on this machine alone
    train_until_killed(monkeypatch, 2, *flags, "--steps", 20, "--cache", tmp_path / "second")
    assert train(*flags, "--steps", 20, "--cache", tmp_path / "first") == 0
    assert starts(url) == [(1, 0), (2, 4), (3, 4), (4, 16)]  # the third start is the second machine's
    metrics = [m["step"] for m in parse_lines(fs.read_bytes(f"{url}/metrics.jsonl")) if "lr" in m]
    assert metrics == sorted(set(metrics))


def test_without_config_json_this_machines_steps_count_still(data, tmp_path, monkeypatch):
    url = f"memory://nameless/{tmp_path.name}"
    flags = ("--data", data, *FLAGS, "--out", url, "--cache", tmp_path / "machine")
    assert train(*flags, "--steps", 4) == 0
    with gave_up(monkeypatch, url):
        train(*flags, "--steps", 16)
    fs.delete(f"{url}/config.json")
    assert train(*flags, "--steps", 20) == 0
    assert starts(url)[-1][1] == 16


def test_what_another_run_left_on_this_machine_is_set_aside(data, tmp_path, capsys):
    url = f"memory://aside/{tmp_path.name}"
    flags = ("--data", data, *FLAGS, "--out", url, "--cache", tmp_path / "machine")
    assert train(*flags, "--steps", 8) == 0
    remote.filesystem(url)[0].rm(url, recursive=True)
    assert train(*flags, "--steps", 4) == 0
    aside = next((tmp_path / "machine" / "runs").glob("*.aside"))
    assert checkpoint.committed(str(aside))[-1].step == 8
    assert str(aside) in capsys.readouterr().err
    assert [c.step for c in checkpoint.committed(url)] == [4]


def test_steps_alone_copied_elsewhere_go_on_and_new_ones_are_the_newer(data, tmp_path):
    flags = ("--data", data, *FLAGS, "--keep", 2)
    for steps in (4, 8, 12):
        assert train(*flags, "--steps", steps, "--out", tmp_path / "out") == 0
    for step in (tmp_path / "out").glob("step-*"):
        shutil.copytree(step, tmp_path / "new" / step.name)
    for steps in (16, 20):
        assert train(*flags, "--steps", steps, "--out", tmp_path / "new") == 0
    assert starts(str(tmp_path / "new")) == [(4, 12), (5, 16)]


def test_who_was_slower_to_begin_does_not_overwrite_the_run(data, tmp_path, monkeypatch):
    """While one stages its data, another has begun, trained and ended."""
    flags = ("--data", data, *FLAGS, "--out", tmp_path / "out")
    real = run.open_data

    def slow(*args, **options):
        other = start("train/run.py", *flags, "--steps", 12, stdout=subprocess.DEVNULL)
        assert other.wait(60) == 0
        return real(*args, **options)

    with monkeypatch.context() as m:
        m.setattr(run, "open_data", slow)
        message = error_of(train, *flags, "--steps", 20)
    assert "another trainer has begun a run there meanwhile: run the same command again" in message
    assert train(*flags, "--steps", 20) == 0
    assert [step for _, step in starts(str(tmp_path / "out"))] == [0, 12]


def test_losses_are_on_the_disk_before_their_checkpoint(data, tmp_path):
    """A power cut keeps what was synced: wherever the step exists, so do its lines."""
    (tmp_path / "disk").mkdir()
    with FaultyDisk(tmp_path / "disk") as disk:
        assert train("--data", data, *FLAGS, "--log-every", 1, "--steps", 4, "--out", tmp_path / "disk" / "out") == 0
    seen = 0
    for files in disk._cut(disk.log):
        if any(name.endswith("step-00000004-0001/MANIFEST.json") for name in files):
            lines = [m for m in parse_lines(files.get("out/metrics.jsonl", b"")) if "lr" in m]
            assert [m["step"] for m in lines] == [1, 2, 3, 4]
            seen += 1
    assert seen


def test_a_step_whose_losses_cannot_be_kept_is_not_saved(tmp_path, monkeypatch):
    folder = RunFolder(str(tmp_path / "out"))
    folder.hold()
    folder.open({}, "{}", step=0)
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
    with pytest.raises(StoreError, match=r"metrics\.jsonl: cannot be written to the disk: Input/output error"):
        folder.settle()
    folder.release()


def test_a_writer_whose_clock_is_an_hour_behind_is_alive(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "TTL_S", 4.0)
    now = time.time
    with monkeypatch.context() as m:
        m.setattr(lease.time, "time", lambda: now() - 3600)
        held = lease.Lease.claim(str(tmp_path), "boot:1:1", {}, lambda s, _: time.sleep(s))
        held._beat(1.0)
    stop = time.monotonic() + 10
    real = lease.Lease._beat

    def late(self, seconds):  # its beats go on, with its clock
        with monkeypatch.context() as m:
            m.setattr(lease.time, "time", lambda: now() - 3600)
            real(self, seconds)

    monkeypatch.setattr(lease.Lease, "_beat", late)
    with pytest.raises(StoreError, match="another trainer is writing there"):
        lease.Lease.claim(str(tmp_path), "boot:2:2", {}, lambda s, _: time.sleep(s))
    assert time.monotonic() < stop
    held.check()
    held.release()


def test_a_zombie_does_not_touch_its_successors_log(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "TTL_S", 0.4)
    url = f"memory://zombie/{tmp_path.name}"
    zombie = RunFolder(url, tmp_path / "first")
    zombie.hold()
    zombie.open({}, "{}", step=0)
    zombie.metrics([{"step": 1, "loss": 1.0}])
    manifest = save(zombie.local, 1)
    zombie.lease._end.set()  # its machine is paused
    lock.let_go()
    successor = RunFolder(url, tmp_path / "second")
    assert successor.is_a_run(resume=True)
    successor.hold()
    successor.open({}, "{}", step=0)
    successor.metrics([{"step": i, "loss": 1.0} for i in range(1, 9)])
    successor.publish()
    before = fs.read_bytes(f"{url}/metrics.jsonl"), fs.read_bytes(f"{url}/events.jsonl")
    awake = Mirror(zombie, keep=2)
    awake.offer(manifest)
    assert not awake.finish(10)
    assert isinstance(awake.error, lease.Fenced)
    assert (fs.read_bytes(f"{url}/metrics.jsonl"), fs.read_bytes(f"{url}/events.jsonl")) == before
    successor.release()


def test_who_is_overtaken_stops_within_a_beat_and_not_at_its_next_save(data, tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "TTL_S", 0.4)
    real, done = run.train_step, []

    def step(*args, **options):
        done.append(1)
        if len(done) == 10:
            fs.put_bytes(str(tmp_path / "out/leases/00000002.json"), b'{"host": "other", "holder": "x"}')
        time.sleep(0.02)
        return real(*args, **options)

    monkeypatch.setattr(run, "train_step", step)
    flags = ("--data", data, *SMALL, "--save-every", 0, "--save-every-minutes", 0, "--eval-every", 0, "--steps", 2000)
    assert train(*flags, "--out", tmp_path / "out") == FENCED
    assert len(done) < 500


def test_a_fault_that_passes_costs_no_save(tmp_path, monkeypatch):
    monkeypatch.setattr(retry, "FIRST_WAIT_S", 0.001)
    (tmp_path / "disk").mkdir()
    for operation in ("write", "create", "fsync", "rename"):
        with FaultyDisk(tmp_path / "disk") as disk:
            disk.fail(operation, errno.ESTALE, first=2)
            manifest = save(tmp_path / "disk" / operation, 10)
        assert checkpoint.load_newest([str(tmp_path / "disk" / operation)], print).manifest == manifest


def test_a_save_that_failed_is_soon_tried_again(data, tmp_path, monkeypatch, saves):
    monkeypatch.setattr(saver, "AGAIN_S", 0.0)
    saves_in_time(monkeypatch)
    assert train("--data", data, *SMALL, "--save-every", 20, "--steps", 60, "--out", tmp_path / "out") == 0
    assert saves == [20, 21, 40, 60]


def test_the_last_save_is_tried_again_while_the_grace_lasts(data, tmp_path, monkeypatch, saves):
    real, done = run.train_step, []

    def step(*args, **options):
        done.append(1)
        if len(done) == 30:
            signal.raise_signal(signal.SIGTERM)
        return real(*args, **options)

    monkeypatch.setattr(run, "train_step", step)
    flags = ("--data", data, *SMALL, "--steps", 60, "--save-every", 0, "--grace-seconds", 30, "--out", tmp_path / "out")
    assert train(*flags) == STOPPED
    assert len(saves) == 2
    assert checkpoint.committed(str(tmp_path / "out"))[-1].step == saves[0]


def test_newest_without_a_record_of_promises(tmp_path):
    """The function alone: what is promised without a manifest is damaged, what is not was never there."""
    save(tmp_path, 10)
    (tmp_path / "step-00000010-0001" / "MANIFEST.json").unlink()
    assert checkpoint.load_newest([str(tmp_path)], print) is None
    with pytest.raises(DataError, match="every checkpoint is damaged"):
        checkpoint.load_newest([str(tmp_path)], print, promised={str(tmp_path): {"step-00000010-0001"}})
