"""A step without a valid manifest does not exist; what is damaged is never loaded; older steps are the fallback."""

import errno
import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from store import drive, fs
from store.errors import DataError, StoreError
from tests.helpers import ROOT, files
from train import checkpoint


def tensors(step: int) -> dict:
    g = torch.Generator().manual_seed(step)
    return {
        "model.safetensors": {"w": torch.randn(40, 30, generator=g), "b": torch.randn(30, generator=g)},
        "optimizer.safetensors": {"w/exp_avg": torch.randn(40, 30, generator=g), "w/step": torch.tensor(float(step))},
        "rng.safetensors": {"cpu": torch.get_rng_state()},
    }


def state(step: int) -> dict:
    return {"step": step, "elapsed_s": 1.5, "val_loss": None, "scaler": {}, "config": {}, "model": {},
            "data": {"fingerprint": "f", "vocab_size": 9}}  # fmt: skip


def save(out: Path, step: int, val_loss: float | None = None, attempt: int = 1) -> checkpoint.Manifest:
    return checkpoint.save(
        out, step=step, run_id="r", attempt=attempt, val_loss=val_loss, tensors=tensors(step), state=state(step)
    )


def load(*places: str | Path) -> tuple[checkpoint.Checkpoint | None, list[str]]:
    warnings: list[str] = []
    return checkpoint.load_newest(map(str, places), warnings.append), warnings


@pytest.mark.parametrize("url", ["local", "memory://run"])
def test_round_trip_is_exact(tmp_path, url):
    out = str(tmp_path) if url == "local" else f"{url}-{tmp_path.name}"
    for step in (3, 12):
        manifest = save(tmp_path, step)
        if url != "local":
            checkpoint.upload(tmp_path, out, manifest)
    found, warnings = load(out)
    assert (found.manifest.step, found.state, warnings) == (12, state(12), [])
    for part, named in tensors(12).items():
        assert all(torch.equal(found.tensors[part][k], v) for k, v in named.items())


def test_nothing_saved_is_nothing_found(tmp_path):
    assert load(tmp_path) == (None, [])


def rewrite(path: Path, **changes: object) -> None:
    """Change fields of a manifest and sign it again: what a newer program, or an attacker, would write."""
    fields = {**json.loads(path.read_text()), **changes}
    del fields["sha256"]
    path.write_text(json.dumps({**fields, "sha256": checkpoint._manifest_hash(fields)}))


def flip_bit(path: Path, other: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 4
    path.write_bytes(raw)


def zero_page(path: Path, other: Path) -> None:
    """A page of the file that never reached the disk; shorter files are one page."""
    raw = bytearray(path.read_bytes())
    at = len(raw) // 2 // 512 * 512
    raw[at : at + 512] = bytes(len(raw[at : at + 512]))
    path.write_bytes(raw)


DAMAGES = {
    "a zeroed page": zero_page,
    "truncated": lambda path, other: path.write_bytes(path.read_bytes()[:-1]),
    "empty": lambda path, other: path.write_bytes(b""),
    "zeroed": lambda path, other: path.write_bytes(bytes(path.stat().st_size)),
    "one bit": flip_bit,
    "other bytes of the same size": lambda path, other: path.write_bytes(b"x" * path.stat().st_size),
    "an older step's": lambda path, other: shutil.copy(other, path),
    "missing": lambda path, other: path.unlink(),
}


@pytest.mark.parametrize("part", checkpoint.PARTS)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_detected_set_aside_and_the_older_step_used(tmp_path, part, damage):
    save(tmp_path, 10)
    save(tmp_path, 20)
    if (part, damage) == ("rng.safetensors", "an older step's"):
        torch.manual_seed(99)
        save(tmp_path, 10)  # else both steps would rightly hold the same state
    DAMAGES[damage](tmp_path / "step-00000020-0001" / part, tmp_path / "step-00000010-0001" / part)
    found, warnings = load(tmp_path)
    assert found.manifest.step == 10
    assert len(warnings) == 1
    assert part in warnings[0]
    assert [p.name[:18] for p in (tmp_path / "quarantine").iterdir()] == ["step-00000020-0001"]
    assert load(tmp_path)[1] == []  # said once, settled


@pytest.mark.parametrize("damage", [d for d in DAMAGES if d != "missing"])
def test_a_damaged_manifest_is_reported_and_set_aside_too(tmp_path, damage):
    save(tmp_path, 10)
    save(tmp_path, 20)
    DAMAGES[damage](
        tmp_path / "step-00000020-0001" / "MANIFEST.json", tmp_path / "step-00000010-0001" / "MANIFEST.json"
    )
    assert [m.step for m in checkpoint.committed(str(tmp_path))] == [10]
    found, warnings = load(tmp_path)
    assert found.manifest.step == 10
    assert len(warnings) == 1
    assert "step-00000020-0001 is damaged (MANIFEST.json is not whole)" in warnings[0]
    DAMAGES[damage](tmp_path / "step-00000010-0001" / "MANIFEST.json", tmp_path / "step-00000010-0001" / "state.json")
    for _ in range(2):  # and it stays refused
        with pytest.raises(DataError, match="every checkpoint is damaged"):
            load(tmp_path)


def test_a_step_without_a_manifest_does_not_exist(tmp_path):
    save(tmp_path, 10)
    save(tmp_path, 20)
    (tmp_path / "step-00000020-0001" / "MANIFEST.json").unlink()
    assert [m.step for m in checkpoint.committed(str(tmp_path))] == [10]
    found, warnings = load(tmp_path)
    assert (found.manifest.step, warnings) == (10, [])  # what a killed save leaves is no damage


def test_no_flipped_bit_of_a_manifest_goes_unnoticed(tmp_path):
    save(tmp_path, 10)
    path = tmp_path / "step-00000010-0001" / "MANIFEST.json"
    good = path.read_bytes()
    fields = json.loads(good)
    for position in range(0, len(good), 3):
        raw = bytearray(good)
        raw[position] ^= 1 << position % 8
        path.write_bytes(raw)
        try:
            same = json.loads(raw) == fields  # white space may change, nothing else
        except ValueError:
            same = False
        if not same:
            assert checkpoint.committed(str(tmp_path)) == [], position


def test_what_is_damaged_here_is_taken_from_there(tmp_path):
    """Both tiers hold the newest step: the damaged copy is set aside, the sound one used."""
    here, there = tmp_path / "here", tmp_path / "there"
    for step in (10, 20):
        checkpoint.upload(here, str(there), save(here, step))
    flip_bit(here / "step-00000020-0001" / "optimizer.safetensors", here)
    found, warnings = load(here, there)
    assert (found.manifest.step, found.place, len(warnings)) == (20, str(there), 1)
    shutil.rmtree(there / "step-00000020-0001")
    found, _ = load(here, there)
    assert (found.manifest.step, found.place) == (10, str(here))


def test_a_later_attempt_is_newer_than_a_higher_step(tmp_path):
    """A trainer that was thought dead wakes up and commits: what its successor wrote stays the run."""
    save(tmp_path, 10, attempt=1)
    save(tmp_path, 20, attempt=2)
    save(tmp_path, 30, attempt=1)
    assert load(tmp_path)[0].manifest.step == 20
    checkpoint.retain(str(tmp_path), 1)
    assert [m.name for m in checkpoint.committed(str(tmp_path))] == ["step-00000020-0002"]


def test_a_listing_that_omits_the_newest_or_shows_the_deleted_misleads_nobody(tmp_path, monkeypatch):
    newest = [save(tmp_path, step) for step in (10, 20)][-1]
    real = fs.list_folder

    def lying(url):
        entries = [e for e in real(url) if e.name != newest.name]
        return [*entries, fs.Entry("step-00000015-0001", None)] if url == str(tmp_path) else entries

    monkeypatch.setattr(fs, "list_folder", lying)
    warnings: list[str] = []
    found = checkpoint.load_newest([str(tmp_path)], warnings.append, also=[newest.name])
    assert (found.manifest.step, warnings) == (20, [])


def test_all_damaged_is_refused_and_never_a_fresh_start(tmp_path):
    for step in (10, 20):
        save(tmp_path, step)
        flip_bit(tmp_path / checkpoint.step_name(step, 1) / "model.safetensors", tmp_path)
    with pytest.raises(DataError, match="every checkpoint is damaged and set aside"):
        load(tmp_path)


def test_a_newer_format_is_refused_with_the_cure(tmp_path):
    save(tmp_path, 10)
    path = tmp_path / "step-00000010-0001" / "MANIFEST.json"
    rewrite(path, version=2)
    with pytest.raises(DataError, match="format 2 is newer than this program's 1: update"):
        load(tmp_path)


WRONG_TYPES = [{"val_loss": v} for v in ("x", True, float("nan"), float("inf"), [1.0], {})]
WRONG_TYPES += [{"version": True}, {"step": True}, {"step": "10"}, {"attempt": 1.0}, {"attempt": True}, {"run_id": 7},
                {"parts": []}, {"parts": dict.fromkeys(checkpoint.PARTS, 7)},
                {"parts": {p: {"bytes": True, "sha256": "0" * 64} for p in checkpoint.PARTS}}]  # fmt: skip


@pytest.mark.parametrize("change", WRONG_TYPES, ids=lambda change: str(change)[:30])
def test_a_manifest_of_wrong_types_is_not_whole(tmp_path, change):
    """A step of 1 and an attempt of 1: True would pass for either, and in the folder's name too."""
    for step, val_loss in ((1, 2.0), (2, 3.0), (3, 4.0)):
        save(tmp_path, step, val_loss)
    rewrite(tmp_path / "step-00000001-0001" / "MANIFEST.json", **change)
    assert [m.step for m in checkpoint.committed(str(tmp_path))] == [2, 3]
    checkpoint.retain(str(tmp_path), 1)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_what_cannot_be_set_aside_is_passed_over(tmp_path, monkeypatch, number):
    save(tmp_path, 10)
    save(tmp_path, 20)
    flip_bit(tmp_path / "step-00000020-0001" / "model.safetensors", tmp_path)

    def refused(*args):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as m:
        m.setattr(os, "rename", refused)
        found, warnings = load(tmp_path)
    assert (found.manifest.step, len(warnings)) == (10, 1)
    assert "model.safetensors" in warnings[0]
    assert os.strerror(number) in warnings[0]


@pytest.mark.parametrize("call", range(len(checkpoint.PARTS) + 1))
def test_a_crash_at_any_write_of_a_save_loses_only_that_step(tmp_path, monkeypatch, call):
    """SIGKILL between any two writes: BaseException stands for it, nothing catches that."""
    save(tmp_path, 10)
    before = files(tmp_path)
    calls = 0

    def crashing(real):
        def wrapped(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls > call:
                raise SystemExit
            return real(*args, **kwargs)

        return wrapped

    with monkeypatch.context() as m:
        for name in ("put_bytes", "staged"):
            m.setattr(fs, name, crashing(getattr(fs, name)))
        with pytest.raises(SystemExit):
            save(tmp_path, 20)
    assert [c.step for c in checkpoint.committed(str(tmp_path))] == [10]
    assert before.items() <= files(tmp_path).items()
    save(tmp_path, 20)  # what the killed save left does not block the same step
    assert load(tmp_path)[0].manifest.step == 20


def test_retention_keeps_newest_and_best_and_ignores_torn_steps(tmp_path):
    for step, val_loss in ((10, 3.0), (20, 1.0), (30, 2.0), (40, 2.5), (50, 2.4)):
        save(tmp_path, step, val_loss)
    for torn in ("step-00000045-0001", "step-00000060-0001"):  # must not count as one of the newest two
        (tmp_path / torn).mkdir()
        (tmp_path / torn / ".model.safetensors.1-ab.tmp").write_bytes(b"half")
    checkpoint.retain(str(tmp_path), 2)
    assert [m.step for m in checkpoint.committed(str(tmp_path))] == [20, 40, 50]
    assert not (tmp_path / "step-00000045-0001").exists()  # what killed saves left must not fill the disk
    save(tmp_path, 60)
    assert {p.name for p in (tmp_path / "step-00000060-0001").iterdir()} == {*checkpoint.PARTS, "MANIFEST.json"}


def test_deleting_takes_the_manifest_first(tmp_path, monkeypatch):
    for step in (10, 20):
        save(tmp_path, step)
    deleted = []
    real = fs.delete

    def stop_after_one(url):
        real(url)
        deleted.append(url.rsplit("/", 1)[-1])
        raise SystemExit

    monkeypatch.setattr(fs, "delete", stop_after_one)
    with pytest.raises(SystemExit):
        checkpoint.retain(str(tmp_path), 1)
    assert deleted == ["MANIFEST.json"]
    assert [m.step for m in checkpoint.committed(str(tmp_path))] == [20]


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 128 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("cannot mount a tmpfs here")
    yield disk
    subprocess.run(["umount", "-l", disk])


def test_a_full_disk_is_a_storage_error_and_older_steps_stay(small_disk):
    save(small_disk, 10)
    before = files(small_disk)
    (small_disk / "filler").write_bytes(b"x" * 20_000)
    with pytest.raises(StoreError, match=r"cannot write|no space left"):
        list(map(partial(save, small_disk), range(20, 200, 10)))
    newest = checkpoint.committed(str(small_disk))[-1].step
    assert before.items() <= files(small_disk).items()
    assert load(small_disk)[0].manifest.step == newest
    (small_disk / "filler").unlink()
    checkpoint.retain(str(small_disk), 1)
    save(small_disk, 300)  # with room again, the next save works
    assert load(small_disk)[0].manifest.step == 300


HOSTILE_STATES = [
    [], "x", 3, None, {}, {"step": "10"}, {"config": "x"}, {"data": None}, {"data": {"fingerprint": 3, "vocab_size": 9}},
    {"model": []}, {"scaler": None}, {"elapsed_s": "x"}, {"step": 11},
]  # fmt: skip


@pytest.mark.parametrize("change", HOSTILE_STATES)
def test_a_state_of_wrong_types_is_refused(tmp_path, change):
    """Hashes prove the writer's bytes, not his good will."""
    hostile = {**state(10), **change} if isinstance(change, dict) and change else change
    checkpoint.save(tmp_path, step=10, run_id="r", attempt=1, val_loss=None, tensors=tensors(10), state=hostile)
    with pytest.raises(DataError, match="every checkpoint is damaged"):
        load(tmp_path)


def test_deleting_on_a_drive_empties_the_file_first(tmp_path, monkeypatch):
    """What is deleted there goes to the Trash and still fills the quota: it must be empty by then."""
    monkeypatch.setattr(drive, "MOUNT", tmp_path)
    trash, part = tmp_path / "trash", tmp_path / "MyDrive" / "part"
    part.parent.mkdir()
    part.write_bytes(b"x" * 1000)
    trash.hardlink_to(part)
    fs.delete(str(part))
    assert not part.exists()
    assert trash.stat().st_size == 0


def test_a_hostile_manifest_cannot_reach_outside(tmp_path):
    save(tmp_path, 10)
    path = tmp_path / "step-00000010-0001" / "MANIFEST.json"
    parts = json.loads(path.read_text())["parts"]
    parts["../../etc/passwd"] = parts.pop("state.json")
    rewrite(path, parts=parts)
    assert checkpoint.committed(str(tmp_path)) == []


def test_what_a_killed_load_fetched_is_removed_by_the_next_but_not_while_it_is_read(tmp_path, monkeypatch):
    out = f"memory://left-{tmp_path.name}"
    monkeypatch.setenv("PERENNIAL_CACHE", str(tmp_path / "cache"))
    for step in (10, 20):
        manifest = save(tmp_path, step)
        checkpoint.upload(tmp_path, out, manifest)
    code = f"""
import signal, os
from store import fs
from train import checkpoint
def fetch(url, path, sha256):
    if "optimizer" in url:
        print("there", flush=True)
        signal.pause()
    os.makedirs(os.path.dirname(path), exist_ok=True)
    open(path, "wb").write(b"x" * 1000)
fs.get_file = fetch
checkpoint.load({out!r}, checkpoint.read_manifest({str(tmp_path)!r}, {manifest.name!r}))
"""
    killed = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert killed.stdout.readline() == "there\n"
        half = list((tmp_path / "cache").rglob("model.safetensors"))
        assert len(half) == 1
        assert load(out)[0].manifest.step == 20  # a chat, while the trainer starts
        assert half[0].exists()
    finally:
        killed.kill()
        killed.communicate()
    assert half[0].exists()
    assert load(out)[0].manifest.step == 20
    assert [p.name for p in (tmp_path / "cache").rglob("*") if p.is_file()] == [".lock"]


def test_loading_a_remote_run_does_not_disturb_a_save_under_way(tmp_path, monkeypatch):
    """Someone chats with the run on the machine that trains it: both have files of it on their way."""
    out = f"memory://busy-{tmp_path.name}"
    checkpoint.upload(tmp_path, out, save(tmp_path, 10))
    real, loads = fs.put_file, []

    def put_file(url, path):
        real(url, path)
        loads.append(load(out)[0].manifest.step)

    monkeypatch.setattr(fs, "put_file", put_file)
    checkpoint.upload(tmp_path, out, save(tmp_path, 20))
    assert loads == [10, 10, 10, 10]
    assert load(out)[0].manifest.step == 20
