"""Disks that fill, fail, forget and go away: a final name holds the whole old or the whole new bytes, ever after."""

import errno
import os
import shutil
from pathlib import Path

import pytest

from store import drive, fs, retry
from store.errors import StoreError
from tests.faulty_disk import OPERATIONS, FaultyDisk
from tests.helpers import save
from train import checkpoint

OLD, NEW = b"old bytes " * 30, b"new and longer bytes " * 50


@pytest.fixture(autouse=True)
def _in_a_hurry(monkeypatch):
    monkeypatch.setattr(retry, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(retry, "LONGEST_WAIT_S", 0.002)
    monkeypatch.setattr(retry, "RETRY_FOR_S", 0.03)


@pytest.fixture
def disk(tmp_path):
    """A disk with the old bytes under `a`, and the new ones in a file beside it."""
    (tmp_path / "disk" / "out").mkdir(parents=True)
    (tmp_path / "disk" / "out" / "a").write_bytes(OLD)
    (tmp_path / "new").write_bytes(NEW)
    with FaultyDisk(tmp_path / "disk") as disk:
        disk.out = tmp_path / "disk" / "out"
        yield disk


def finished(path: Path) -> Path:
    """What a program wrote that is not told of any fault."""
    with path.open("wb") as f:
        f.write(NEW)
    return path


WAYS = {
    "bytes": lambda out: fs.put_bytes(str(out / "a"), NEW),
    "file": lambda out: fs.put_file(str(out / "a"), out.parent.parent / "new"),
    "bytes in a new folder": lambda out: fs.put_bytes(str(out / "sub" / "deep" / "b"), NEW),
    "move": lambda out: fs.move_file(str(out / "a"), finished(out / ".n")),
    "create": lambda out: fs.create(str(out / "b"), NEW),
    "delete": lambda out: fs.delete(str(out / "a")),
}


def final(files: dict[str, bytes]) -> dict[str, bytes]:
    """What has a final name: leftovers of killed writers are hidden, and end in .tmp."""
    return {n: b for n, b in files.items() if not Path(n).name.startswith(".")}


def error_of(way, out: Path) -> str:
    """The line it ends with, or none."""
    try:
        way(out)
    except StoreError as e:
        return str(e)
    except OSError as e:
        if way is not WAYS["move"]:  # whose source is written by others
            raise
        return str(e)
    return ""


def on(disk) -> dict[str, bytes]:
    return final({str(p.relative_to(disk.root)): p.read_bytes() for p in Path(disk.root).rglob("*") if p.is_file()})


@pytest.mark.parametrize(
    "number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.EROFS], ids=errno.errorcode.get
)
@pytest.mark.parametrize("way", WAYS)
def test_a_fault_at_any_call(disk, way, number):
    """Whatever call fails, once or for good: the new bytes or one line and the old ones; nothing but these is left."""
    WAYS[way](disk.out)
    done, calls = on(disk), disk.counts.copy()
    for operation in OPERATIONS:
        for first in range(1, calls[operation] + 1):
            for times in (1, 10_000):
                shutil.rmtree(disk.out)
                disk.out.mkdir()
                (disk.out / "a").write_bytes(OLD)
                before = on(disk)
                disk.fail(operation, number, first=first, times=times)
                told = error_of(WAYS[way], disk.out)
                assert on(disk) == done or (told and on(disk) == before), (operation, first)
                assert "\n" not in told
                disk.mend()
                assert not error_of(WAYS[way], disk.out)
                assert on(disk) == done


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_save_into_a_disk_that_is_full_at_any_byte(disk, number):
    """No part of it stays, the step before does, and when there is room again it is saved."""
    before = save(disk.out, 10)
    kept = on(disk)
    for room in (0, 1, 63, 64, 65, *range(100, before.n_bytes, before.n_bytes // 12), before.n_bytes):
        disk.fill(room, number)
        with pytest.raises(StoreError, match="no space left"):
            save(disk.out, 20)
        disk.mend()
        assert on(disk) == kept, room
        assert checkpoint.load_newest([str(disk.out)], print).manifest == before
    assert save(disk.out, 30).step == 30


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("way", ["bytes", "file", "create"])
def test_full_at_any_byte(disk, way, number):
    """The disk or the quota is full after k bytes: one line that says so, the old bytes, no leftovers; then it works."""
    for room in (0, 1, len(NEW) // 2, len(NEW) - 1):
        disk.fill(room, number)
        with pytest.raises(StoreError, match="no space left"):
            WAYS[way](disk.out)
        assert on(disk) == {"out/a": OLD}
        assert len(os.listdir(disk.out)) == 1
        disk.mend()
    WAYS[way](disk.out)
    assert NEW in on(disk).values()


def test_a_fault_that_passes_is_tried_again(disk):
    """fsync that failed once says nothing about the bytes any more (the kernel drops them): they are written anew."""
    disk.fail("fsync", errno.EIO)
    fs.put_bytes(str(disk.out / "a"), NEW)
    assert (on(disk), disk.counts["create"]) == ({"out/a": NEW}, 2)


@pytest.mark.parametrize("way", WAYS)
def test_after_a_power_cut_names_hold_old_or_new(disk, way):
    """At any moment, whatever of the unsynced is lost: whole old or whole new bytes; what was reported done is there."""
    WAYS[way](disk.out)
    done, n = on(disk), 0
    for moment, files in disk.after_power_cuts():
        n += 1
        for name, data in final(files).items():
            assert data in ({"out/a": OLD}.get(name), done.get(name)), (moment, name, len(data))
        if moment == len(disk.log):
            assert final(files) == done or way == "delete"  # a name that comes back does no harm
    assert n > 5


def test_a_log_is_extended_by_what_is_new(disk):
    """It is not replaced; what a power cut leaves begins with the old lines; another file under the name gives way."""
    fs.put_log(str(disk.out / "a"), OLD + b"more")
    assert disk.counts["rename"] == 0
    assert all(
        final(f)["out/a"] in [(OLD + b"more")[: len(OLD) + k] for k in range(5)] for _, f in disk.after_power_cuts()
    )
    for data in (b"shorter", b"another beginning" * 30, b"", b"x"):
        fs.put_log(str(disk.out / "a"), data)
        assert on(disk) == {"out/a": data}
    fs.put_log(str(disk.out / "new"), b"first")
    assert on(disk)["out/new"] == b"first"


def test_the_first_name_goes_first_through_a_power_cut(disk):
    for name in ("part", "MANIFEST.json"):
        fs.put_bytes(str(disk.out / "step" / name), NEW)
    fs.delete_folder(str(disk.out / "step"), first="MANIFEST.json")
    for _, files in disk.after_power_cuts():
        assert "out/step/part" in files or "out/step/MANIFEST.json" not in files


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def test_a_power_cut_at_any_moment_of_saving_and_retaining(tmp_path):
    """What was reported saved loads, or something newer does, in every state that the cut can leave."""
    (tmp_path / "disk").mkdir()
    out, promised = tmp_path / "disk" / "out", []
    with FaultyDisk(tmp_path / "disk") as disk:
        for step in (10, 20, 30):
            save(out, step)
            promised.append((len(disk.log), step))
            checkpoint.retain(str(out), 1)
    seen = set()
    for moment, files in disk.after_power_cuts():
        least = max((s for at, s in promised if at <= moment), default=0)
        key = (least, tuple(sorted((n, hash(b)) for n, b in files.items())))
        if key in seen:
            continue
        seen.add(key)
        shutil.rmtree(tmp_path / "left", ignore_errors=True)
        for name, data in files.items():
            (tmp_path / "left" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "left" / name).write_bytes(data)
        found = checkpoint.load_newest([str(tmp_path / "left" / "out")], lambda line: None)
        step = found.manifest.step if found else 0
        assert step >= least, (moment, step, least, sorted(files))
        assert not found or found.tensors["model.safetensors"]["w"][0] == step
    assert len(seen) > 50


@pytest.mark.parametrize("saves", [200])
def test_a_drive_is_not_filled_by_what_was_deleted(tmp_path, monkeypatch, saves):
    """200 saves, two kept, logs that grow: with the Trash never more than three states and the log are in use."""
    monkeypatch.setattr(drive, "MOUNT", tmp_path / "drive")
    monkeypatch.setattr(drive, "require_room", lambda n_bytes: None)
    out, local, log = tmp_path / "drive" / "MyDrive" / "out", tmp_path / "local", b""
    out.mkdir(parents=True)
    with FaultyDisk(tmp_path / "drive") as disk:
        for step in range(1, saves + 1):
            manifest = save(local, step)
            checkpoint.upload(local, str(out), manifest)
            log += b"a line of the log, as long as one usually is\n" * 3
            fs.put_log(str(out / "metrics.jsonl"), log)
            used = disk.trash + sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
            state = sum(p.stat().st_size for p in (out / manifest.name).iterdir())
            assert used <= 3 * state + len(log), step
            checkpoint.retain(str(out), 2)
            checkpoint.retain(str(local), 1)
    assert len(checkpoint.committed(str(out))) == 2
