"""Real file systems that fill, refuse, forget and go away; where this machine lets us mount none, a Drive's twin."""

import errno
import os
import shutil
import threading
import time
from itertools import count
from pathlib import Path

import pytest

from store import drive, fs, retry
from store.errors import StoreError
from tests.drives import LAG_S, FuseDrive, TwinDrive, run
from tests.helpers import result, save, train
from tests.test_resume import SMALL
from train import checkpoint, mirror
from train import run as program

FLOATS = 20_000  # 240 kB a state


@pytest.fixture(autouse=True)
def _in_a_hurry(monkeypatch):
    monkeypatch.setattr(retry, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(retry, "LONGEST_WAIT_S", 0.002)
    monkeypatch.setattr(retry, "RETRY_FOR_S", 0.03)


def newest(out: Path) -> int:
    """The step that a start would go on from; nothing there may be damaged."""
    return checkpoint.load_newest([str(out)], pytest.fail).manifest.step


# ---- disks ----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["tmpfs", "ext4"])
def small_disk(request, tmp_path):
    """Where a file system with room for five states is mounted."""
    kind, image, mounted = request.param, tmp_path / "image", tmp_path / "mounted"
    mounted.mkdir()
    room = 5 * 3 * 4 * FLOATS + (200 << 10)
    if kind == "tmpfs":
        made = run("mount", "-t", "tmpfs", "-o", f"size={room}", "none", mounted)
    else:
        with image.open("wb") as f:
            f.truncate(room)
        made = run("mkfs.ext4", "-q", "-m", "0", "-O", "^has_journal", image)
        made = made and run("mount", "-o", "loop", image, mounted)
    if not made:
        pytest.skip(f"this machine lets us mount no {kind}")
    yield mounted
    run("umount", "-l", mounted)


@pytest.mark.parametrize("told", [True, False])
def test_a_full_disk_keeps_what_it_had(small_disk, monkeypatch, told):
    """Saves until nothing fits: one line, no leftovers, the last one loads; and it goes on once there is room.

    Where the file system tells its room the save is not begun, else it fails somewhere in it.
    """
    out, saved = small_disk / "out", []
    if not told:
        monkeypatch.setattr(checkpoint, "_check_room", lambda out, n_bytes: None)

    def fill() -> None:
        for step in range(1, 10):
            saved.append(save(out, step, floats=FLOATS).name)

    with pytest.raises(StoreError, match=r"no space left|cannot write .*: No space left") as e:
        fill()
    assert "\n" not in str(e.value)
    assert len(saved) >= 4
    assert sorted(os.listdir(out)) == saved
    assert newest(out) == len(saved)
    checkpoint.retain(str(out), 1)
    save(out, 10, floats=FLOATS)
    assert newest(out) == 10


def test_a_disk_that_has_become_read_only(small_disk):
    """What the kernel does with an ext4 that has errors: saving and deleting are one line each, what is there loads."""
    out = small_disk / "out"
    for step in (1, 2):
        save(out, step)
    if not run("mount", "-o", "remount,ro", small_disk):
        pytest.skip("not allowed")
    with pytest.raises(StoreError, match=r"Read-only file system$"):
        save(out, 3)
    with pytest.raises(StoreError, match=r"Read-only file system$"):
        checkpoint.retain(str(out), 1)
    assert newest(out) == 2


def test_a_power_cut(tmp_path):
    """ext4 on a loop device whose blocks are copied behind its back: what was reported saved is in the copy."""
    image, mounted, copy = tmp_path / "image", tmp_path / "mounted", tmp_path / "copy"
    mounted.mkdir()
    with image.open("wb") as f:
        f.truncate(16 << 20)
    if not run("mkfs.ext4", "-q", image) or not run("mount", "-o", "loop", image, mounted):
        pytest.skip("this machine lets us mount no loop device")
    try:
        for step in (10, 20):
            save(mounted / "new" / "out", step)
            fs.put_bytes(str(mounted / "state"), b"%d" % step)
            shutil.copyfile(image, copy)  # what the disk was given, not what the kernel still holds
            assert run("umount", "-l", mounted)
            assert run("mount", "-o", "loop", copy, mounted)
            assert (mounted / "state").read_bytes() == b"%d" % step
            assert newest(mounted / "new" / "out") == step
            copy.rename(image)
    finally:
        run("umount", "-l", mounted)


# ---- a Drive --------------------------------------------------------------------------------------------------------


@pytest.fixture(params=[FuseDrive, TwinDrive], ids=["fuse", "twin"])
def a_drive(request, tmp_path, monkeypatch):
    """A mounted Drive where this process looks for one."""
    monkeypatch.setattr(fs, "SETTLE_S", 0.01)
    (tmp_path / "world").mkdir()
    made = request.param(tmp_path / "world")
    monkeypatch.setattr(drive, "MOUNT", made.mount)
    yield made
    made.close()


def arrive(path: Path) -> None:
    """Wait until a file is in the cloud."""
    deadline_s = time.monotonic() + 20
    while not drive.uploaded(path):
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def test_a_drive_that_lags_and_drops(a_drive, tmp_path, monkeypatch):
    """What is said to be in the cloud survives the mount; the rest may be lost, and what is left is whole all the same."""
    out, local = a_drive.mount / "MyDrive" / "out", tmp_path / "local"
    checkpoint.upload(local, str(out), first := save(local, 10))
    assert drive.uploaded(out / first.name / "MANIFEST.json") is False
    arrive(out / first.name / "MANIFEST.json")
    assert fs.create(str(out / "lease"), b"mine")
    assert not fs.create(str(out / "lease"), b"yours")

    checkpoint.upload(local, str(out), second := save(local, 20))
    a_drive.drop()
    with pytest.raises(OSError, match="not connected") as e:
        os.listdir(out)
    assert e.value.errno == errno.ENOTCONN == 107
    for _ in ("dropped", "unmounted"):  # then not into the folder under the mount
        with pytest.raises(StoreError, match=r"not connected.*drive\.mount\('/content/drive', force_remount=True\)"):
            fs.put_bytes(str(out / "x"), b"new")
        a_drive.unmount()
    assert os.listdir(a_drive.mount) == []

    monkeypatch.setattr(retry, "RETRY_FOR_S", 20.0)
    waiting = threading.Thread(target=checkpoint.upload, args=(local, str(out), second))
    waiting.start()
    a_drive.begin()
    waiting.join()  # it went on by itself
    assert [m.step for m in checkpoint.committed(str(out))] == [10, 20]
    a_drive.unmount()  # before it is in the cloud
    a_drive.begin()
    assert newest(out) in (10, 20)


def test_training_goes_on_while_the_drive_is_away(data, a_drive, tmp_path, monkeypatch, capfd):
    """It drops in the middle of a run, loses what had not left the machine, comes back: as if nothing had happened."""
    monkeypatch.setattr(mirror, "PAUSE_S", 0.05)
    monkeypatch.setattr(mirror, "LOOK_S", 0.05)
    flags = ("--data", data, "--steps", 24, "--save-every", 4, "--keep", 2, "--resume", *SMALL)
    assert train(*flags, "--out", tmp_path / "quiet") == 0
    steps, train_step = count(1), program.train_step

    def with_a_drive(*args, **kwargs):
        {8: a_drive.drop, 16: a_drive.unmount, 20: a_drive.begin}.get(next(steps), bool)()
        return train_step(*args, **kwargs)

    monkeypatch.setattr(program, "train_step", with_a_drive)
    out = a_drive.mount / "MyDrive" / "out"
    assert train(*flags, "--out", out, "--cache", tmp_path / "cache") == 0
    told = capfd.readouterr().err
    assert "is not stored in" in told
    assert "Transport endpoint is not connected: the mount dropped" in told
    assert result(out) == result(tmp_path / "quiet")
    assert len(checkpoint.committed(str(out))) <= 2

    for path in filter(Path.is_file, out.rglob("*")):
        arrive(path)
    a_drive.unmount()  # and the next machine finds it
    a_drive.begin()
    assert train(*flags, "--out", out, "--cache", tmp_path / "another cache") == 0
    assert result(out) == result(tmp_path / "quiet")
    assert "finished already" in capfd.readouterr().out
    assert (out / "events.jsonl").read_text().count('"event": "finished"') == 2


def test_what_is_deleted_leaves_nothing_in_the_trash(a_drive, tmp_path):
    """Cut to nothing before it is deleted: a file, and the steps that retention removes."""
    out = a_drive.mount / "MyDrive" / "out"
    fs.put_bytes(str(out / "a"), b"bytes")
    fs.delete(str(out / "a"))
    for step in range(1, 6):
        checkpoint.upload(tmp_path / "local", str(out), save(tmp_path / "local", step))
        checkpoint.retain(str(out), 1)
    assert [m.step for m in checkpoint.committed(str(out))] == [5]
    time.sleep(LAG_S)
    assert a_drive.trash_bytes() == 0
