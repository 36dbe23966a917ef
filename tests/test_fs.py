"""Storage publishes whole or not at all, retries what passes, says the rest in one line: on disk, in memory, on gs://."""

import contextlib
import errno
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import aiohttp
import gcsfs.retry
import google.auth.exceptions
import pytest
from fsspec.registry import _registry as drivers

from store import fs, retry
from store.errors import DataError, NotFound, StoreError

ROOT = Path(__file__).parent.parent
SECRETS = ("hunter2", "SECRET", "alice")


@pytest.fixture(params=["local", "memory", "gs"])
def base(request, tmp_path):
    """A folder URL of each kind."""
    if request.param == "gs":
        request.getfixturevalue("gcs")
        return "gs://bucket/folder"
    return str(tmp_path / "folder") if request.param == "local" else f"memory:///{tmp_path.name}"


def small_disk(folder: Path, *options: str) -> Path:
    """A mounted tmpfs of 1 MB, where this machine lets us mount one."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", ",".join(["size=1m", *options]), "tmpfs", str(folder)]
    try:
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("cannot mount a tmpfs here")
    except FileNotFoundError:
        pytest.skip("no mount command here")
    return folder


# ---- every kind of URL ----------------------------------------------------------------------------------------------


def test_round_trip(base, tmp_path):
    """What is put is what is read, listed, fetched, moved and deleted, whatever the storage."""
    source = tmp_path / "source"
    source.write_bytes(os.urandom(6 << 20))  # gcsfs uploads 5 MiB and more in a resumable session
    assert fs.list_folder(base) == []
    assert not fs.exists(base)
    fs.put_bytes(fs.join(base, "b"), b"old")
    fs.put_bytes(fs.join(base, "b"), b"hello")
    fs.put_bytes(fs.join(base, "empty"), b"")
    fs.put_file(fs.join(base, "sub", "a"), source)

    assert fs.list_folder(base) == [fs.Entry("b", 5), fs.Entry("empty", 0), fs.Entry("sub", None)]
    assert [n for n, _ in fs.find_files(base)] == [fs.join(base, n) for n in ("b", "empty", "sub/a")]
    assert (fs.size(fs.join(base, "b")), fs.size(fs.join(base, "sub")), fs.size(fs.join(base, "no"))) == (5, None, None)
    assert fs.exists(fs.join(base, "sub"))
    assert fs.read_bytes(fs.join(base, "b")) == b"hello"
    assert fs.read_bytes(fs.join(base, "b"), 1, 3) == b"el"
    with fs.open_stream(fs.join(base, "sub", "a")) as f:
        assert f.read() == source.read_bytes()
        f.seek(5_000_000)
        assert f.read(7) == source.read_bytes()[5_000_000:5_000_007]
    fs.get_file(fs.join(base, "sub", "a"), tmp_path / "copy", sha256=fs.sha256_file(source))
    assert (tmp_path / "copy").read_bytes() == source.read_bytes()

    fs.move_folder(fs.join(base, "sub"), fs.join(base, "aside", "sub-1"))
    assert fs.size(fs.join(base, "aside", "sub-1", "a")) == 6 << 20
    assert fs.list_folder(fs.join(base, "sub")) == []
    fs.delete(fs.join(base, "b"))
    fs.delete(fs.join(base, "b"))  # nothing there: nothing happens
    fs.delete_folder(fs.join(base, "aside", "sub-1"))
    assert [n for n, _ in fs.find_files(base)] == [fs.join(base, "empty")]


@pytest.mark.parametrize("name", ["with space.txt", "größe-字.txt", "part[1].txt", "a*b.txt", "what?.txt", ".hidden"])
def test_names_are_names(base, name):
    """A name with spaces, non-ASCII or glob characters is that file and no pattern; hidden names are not found."""
    fs.put_bytes(fs.join(base, name), b"abc")
    fs.put_bytes(fs.join(base, "part1.txt"), b"decoy")
    assert fs.find_files(fs.join(base, name)) == [(fs.join(base, name), 3)]
    assert fs.read_bytes(fs.join(base, name)) == b"abc"
    found = [n for n, _ in fs.find_files(base)]
    assert (fs.join(base, name) in found) == (not name.startswith("."))


def test_globs(base):
    """A glob finds files alone, sorted; one that matches nothing finds nothing; a missing plain name is an error."""
    for name in ("b 2.txt", "a.txt", "sub/c.txt", "d.bin"):
        fs.put_bytes(fs.join(base, name), b"x")
    assert [n for n, _ in fs.find_files(fs.join(base, "*.txt"))] == [fs.join(base, n) for n in ("a.txt", "b 2.txt")]
    assert [n for n, _ in fs.find_files(fs.join(base, "**/c.txt"))] == [fs.join(base, "sub/c.txt")]
    assert fs.find_files(fs.join(base, "*.zip")) == []
    with pytest.raises(NotFound):
        fs.find_files(fs.join(base, "missing.txt"))


def test_links_are_followed_once_and_what_is_no_file_is_told(tmp_path):
    """A folder may hold links to files, to folders elsewhere, and back to itself; pipes in it are passed over."""
    inside, outside = tmp_path / "in", tmp_path / "out"
    for folder in (inside / "sub", inside / "with", outside):
        folder.mkdir(parents=True)
    (inside / "sub" / "a.txt").write_bytes(b"abc")
    (inside / "link.txt").symlink_to("sub/a.txt")
    (inside / "sub" / "loop").symlink_to("..")
    (inside / "sub" / "self").symlink_to(".")
    (outside / "ö b.txt").write_bytes(b"de")
    (inside / "with" / "far").symlink_to(outside)
    os.mkfifo(inside / "pipe.txt")
    found = [("link.txt", 3), ("sub/a.txt", 3), ("with/far/ö b.txt", 2)]
    expected = [(str(inside / n), size) for n, size in found]
    assert fs.find_files(str(inside)) == expected
    assert fs.find_files(str(inside / "**" / "*.txt")) == expected
    assert fs.find_files(str(inside / "*.txt")) == expected[:1]
    with pytest.raises(StoreError, match="is a pipe or a device"):
        fs.find_files(str(inside / "pipe.txt"))
    (inside / "gone.txt").symlink_to("nothing")
    for url in (inside, inside / "*.txt"):
        with pytest.raises(StoreError, match=r"gone\.txt: a link to something that is not there"):
            fs.find_files(str(url))
    assert fs.find_files(str(inside / "l*.txt")) == expected[:1]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may list everything")
def test_a_folder_that_may_not_be_listed_is_told(tmp_path):
    """Leaving it out in silence would be losing data."""
    (tmp_path / "in" / "closed").mkdir(parents=True)
    (tmp_path / "in" / "closed").chmod(0)
    with pytest.raises(StoreError, match="closed: cannot list: Permission denied"):
        fs.find_files(str(tmp_path / "in"))


def test_damaged_fetch_leaves_nothing(base, tmp_path):
    """An object that is not the recorded one is a DataError, and no file has the final name."""
    fs.put_bytes(fs.join(base, "x"), b"changed")
    with pytest.raises(DataError, match="sha256 differs"):
        fs.get_file(fs.join(base, "x"), tmp_path / "new" / "x", sha256="0" * 64)
    assert os.listdir(tmp_path / "new") == []


def test_missing_is_one_line(base, tmp_path):
    """Whatever reads a name that is not there says which, in one line."""
    for work in (fs.read_bytes, fs.open_stream, lambda u: fs.get_file(u, tmp_path / "no")):
        with pytest.raises(StoreError, match=r"^\S*gone\S*: ") as e:
            work(fs.join(base, "gone"))
        assert isinstance(e.value, NotFound) or work is not fs.read_bytes
        assert "\n" not in str(e.value)


# ---- the local disk -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["put_bytes", "put_file"])
def test_killed_in_mid_write_leaves_the_old_bytes(tmp_path, how):
    """SIGKILL while a large file is being written over another: the old one is whole, leftovers are hidden .tmp files."""
    source, target, n_bytes = tmp_path / "source", tmp_path / "out" / "x.bin", 192 << 20
    with open(source, "wb") as f:
        f.truncate(n_bytes)
    fs.put_bytes(str(target), b"old")
    code = (
        f"from pathlib import Path; from store import fs; s = Path({str(source)!r})\n"
        f"data = s.read_bytes() if {how!r} == 'put_bytes' else None; print('go', flush=True)\n"
        f"fs.put_bytes({str(target)!r}, data) if data else fs.put_file({str(target)!r}, s)"
    )
    for _ in range(5):
        child = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
        child.stdout.readline()
        leftovers: list[Path] = []
        while child.poll() is None and not any(p.stat().st_size for p in leftovers):
            leftovers = list(target.parent.glob(".*"))
        child.send_signal(signal.SIGKILL)
        child.communicate()
        assert target.stat().st_size in (3, n_bytes)  # never a torn file
        if child.returncode == -signal.SIGKILL and target.stat().st_size == 3:
            break
        fs.put_bytes(str(target), b"old")  # it was done before the signal came
    else:
        pytest.fail("never killed in mid-write")
    assert target.read_bytes() == b"old"
    left = [p for p in target.parent.iterdir() if p != target]
    assert left
    assert all(p.name.startswith(".x.bin.") and p.name.endswith(".tmp") and p.stat().st_size < n_bytes for p in left)
    assert fs.find_files(str(target.parent)) == [(str(target), 3)]


def test_failed_write_leaves_the_old_bytes(tmp_path):
    """A source that cannot be read changes nothing and leaves nothing."""
    target = tmp_path / "x"
    fs.put_bytes(str(target), b"old")
    with pytest.raises(NotFound):
        fs.put_file(str(target), tmp_path / "gone")
    with contextlib.suppress(RuntimeError), fs.staged(target) as temporary:
        temporary.write_bytes(b"half")
        raise RuntimeError
    assert os.listdir(tmp_path) == ["x"]
    assert target.read_bytes() == b"old"


def test_put_file_onto_itself_keeps_it(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"same")
    fs.put_file(str(path), path)
    assert path.read_bytes() == b"same"


def test_local_refusals_are_one_line_at_once(tmp_path):
    """Not a folder, a folder, a place where nobody may write: a StoreError that names it, without any retry."""
    (tmp_path / "file").write_bytes(b"")
    started_s = time.monotonic()
    for url in (str(tmp_path / "file" / "x"), str(tmp_path / "file" / "sub" / "x"), str(tmp_path), "/proc/perennial/x"):
        with pytest.raises(StoreError) as e:
            fs.put_bytes(url, b"x")
        assert str(e.value).startswith(f"{url}: ")
        assert "\n" not in str(e.value)
    with pytest.raises(StoreError, match="cannot read: Is a directory"):
        fs.read_bytes(str(tmp_path))
    assert time.monotonic() - started_s < 2


def test_full_and_read_only_disks(tmp_path):
    """A full disk says so and keeps the old bytes; so does a read-only one. Neither is retried."""
    disk, started_s = small_disk(tmp_path / "disk"), time.monotonic()
    try:
        fs.put_bytes(str(disk / "x"), b"old")
        with pytest.raises(StoreError, match=r"x: no space left; free some"):
            fs.put_bytes(str(disk / "x"), bytes(3 << 20))
        (tmp_path / "big").write_bytes(bytes(3 << 20))
        with pytest.raises(StoreError, match=r"x: no space left; free some"):
            fs.put_file(str(disk / "x"), tmp_path / "big")
        assert os.listdir(disk) == ["x"]
        assert (disk / "x").read_bytes() == b"old"
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with pytest.raises(StoreError, match="Read-only file system"):
            fs.put_bytes(str(disk / "x"), b"new")
        with pytest.raises(StoreError, match="Read-only file system"):
            fs.delete(str(disk / "x"))
        assert (disk / "x").read_bytes() == b"old"
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert time.monotonic() - started_s < 5


# ---- names, secrets, unknown kinds ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://alice:hunter2@host/a/b?X-Sig=SECRET&b=1", "https://host/a/b"),
        ("https://alice:hun@hunter2@host/a", "https://host/a"),
        ("https://host?mail=SECRET@x", "https://host"),
        ("s3://alice:hunter2@bucket/a@b/c", "s3://bucket/a@b/c"),
        ("gs://bucket/run@1/x", "gs://bucket/run@1/x"),
        ("/home/me/what?.txt", "/home/me/what?.txt"),
    ],
)
def test_redact(url, shown):
    """User, password and query are never shown; the rest is."""
    assert fs.redact(url) == shown
    assert not any(s in fs.redact(url) for s in SECRETS)


def test_unknown_kind_and_missing_driver(monkeypatch):
    """Both are one line, at once; a missing driver is named."""
    with pytest.raises(StoreError, match=r"^ftpx://h/x: unknown kind of URL 'ftpx://'; use a path, gs://, s3://"):
        fs.read_bytes("ftpx://alice:hunter2@h/x")
    monkeypatch.delitem(drivers, "s3", raising=False)  # it may have been imported before
    monkeypatch.setitem(sys.modules, "s3fs", None)  # importing it fails, as where it is not installed
    with pytest.raises(StoreError, match=r"pip install s3fs$"):
        fs.list_folder("s3://bucket/x")


def status_error(status: int) -> aiohttp.ClientResponseError:
    return aiohttp.ClientResponseError(None, (), status=status)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("error", "transient"),
    [
        *[(OSError(n, "x"), True) for n in (errno.EIO, errno.ENOTCONN, errno.ESTALE, errno.ETIMEDOUT, errno.EPIPE)],
        *[(OSError(n, "x"), False) for n in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ENOENT)],
        (OSError(socket.EAI_AGAIN, "Temporary failure in name resolution"), True),
        (OSError(socket.EAI_NONAME, "Name or service not known"), False),
        (OSError("upload failed"), True),
        (OSError("Forbidden: https://storage…"), False),
        *[(status_error(s), True) for s in (408, 429, 500, 502, 503, 504)],
        *[(status_error(s), False) for s in (400, 401, 403, 404, 412, 501)],
        (gcsfs.retry.HttpError({"code": 503, "message": "x"}), True),
        (gcsfs.retry.HttpError({"code": 400, "message": "x"}), False),
        (aiohttp.ServerDisconnectedError(), True),
        (aiohttp.ClientPayloadError("x"), True),
        (aiohttp.InvalidURL("http:///x"), False),
        (google.auth.exceptions.TransportError("no network to renew the token"), True),
        (google.auth.exceptions.RefreshError("revoked"), False),
        (TimeoutError(), True),
        (ConnectionResetError(), True),
        (FileNotFoundError(), False),
        (ValueError("x"), False),
        (KeyError("x"), False),
        (DataError("x"), False),
        (KeyboardInterrupt(), False),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, BaseException) else str(v),
)
def test_what_is_worth_another_try(error, transient):
    assert retry.is_transient(error) is transient


# ---- a real object store over HTTP ----------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [503, 429, "drop", "drop after", "truncate", "flip"])
@pytest.mark.parametrize("n_bytes", [1000, 6 << 20])
def test_upload_faults_are_overcome(gcs, tmp_path, fault, n_bytes):
    """Refused, cut off or damaged on the way up: after put_file returns, the store holds exactly our bytes."""
    (tmp_path / "x").write_bytes(os.urandom(n_bytes))
    gcs.fail("upload" if n_bytes < 5 << 20 else "chunk", fault)
    fs.put_file("gs://b/x", tmp_path / "x")
    assert gcs.objects == {"b/x": (tmp_path / "x").read_bytes()}
    assert gcs.requests("upload") + gcs.requests("chunk") == 2  # the one that failed, and one more


@pytest.mark.parametrize("fault", ["truncate", "flip"])
def test_put_bytes_is_checked_too(gcs, fault):
    gcs.fail("upload", fault)
    fs.put_bytes("gs://b/x", b"0123456789")
    assert gcs.objects == {"b/x": b"0123456789"}


def test_partly_accepted_chunk(gcs, tmp_path):
    """The store takes half of a chunk: the rest follows at the right place (gcsfs 2025.3 could shift it)."""
    (tmp_path / "x").write_bytes(os.urandom(6 << 20))
    gcs.fail("chunk", "partial")
    fs.put_file("gs://b/x", tmp_path / "x")
    assert gcs.objects["b/x"] == (tmp_path / "x").read_bytes()


@pytest.mark.parametrize("kind", ["upload", "info", "read", "list", "delete", "copy"])
def test_longer_outages_than_gcsfs_bears(gcs, kind):
    """Six answers of 503 end gcsfs's patience, not ours: for every operation."""
    gcs.fail(kind, 503, times=7)
    fs.put_bytes("gs://b/a/x", b"hello")
    assert fs.read_bytes("gs://b/a/x") == b"hello"
    assert fs.list_folder("gs://b/a") == [fs.Entry("x", 5)]
    fs.move_folder("gs://b/a", "gs://b/c")
    assert fs.find_files("gs://b/c/*") == [("gs://b/c/x", 5)]
    fs.delete("gs://b/c/x")
    assert gcs.objects == {}
    assert not gcs.faults[kind]


def test_delete_that_was_done_but_not_answered(gcs):
    gcs.objects["b/x"] = b"1"
    gcs.fail("delete", "drop after")
    fs.delete("gs://b/x")
    assert gcs.objects == {}


def test_refusal_is_one_line_at_once(gcs, tmp_path):
    """403 is an answer: one request, one line."""
    for kind, work in {
        "upload": lambda: fs.put_bytes("gs://b/x", b"1"),
        "read": lambda: fs.read_bytes("gs://b/x"),
        "list": lambda: fs.list_folder("gs://b/a"),
        "delete": lambda: fs.delete("gs://b/x"),
    }.items():
        gcs.fail(kind, 403, times=9)
        with pytest.raises(StoreError, match=r"^gs://b/[xa]: cannot \w+: Forbidden.*fault on order$") as e:
            work()
        assert "\n" not in str(e.value)
        assert gcs.requests(kind) == 1


def test_patience_is_bounded(gcs, monkeypatch):
    """When the fault stays, the time for retries ends it with one line; a damaged upload is never called good."""
    monkeypatch.setattr(retry, "RETRY_FOR_S", 0.3)
    for fault, words in ((503, "fault on order"), ("flip", "other bytes than were sent"), ("truncate", "bytes of 10")):
        gcs.faults["upload"] = [fault] * 10_000
        started_s = time.monotonic()
        with pytest.raises(StoreError, match=words) as e:
            fs.put_bytes("gs://b/x", b"0123456789")
        assert str(e.value).startswith("gs://b/x: cannot write: ")
        assert time.monotonic() - started_s < 5


@pytest.mark.parametrize("listens", [True, False], ids=["never answers", "refuses"])
def test_a_first_look_is_soon_over(listens, caplog):
    """However patient the driver is itself: one error, no lines before it, and no server that is away is "not found"."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        if listens:
            s.listen()
        started_s = time.monotonic()
        with (
            retry.patience(0.4 if listens else 2.0),
            pytest.raises(StoreError, match="no answer" if listens else "Connect call failed"),
        ):
            fs.exists(f"http://127.0.0.1:{s.getsockname()[1]}/x")
    assert time.monotonic() - started_s < 5
    assert caplog.records == []


def test_patience_is_set_by_the_environment():
    """PERENNIAL_RETRY_FOR_S bounds it for a whole program; the line on stderr tells of each further try."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        url = f"http://alice:hunter2@127.0.0.1:{s.getsockname()[1]}/x?sig=SECRET"  # bound, not listening: refused
        code = f"from cli import flags; from store import fs; flags.run(lambda: fs.read_bytes({url!r}))"
        env = {**os.environ, "PERENNIAL_RETRY_FOR_S": "0.2"}
        ran = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=20
        )
    lines = ran.stderr.splitlines()
    assert ran.returncode == 2
    assert lines[-1].startswith("error: http://127.0.0.1:")
    assert all("trying again" in line for line in lines[:-1])
    assert not any(s in ran.stderr for s in SECRETS)


@pytest.mark.parametrize("fault", ["flip", "truncate", 503, "drop"])
def test_only_the_copy_was_damaged(gcs, tmp_path, fault):
    """Bytes damaged on the way down once are fetched again; twice more, and the object is called damaged."""
    gcs.objects["b/x"] = os.urandom(100_000)
    (tmp_path / "x").write_bytes(gcs.objects["b/x"])
    sha256 = fs.sha256_file(tmp_path / "x")
    gcs.fail("read", fault)
    fs.get_file("gs://b/x", tmp_path / "copy", sha256=sha256)
    assert (tmp_path / "copy").read_bytes() == gcs.objects["b/x"]
    gcs.fail("read", "flip", times=3)
    with pytest.raises(DataError, match=r"^gs://b/x: sha256 differs"):
        fs.get_file("gs://b/x", tmp_path / "second", sha256=sha256)
    assert sorted(os.listdir(tmp_path)) == ["copy", "x"]


def test_stream_survives_dropped_connections(gcs, monkeypatch):
    """A remote stream goes on at the right byte after faults that gcsfs gives up on, and ends in a StoreError."""
    gcs.objects["b/x"] = os.urandom(9 << 20)
    with fs.open_stream("gs://b/x") as f:
        got = f.read(5 << 20)
        gcs.fail("read", 503, times=7)
        assert got + f.read() == gcs.objects["b/x"]
    assert gcs.requests("read") < 20  # megabytes at a time: gcsfs alone asks once for every read
    monkeypatch.setattr(retry, "RETRY_FOR_S", 0.1)
    with fs.open_stream("gs://b/x") as f:
        gcs.fail("read", 503, times=10_000)
        with pytest.raises(StoreError, match=r"^gs://b/x: cannot read: "):
            f.read(1)


def test_the_first_name_goes_first(gcs, tmp_path):
    """delete_folder removes `first` first, so that an interrupted removal leaves no folder that looks complete."""
    for name in ("a", "manifest.json", "z"):
        gcs.objects[f"b/step/{name}"] = b"1"
        fs.put_bytes(str(tmp_path / "step" / name), b"1")
    fs.delete_folder("gs://b/step", first="manifest.json")
    assert [n for k, n in gcs.seen if k == "delete"] == ["b/step/manifest.json", "b/step/a", "b/step/z"]
    fs.delete_folder(str(tmp_path / "step"), first="manifest.json")
    assert not (tmp_path / "step").exists()
    fs.delete_folder(str(tmp_path / "step"))  # nothing there: nothing happens


def test_listing_sees_what_others_wrote(gcs):
    """No listing is remembered: what another process writes or deletes shows at once."""
    gcs.objects["b/a/x"] = b"1"
    assert fs.list_folder("gs://b/a") == [fs.Entry("x", 1)]
    gcs.objects["b/a/x"] = b"22"
    assert fs.size("gs://b/a/x") == 2
    del gcs.objects["b/a/x"]
    assert not fs.exists("gs://b/a/x")
    assert fs.list_folder("gs://b/a") == []
    gcs.objects["b/a/x"] = b"1"
    assert fs.list_folder("gs://b/a") == [fs.Entry("x", 1)]


def test_plain_http(gcs, caplog):
    """A signed http URL is read, streamed and retried, and its secrets show nowhere."""
    gcs.objects["b/x"] = os.urandom(50_000)
    signed = gcs.url.replace("//", "//alice:hunter2@") + "/download/storage/v1/b/b/o/{}?alt=media&sig=SECRET"
    gcs.fail("read", 503)
    with caplog.at_level(logging.WARNING, "store.fs"):
        assert fs.read_bytes(signed.format("x")) == gcs.objects["b/x"]
    assert "trying again (attempt 2)" in caplog.text
    assert fs.read_bytes(signed.format("x"), 5, 9) == gcs.objects["b/x"][5:9]
    with fs.open_stream(signed.format("x")) as f:
        assert f.read() == gcs.objects["b/x"]
    with pytest.raises(NotFound) as missing:
        fs.read_bytes(signed.format("y"))
    gcs.fail("read", 403, times=5)
    with pytest.raises(StoreError) as refused:
        fs.read_bytes(signed.format("x"))
    with pytest.raises(StoreError, match="cannot write"):
        fs.put_bytes(signed.format("x"), b"1")
    for text in (caplog.text, str(missing.value), str(refused.value)):
        assert not any(s in text for s in SECRETS)


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOSYS, errno.ENOTSUP])
def test_the_first_wins_without_hard_links_too(tmp_path, monkeypatch, number):
    def refuse(source, target):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(fs, "SETTLE_S", 0.01)
    assert fs.create(str(tmp_path / "job"), b"first")
    assert not fs.create(str(tmp_path / "job"), b"later")
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"first"]
