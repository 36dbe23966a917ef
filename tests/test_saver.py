"""Saves behind the loop's back: a true copy, one at a time, two tiers, and failures that are loud but stop nothing."""

import contextlib
import dataclasses
import io
import json
import os
import threading
import time
import types

import pytest
import torch

from store import drive, fs, remote
from store.errors import StoreError
from tests.helpers import error_of, result, train
from tests.test_checkpoint import state, tensors
from tests.test_resume import SMALL, train_until_killed
from train import checkpoint, mirror
from train.config import TrainConfig
from train.exits import UNSAVED
from train.folder import RunFolder
from train.precision import choose_machine
from train.saver import Saver, Snapshot


def make_saver(out, **settings):
    folder = RunFolder(str(out))
    folder.hold()
    return Saver(dataclasses.replace(TrainConfig(), **settings), folder, choose_machine("cpu", "fp32", "off"), step=0)


@pytest.fixture
def gate(monkeypatch):
    """Saves wait at the beginning of their thread until it is opened."""
    opened, real = threading.Event(), checkpoint.save

    def save(*args, **kwargs):
        assert opened.wait(20)
        return real(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "save", save)
    yield opened
    opened.set()


def test_what_is_saved_is_the_state_when_the_save_began(tmp_path, gate):
    saver, live = make_saver(tmp_path), tensors(5)
    saver.begin(5, live, state(5))
    for named in live.values():
        for t in named.values():
            t.zero_()  # training goes on
    gate.set()
    saver.finish(20)
    found = checkpoint.load_newest([str(tmp_path)], print)
    for part, named in tensors(5).items():
        assert all(torch.equal(found.tensors[part][k], v) for k, v in named.items())


def test_a_snapshot_takes_one_more_state_of_memory_and_never_more(tmp_path):
    saver = make_saver(tmp_path)
    saver.begin(1, tensors(1), state(1))
    saver.wait()
    homes = {t.data_ptr() for named in saver.snapshot.buffers.values() for t in named.values()}
    saver.begin(2, tensors(2), state(2))
    saver.finish(20)
    assert {t.data_ptr() for named in saver.snapshot.buffers.values() for t in named.values()} == homes


@pytest.mark.parametrize("code", [0, 2])
def test_what_is_page_locked_is_unlocked_before_it_is_freed(monkeypatch, code):
    """With a stand-in for CUDA that grants or refuses; a GPU that refuses is not to be had for a test."""
    locked, kernels = {}, []
    cudart = types.SimpleNamespace(
        cudaHostRegister=lambda at, n_bytes, _: locked.update({at: n_bytes} if code == 0 else {}) or code,
        cudaHostUnregister=locked.pop,
    )

    def full(*args, **kwargs):
        kernels.append(kwargs["device"])
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    monkeypatch.setattr(torch, "full", full)
    snapshot = Snapshot(choose_machine("cpu", "fp32", "off"))
    for size in (10, 20):
        snapshot._allocate({"model.safetensors": {"w": torch.ones(size)}}, on_gpu=True)
        home = snapshot.buffers["model.safetensors"]["w"]
        assert home.shape == (size,)
        assert list(locked) == ([home.data_ptr()] if code == 0 else [])
    del snapshot
    assert locked == {}
    assert len(kernels) == (2 if code else 0)  # the refusal is not left for the next step's kernel to raise


def test_the_last_state_is_saved_as_it_lies(tmp_path):
    saver, live = make_saver(tmp_path), tensors(3)
    saver.begin(3, live, state(3), last=True)
    saver.finish(20)
    assert saver.snapshot.buffers == {}  # no second home: the first one can take longer to get than a save takes
    found = checkpoint.load_newest([str(tmp_path)], print)
    for part, named in live.items():
        assert all(torch.equal(found.tensors[part][k], v) for k, v in named.items())


def test_a_save_that_is_due_while_one_is_in_flight_waits_and_is_counted(tmp_path, gate):
    saver = make_saver(tmp_path, save_every=2, save_every_minutes=0.0)
    assert [saver.due(step) for step in (1, 2)] == [False, True]
    saver.begin(2, tensors(2), state(2))
    assert [saver.due(step) for step in (3, 4, 5)] == [False, False, False]
    gate.set()
    saver.wait()
    assert saver.due(5)  # as soon as it can
    saver.begin(5, tensors(5), state(5))
    saver.finish(20)
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [(e["event"], e["step"]) for e in events] == [
        ("save_begun", 2), ("save_late", 4), ("saved", 2), ("save_begun", 5), ("saved", 5)
    ]  # fmt: skip


def test_auto_saves_as_often_as_pays(tmp_path):
    saver = make_saver(tmp_path, save_every="auto", preemption_minutes=60.0, save_every_minutes=0.0)
    saver.stall_s, saver.write_s = 0.5, 4.0
    assert saver.interval_s() == 60.0  # sqrt(2 * 0.5 s * 3600 s)
    saver.write_s = 300.0
    assert saver.interval_s() == 300.0  # as often as storage keeps up
    saver.stall_s = saver.write_s = 0.0
    assert saver.interval_s() == 1.0
    assert not saver.due(1)
    saver.begun_s -= 2
    assert saver.due(2)


def away(monkeypatch, url):
    """The bucket refuses every checkpoint from now on."""
    real = fs.put_file

    def put_file(target, source):
        if target.startswith(f"{url}/step-"):
            raise StoreError("the bucket answers 503")
        real(target, source)

    monkeypatch.setattr(fs, "put_file", put_file)
    monkeypatch.setattr(mirror, "PAUSE_S", 0.05)


@contextlib.contextmanager
def gave_up(monkeypatch, url):
    """The bucket is away until a trainer has given up, whose uploading thread would live on in this process alone."""
    with monkeypatch.context() as m:
        away(m, url)
        yield
        m.setattr(mirror, "PAUSE_S", 1e6)
        time.sleep(1)  # until it has tried once more, and waits


def test_an_outage_of_the_bucket_stops_nothing_and_a_killed_process_loses_nothing(data, tmp_path, monkeypatch, capsys):
    flags = ("--data", data, "--steps", 20, "--save-every", 4, *SMALL, "--resume", "--cache", tmp_path / "machine")
    assert train(*flags, "--out", tmp_path / "quiet") == 0
    url = f"memory://outage/{tmp_path.name}"
    train_until_killed(monkeypatch, 6, *flags, "--out", url)
    with gave_up(monkeypatch, url):
        assert train(*flags, "--out", url) == UNSAVED  # 20 steps done, and said that they are not there
    assert [c.step for c in checkpoint.committed(url)] == [4]
    assert "training goes on: the bucket answers 503" in capsys.readouterr().err
    assert train(*flags, "--out", url) == 0  # finished already: what only this machine had is brought there
    assert "finished already" in capsys.readouterr().out
    newest, quiet = checkpoint.committed(url)[-1], result(tmp_path / "quiet")
    assert {p: newest.parts[p]["sha256"] for p in checkpoint.TENSOR_PARTS}.items() <= quiet.items()
    assert [json.loads(line) for line in fs.read_bytes(f"{url}/metrics.jsonl").splitlines()] == quiet["metrics"]


def failing_upload(tmp_path, monkeypatch):
    """A Mirror that was offered a checkpoint which the bucket refuses."""
    folder = RunFolder(f"memory://refused/{tmp_path.name}", tmp_path)
    away(monkeypatch, folder.url)
    folder.hold()
    sending = mirror.Mirror(folder, keep=1)
    sending.offer(checkpoint.save(
        folder.local, step=5, run_id="r", attempt=1, val_loss=None, tensors=tensors(5), state=state(5)
    ))  # fmt: skip
    return sending


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_warning_that_cannot_be_written_does_not_end_the_uploads(tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr("sys.stderr", io.TextIOWrapper(io.FileIO("/dev/full", "wb"), write_through=True))
        sending = failing_upload(tmp_path, m)
        assert not sending.finish(20)
    assert isinstance(sending.error, StoreError)
    assert sending.finish(20)  # the bucket takes it now


def test_a_fault_while_a_failed_upload_is_told_of_is_not_swallowed(tmp_path, monkeypatch):
    def broken(*args):
        raise ZeroDivisionError

    monkeypatch.setattr(RunFolder, "warn", broken)
    sending = failing_upload(tmp_path, monkeypatch)
    assert not sending.finish(20)
    assert isinstance(sending.error, ZeroDivisionError)  # for the loop to raise


def test_a_machine_that_was_overtaken_forgets_its_own_tier(data, tmp_path, monkeypatch):
    """It had gone further, unseen; another machine has gone on from the bucket since: that is the run now."""
    flags = ("--data", data, "--save-every", 4, *SMALL, "--resume", "--schedule", "constant")
    url = f"memory://overtaken/{tmp_path.name}"
    assert train(*flags, "--steps", 4, "--out", url, "--cache", tmp_path / "first") == 0
    with gave_up(monkeypatch, url):
        assert train(*flags, "--steps", 16, "--out", url, "--cache", tmp_path / "first") == UNSAVED
    assert train(*flags, "--steps", 8, "--out", url, "--cache", tmp_path / "second") == 0
    assert train(*flags, "--steps", 12, "--out", url, "--cache", tmp_path / "first") == 0
    events = [json.loads(line) for line in fs.read_bytes(f"{url}/events.jsonl").splitlines()]
    assert [(e["attempt"], e["step"]) for e in events if e["event"] == "start"][-1][1] == 8


def test_another_run_under_the_same_url_finds_nothing_of_the_old_one(data, tmp_path):
    flags = ("--data", data, "--save-every", 4, *SMALL, "--resume", "--cache", tmp_path / "machine")
    url = f"memory://again/{tmp_path.name}"
    assert train(*flags, "--steps", 8, "--out", url) == 0
    remote.filesystem(url)[0].rm(url, recursive=True)
    assert train(*flags, "--steps", 4, "--out", url) == 0
    assert [c.step for c in checkpoint.committed(url)] == [4]
    events = [json.loads(line) for line in fs.read_bytes(f"{url}/events.jsonl").splitlines()]
    assert [e["step"] for e in events if e["event"] == "start"] == [0]


def test_saving_that_fails_for_too_long_stops_the_run(data, tmp_path, monkeypatch, capsys):
    def failing(*args, **kwargs):
        raise StoreError("the disk is away")

    monkeypatch.setattr(checkpoint, "save", failing)
    flags = ("--data", data, "--steps", 10**6, "--save-every", 1, *SMALL, "--max-unsaved-minutes", 0.01)
    start_s = time.monotonic()
    assert train(*flags, "--out", tmp_path / "out") == UNSAVED
    assert time.monotonic() - start_s < 30
    assert "no checkpoint could be stored for 0.01 minutes (the disk is away)" in capsys.readouterr().err


def test_a_fault_of_the_saving_thread_is_not_swallowed(data, tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise ZeroDivisionError

    monkeypatch.setattr(checkpoint, "save", broken)
    with pytest.raises(ZeroDivisionError):
        train("--data", data, "--steps", 10**6, "--save-every", 1, *SMALL, "--out", tmp_path / "out")


def test_two_trainers_on_two_machines_the_second_is_refused_and_the_overtaken_one_cannot_commit(
    data, tmp_path, monkeypatch, capsys
):
    """Two caches are two machines. The second waits for a sign of life and gets one; then the first falls silent."""
    from store import lease

    monkeypatch.setattr(lease, "TTL_S", 1.0)
    flags = ("--data", data, *SMALL, "--resume", "--save-every", 5)
    url = str(tmp_path / "out")
    first = RunFolder(url)
    first.local = tmp_path / "first"
    first.hold()
    (tmp_path / "out" / "config.json").write_text(
        '{"format": "perennial-run", "version": 1, "run_id": "r", "config": {}}'
    )
    assert "another trainer is writing there" in error_of(train, *flags, "--steps", 10, "--out", url)
    first.lease._end.set()  # its machine hangs: no beat any more
    assert train(*flags, "--steps", 10, "--out", url) == 0
    assert "waiting for a sign of life" in capsys.readouterr().err
    with pytest.raises(lease.Fenced, match="has taken this run over"):
        first.fence()


def test_a_fenced_trainer_leaves_with_its_own_exit_code(data, tmp_path, monkeypatch, capsys):
    from train.exits import FENCED

    flags = ("--data", data, *SMALL, "--resume", "--save-every", 5, "--steps", 10**6, "--out", tmp_path / "out")
    real, saves = checkpoint.save, []

    def save(out, **rest):
        saves.append(rest["step"])
        if len(saves) == 3:
            fs.put_bytes(str(tmp_path / "out" / "leases" / "00000002.json"), b'{"host": "other", "holder": "x"}')
        return real(out, **rest)

    monkeypatch.setattr(checkpoint, "save", save)
    assert train(*flags) == FENCED
    assert [m.step for m in checkpoint.committed(str(tmp_path / "out"))] == saves[:2]
    assert "has taken this run over" in capsys.readouterr().err


def test_on_a_drive_stored_and_proved_in_the_cloud_are_two_things(tmp_path, monkeypatch, capsys):
    """Drive gives a file an id that begins with "local" until it has uploaded it."""
    mount = tmp_path / "drive"
    (mount / "MyDrive").mkdir(parents=True)
    monkeypatch.setattr(drive, "MOUNT", mount)
    monkeypatch.setattr(mirror, "LOOK_S", 0.02)
    monkeypatch.setenv("PERENNIAL_CACHE", str(tmp_path / "cache"))
    real = checkpoint.upload

    def give_ids(step_folder, prefix):
        for path in step_folder.iterdir():
            os.setxattr(path, "user.drive.id", prefix + path.name.encode())

    def upload(source, out, manifest, **rest):
        real(source, out, manifest, **rest)
        give_ids(mount / "MyDrive" / "out" / manifest.name, b"local-")

    monkeypatch.setattr(checkpoint, "upload", upload)
    saver = make_saver(mount / "MyDrive" / "out")
    saver.begin(5, tensors(5), state(5))
    saver.finish(20)
    assert "is on the Drive's way to the cloud, not there yet" in capsys.readouterr().err

    def proved():
        return "proved_remote" in (saver.folder.local / "events.jsonl").read_text()

    time.sleep(0.2)
    assert not proved()
    give_ids(mount / "MyDrive" / "out" / "step-00000005-0000", b"1x")
    begin_s = time.monotonic()
    while not proved():
        assert time.monotonic() - begin_s < 10
        time.sleep(0.02)
    saver.folder.lease.release()
