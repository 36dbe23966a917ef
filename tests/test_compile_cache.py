"""What was compiled is found again, on this machine and on another; damaged, foreign or hostile copies are left alone."""

import io
import json
import os
import random
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
import zstandard

from gpt.presets import preset
from tests.faulty_disk import FaultyDisk
from tests.helpers import files, train
from tests.test_resume import SMALL
from train import compile_cache
from train.compile_cache import CompileCache, cache_key, pack, unpack
from train.config import TrainConfig
from train.folder import RunFolder
from train.precision import Machine

CPU = Machine(torch.device("cpu"), torch.float32, True)
SHAPE = preset("tiny", vocab_size=300, block_size=32, n_embd=32, n_head=2)


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    """The caches lead torch by its environment variable: here it is put back."""
    monkeypatch.setenv(compile_cache.FOLDER, "")
    monkeypatch.setattr(compile_cache, "THEIRS", None)
    monkeypatch.delenv(compile_cache.SECRET, raising=False)


def config(machine: Path, **changes) -> TrainConfig:
    return TrainConfig(cache=str(machine), batch=8, micro_batch=4, **changes)


def run_folder(url: Path, run_id: str = "run") -> RunFolder:
    folder = RunFolder(str(url))
    folder.run_id = run_id
    return folder


def compiled(place: Path, machine: str = "a", run_id: str = "run", **changes) -> CompileCache:
    return CompileCache(config(place / machine, **changes), SHAPE, CPU, run_folder(place / "out", run_id))


def compile_something(cache: CompileCache) -> dict[str, bytes]:
    """What inductor would leave behind."""
    made = Path(os.environ[compile_cache.FOLDER])
    for name in ("ab/cabc.so", "ab/cabc.cpp", "fxgraph/x/y/entry"):
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).write_bytes(random.Random(name).randbytes(999))
    made.joinpath("locks").mkdir()
    made.joinpath("locks", "x.lock").write_bytes(b"")
    cache.keep()
    cache.wait(60)
    return {name: raw for name, raw in files(made).items() if "lock" not in name}


def test_another_machine_finds_what_the_first_one_compiled(tmp_path, monkeypatch):
    monkeypatch.setenv(compile_cache.SECRET, "mine")
    first = compiled(tmp_path)
    assert first.restore() == "cold"
    made = compile_something(first)
    assert compiled(tmp_path).restore() == "warm"
    (tmp_path / "a").rename(tmp_path / "gone")
    second = compiled(tmp_path, "b")
    assert second.restore() == "warm"
    assert os.environ[compile_cache.FOLDER] == str(second.path)
    assert second.path.is_relative_to(tmp_path / "b")
    assert files(second.path) == made
    assert compiled(tmp_path, "c", compile_cache="off").restore() == "off"


def test_a_power_cut_leaves_no_marked_folder_with_a_file_cut_off(tmp_path):
    cache = compiled(tmp_path)
    cache.restore()
    with FaultyDisk(tmp_path / "a") as disk:
        made = compile_something(cache)
    place, marked = f"compiled/{cache.key}/", 0
    for _, found in disk.after_power_cuts():
        if f"{place}whole" in found:
            marked += 1
            assert {n: found.get(f"{place}{n}") for n in made} == made
    assert marked


def test_what_was_unpacked_is_sure_before_it_has_its_name(tmp_path):
    compiled(tmp_path).restore()
    made = compile_something(compiled(tmp_path))
    shutil.rmtree(tmp_path / "a" / "compiled")
    with FaultyDisk(tmp_path / "a") as disk:
        again = compiled(tmp_path)
        assert again.restore() == "warm"
    named = next(i for i, op in enumerate(disk.log) if op[0] == "rename" and op[2] == str(again.path))
    assert {("sync", disk.number_of(str(again.path / n))) for n in made} <= set(disk.log[:named])


def test_without_a_secret_of_the_users_only_the_same_home_trusts_it(tmp_path):
    """A key made at random stays in the user's cache: a machine without it compiles anew, and signs with its own."""
    first = compiled(tmp_path)
    first.restore()
    compile_something(first)
    key = tmp_path / "a" / ".perennial-compile-key"
    assert key.stat().st_mode & 0o77 == 0
    shutil.rmtree(tmp_path / "a" / "compiled")
    assert compiled(tmp_path).restore() == "warm"
    assert compiled(tmp_path, "b").restore() == "cold"
    assert key.read_bytes() not in b"".join(files(tmp_path / "out").values())


def archive_of(path: Path, *members: tuple[tarfile.TarInfo, bytes]) -> Path:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as tar:
        for info, content in members:
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    path.write_bytes(zstandard.compress(raw.getvalue()))
    return path


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def forge(archive: Path, note: Path) -> None:
    """Other content with a note that fits it, signed with another secret."""
    archive.write_bytes(b"evil")
    fields = json.loads(note.read_text())
    note.write_text(json.dumps({**fields, "bytes": 4, "sha256": compile_cache.fs.sha256_file(archive)}))


def swap(archive: Path, note: Path) -> None:
    """A sound archive of other content and the same size, under the true note."""
    n_bytes = archive.stat().st_size
    raw = archive_of(archive, (member("evil"), b"x")).read_bytes()
    padding = n_bytes - len(raw) - 8  # a frame that readers skip
    archive.write_bytes(raw + (0x184D2A50).to_bytes(4, "little") + padding.to_bytes(4, "little") + bytes(padding))
    assert archive.stat().st_size == n_bytes


DAMAGES = {
    "swapped": swap,
    "no archive": lambda archive, note: archive.unlink(),
    "no note": lambda archive, note: note.unlink(),
    "cut": lambda archive, note: archive.write_bytes(archive.read_bytes()[:-1]),
    "empty": lambda archive, note: archive.write_bytes(b""),
    "one bit": lambda archive, note: flip(archive),
    "forged": forge,
    "note is no JSON": lambda archive, note: note.write_text("{"),
    "note is a list": lambda archive, note: note.write_text("[1]"),
    "note is empty": lambda archive, note: note.write_text("{}"),
    "signature is no text": lambda archive, note: note.write_text(
        json.dumps({**json.loads(note.read_text()), "signature": 7})
    ),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_what_is_damaged_is_left_alone_and_kept_anew(tmp_path, monkeypatch, case):
    monkeypatch.setenv(compile_cache.SECRET, "mine")
    first = compiled(tmp_path)
    first.restore()
    compile_something(first)
    DAMAGES[case](*(tmp_path / "out" / "compile" / f"{first.key}{end}" for end in (".tar.zst", ".json")))
    second = compiled(tmp_path, "b")
    assert second.restore() == "cold"
    assert not second.path.exists()
    assert list((tmp_path / "b").rglob("*tmp")) == []
    compile_something(second)
    assert compiled(tmp_path, "c").restore() == "warm"


@pytest.mark.parametrize("foreign", ["run", "secret"])
def test_what_another_run_or_person_signed_is_never_unpacked(tmp_path, monkeypatch, foreign):
    monkeypatch.setenv(compile_cache.SECRET, "theirs" if foreign == "secret" else "mine")
    first = compiled(tmp_path, run_id="other" if foreign == "run" else "run")
    first.restore()
    compile_something(first)
    monkeypatch.setenv(compile_cache.SECRET, "mine")
    monkeypatch.setattr(compile_cache, "unpack", lambda *a: pytest.fail("unpacked"))
    assert compiled(tmp_path, "b").restore() == "cold"


def test_storage_that_is_away_costs_nothing(tmp_path, monkeypatch):
    from store.errors import StoreError

    def away(*args, **kwargs):
        raise StoreError("the bucket answers 503")

    for name in ("read_bytes", "put_file"):
        monkeypatch.setattr(compile_cache.fs, name, away)
    cache = compiled(tmp_path)
    assert cache.restore() == "cold"
    compile_something(cache)
    assert not (tmp_path / "out" / "compile").exists()


def test_only_the_newest_few_are_kept(tmp_path, monkeypatch):
    monkeypatch.setenv(compile_cache.SECRET, "mine")
    keys = []
    for dropout in range(compile_cache.KEPT + 2):
        shape = preset("tiny", vocab_size=300, block_size=32, n_embd=32, n_head=2, dropout=dropout / 10)
        cache = CompileCache(config(tmp_path / "a"), shape, CPU, run_folder(tmp_path / "out"))
        cache.restore()
        compile_something(cache)
        keys.append(cache.key)
    names = {p.name for p in (tmp_path / "out" / "compile").iterdir()}
    assert names == {f"{key}{end}" for key in keys[2:] for end in (".json", ".tar.zst")}


def test_the_users_own_inductor_folder_is_respected(tmp_path, monkeypatch):
    monkeypatch.setattr(compile_cache, "THEIRS", "/theirs")
    monkeypatch.setenv(compile_cache.FOLDER, "/theirs")
    assert compiled(tmp_path).restore() == "off"
    assert os.environ[compile_cache.FOLDER] == "/theirs"


def test_the_key_tells_apart_whatever_compiles_differently(monkeypatch):
    here = config(Path("x"))
    keys = [cache_key(here, SHAPE, CPU), cache_key(config(Path("y")), SHAPE, CPU)]
    assert keys[0] == keys[1]  # where it lies is no matter
    keys = keys[:1]
    keys.append(cache_key(TrainConfig(batch=8, micro_batch=2), SHAPE, CPU))
    keys.append(cache_key(here, preset("tiny", vocab_size=301, block_size=32, n_embd=32, n_head=2), CPU))
    keys.append(cache_key(here, SHAPE, Machine(torch.device("cpu"), torch.bfloat16, True)))
    for where, name, value in (
        (torch, "__version__", "9.9"), (compile_cache, "_cpu", lambda: "flags: old"), (compile_cache, "SOURCES", ("cli/*.py",)),
        (compile_cache.platform, "python_version", lambda: "3.99"), (torch.version, "cuda", "99.9"),
    ):  # fmt: skip
        with monkeypatch.context() as m:
            m.setattr(where, name, value)
            keys.append(cache_key(here, SHAPE, CPU))
    assert len(set(keys)) == len(keys)


# ---- archives --------------------------------------------------------------------------------------------------------


HOSTILE = {
    "upwards": [(member("../../evil"), b"x")],
    "absolute": [(member("/tmp/perennial-evil"), b"x")],
    "in and out": [(member("a/../../evil"), b"x")],
    "link out": [(member("l", tarfile.SYMTYPE, "/etc"), b"")],
    "link in": [(member("a"), b"x"), (member("l", tarfile.SYMTYPE, "a"), b"")],
    "hard link": [(member("a"), b"x"), (member("h", tarfile.LNKTYPE, "a"), b"")],
    "pipe": [(member("p", tarfile.FIFOTYPE), b"")],
    "device": [(member("d", tarfile.CHRTYPE), b"")],
}


@pytest.mark.parametrize("case", HOSTILE)
def test_an_archive_that_would_reach_outside_is_not_unpacked(tmp_path, case):
    inside = tmp_path / "deep" / "inside"
    inside.mkdir(parents=True)
    archive = archive_of(tmp_path / "x.tar.zst", (member("good"), b"y"), *HOSTILE[case])
    with pytest.raises((ValueError, OSError, tarfile.TarError)):
        unpack(archive, inside / "cache")
    assert list(inside.iterdir()) == []
    assert {p.name for p in tmp_path.iterdir()} == {"deep", "x.tar.zst"}
    assert {p.name for p in (tmp_path / "deep").iterdir()} == {"inside"}
    assert not Path("/tmp/perennial-evil").exists()


def test_a_bomb_is_given_up_early(tmp_path, monkeypatch):
    monkeypatch.setattr(compile_cache, "MOST_BYTES", 1 << 20)
    archive = archive_of(tmp_path / "x.tar.zst", (member("zeros"), bytes(64 << 20)))
    assert archive.stat().st_size < 10_000
    with pytest.raises(ValueError, match="larger unpacked"):
        unpack(archive, tmp_path / "cache")
    assert {p.name for p in tmp_path.iterdir()} == {"x.tar.zst"}


def test_too_many_files_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(compile_cache, "MOST_FILES", 3)
    archive = archive_of(tmp_path / "x.tar.zst", *((member(str(i)), b"") for i in range(4)))
    with pytest.raises(ValueError, match="too many"):
        unpack(archive, tmp_path / "cache")


def test_a_round_trip_keeps_bytes_and_leaves_locks_out(tmp_path):
    for name in ("a/b.so", "c", "locks/x.lock", "a/b.lock"):
        (tmp_path / "from" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "from" / name).write_bytes(name.encode())
    pack(tmp_path / "from", tmp_path / "x")
    unpack(tmp_path / "x", tmp_path / "to")
    assert files(tmp_path / "to") == {"a/b.so": b"a/b.so", "c": b"c"}


# ---- within a run ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.__version__.startswith("2.6."), reason="refused there: train/precision.py says why")
def test_a_run_says_what_it_found_and_keeps_it_after_its_first_step(data, tmp_path, monkeypatch):
    """With a compiler that leaves a file behind; the real one is measured by scripts/bench_compile_cache.py."""
    found = []

    def compiler(model, **_):
        made = Path(os.environ[compile_cache.FOLDER])
        found.append(files(made))
        made.mkdir(parents=True, exist_ok=True)
        (made / "code.so").write_bytes(b"machine code")
        return model

    monkeypatch.setattr(torch, "compile", compiler)
    monkeypatch.setenv(compile_cache.SECRET, "mine")
    flags = ("--data", data, *SMALL, "--resume", "--compile", "on", "--out", tmp_path / "out")
    for steps, machine in ((2, "a"), (4, "a"), (6, "b")):
        assert train(*flags, "--steps", steps, "--cache", tmp_path / machine) == 0
    assert train(*flags, "--steps", 8, "--compile-cache", "off") == 0
    whole = {"code.so": b"machine code", "whole": b""}
    assert found[:3] == [{}, whole, whole]
    events = [json.loads(line) for line in (tmp_path / "out" / "events.jsonl").read_text().splitlines()]
    assert [e["cache"] for e in events if e["event"] == "compiled"] == ["cold", "warm", "warm", "off"]
    assert all(e["seconds"] >= 0 for e in events if e["event"] == "compiled")
