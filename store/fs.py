"""The one way bytes are read, listed and published, on any fsspec URL: file, gs, s3, memory, http(s).

Writing is publish-only: the bytes are complete somewhere else before their final name appears. An exception that
passes through `fsspec.open(url, "wb")` publishes the truncated object (measured on gcsfs 2025.3 and 2026.10), so no
function here streams into a final name, and every upload is checked for size and, where the store tells it, for md5.
"""

import contextlib
import errno
import hashlib
import io
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

from store import drive, remote
from store.errors import DataError, NotFound, StoreError
from store.remote import call, filesystem
from store.retry import attempt, redact

COPY_BYTES = 4 << 20
SETTLE_S = 1.0  # between writing and reading back, where a store cannot create exclusively


@dataclass(frozen=True)
class Entry:
    """One name in a folder; `size` in bytes, None for a folder."""

    name: str
    size: int | None


# ---- names ----------------------------------------------------------------------------------------------------------


def is_local(url: str) -> bool:
    """True for a plain path or file:// URL."""
    return "://" not in url or url.startswith("file://")


def local_path(url: str) -> Path:
    """The path of a local URL, `~` expanded."""
    return Path(url.removeprefix("file://")).expanduser()


def join(url: str, *names: str) -> str:
    """`url/name/…` with single slashes between."""
    return "/".join([url.rstrip("/"), *names])


def _place(url: str) -> Path:
    """The path of a local URL that may be written to. Raises OSError while it is on a Drive that is not mounted."""
    path = local_path(url)
    drive.require_mounted(path)
    return path


# ---- reading --------------------------------------------------------------------------------------------------------


def size(url: str) -> int | None:
    """Bytes stored under the name; None when there is nothing or it is a folder."""

    def work() -> int | None:
        info = _info(url)
        return None if info["type"] == "directory" else info["size"]

    try:
        return attempt(url, "look up", work)
    except NotFound:
        return None


def exists(url: str) -> bool:
    """True when a file or a folder has that name."""

    def work() -> bool:
        _info(url)
        return True

    try:
        return attempt(url, "look up", work)
    except NotFound:
        return False


def modified_s(url: str) -> float | None:
    """When the name was last written, in seconds since 1970 by the store's clock; None where a store does not tell."""

    def work() -> float | None:
        info = _info(url)
        when = info.get("mtime") or info.get("LastModified")  # of gcsfs, of s3fs
        return when.timestamp() if isinstance(when, datetime) else when

    return attempt(url, "look up", work)


def _info(url: str) -> dict[str, Any]:
    """What stands under the name, in fsspec's words. Raises FileNotFoundError."""
    if is_local(url):
        found = os.stat(local_path(url))
        kind = "directory" if stat.S_ISDIR(found.st_mode) else "file"
        return {"type": kind, "size": found.st_size, "mtime": found.st_mtime}
    fs, path = filesystem(url)
    return call(fs, "info", path)


def read_bytes(url: str, start: int | None = None, stop: int | None = None) -> bytes:
    """The whole object or the bytes [start, stop). Raises NotFound, StoreError."""

    def work() -> bytes:
        if is_local(url):
            with open(local_path(url), "rb") as f:
                f.seek(start or 0)
                return f.read() if stop is None else f.read(stop - (start or 0))
        fs, path = filesystem(url)
        return call(fs, "cat_file", path, start=start, end=stop, n_bytes=(stop or 0) - (start or 0))

    return attempt(url, "read", work)


def read_text(url: str) -> str:
    """A small UTF-8 file. Raises DataError where it is something else."""
    try:
        return read_bytes(url).decode()
    except UnicodeDecodeError as e:
        raise DataError(f"{redact(url)}: not UTF-8 text") from e


def open_stream(url: str) -> BinaryIO:
    """A binary file for reading from front to back in bounded memory; a remote one survives dropped connections."""
    if is_local(url):
        return attempt(url, "open", lambda: open(local_path(url), "rb"))
    stream = _RemoteStream(url)
    attempt(url, "open", stream.connect)
    return io.BufferedReader(stream, COPY_BYTES)


class _RemoteStream(io.RawIOBase):
    """A remote object; a read that faults is tried again from the same byte on a new connection."""

    def __init__(self, url: str) -> None:
        self.url, self.at, self.file = url, 0, None

    def connect(self) -> None:
        fs, path = filesystem(self.url)
        self.file = fs.open(path, "rb", block_size=COPY_BYTES)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        begins = {io.SEEK_SET: lambda: 0, io.SEEK_CUR: lambda: self.at, io.SEEK_END: lambda: size(self.url)}
        self.at = offset + begins[whence]()
        return self.at

    def tell(self) -> int:
        return self.at

    def readinto(self, buffer: memoryview) -> int:
        def work() -> bytes:
            try:
                if self.file is None:
                    self.connect()
                if self.file.tell() != self.at:
                    self.file.seek(self.at)
                return self.file.read(len(buffer))
            except BaseException:
                self.file = None
                raise

        data = attempt(self.url, "read", work)
        buffer[: len(data)] = data
        self.at += len(data)
        return len(data)

    def readall(self) -> bytes:
        return b"".join(iter(lambda: self.read(COPY_BYTES), b""))  # Python's own asks for 8 KiB at a time

    def close(self) -> None:
        if not self.closed and self.file is not None:
            self.file.close()
        super().close()


def list_folder(url: str) -> list[Entry]:
    """What is directly inside, sorted by name; empty when the folder is missing or empty."""

    def work() -> list[Entry]:
        if is_local(url):  # an empty folder where the Drive should be must not look like a run without checkpoints
            with os.scandir(_place(url)) as found:
                return sorted((Entry(e.name, _file_bytes(e)) for e in found), key=lambda e: e.name)
        fs, path = filesystem(url)
        fs.invalidate_cache()
        infos = call(fs, "ls", path, detail=True)
        root = path.rstrip("/")
        entries = {i["name"].rstrip("/").rsplit("/", 1)[-1]: i for i in infos if i["name"].rstrip("/") != root}
        return [Entry(n, None if i["type"] == "directory" else i["size"]) for n, i in sorted(entries.items())]

    try:
        return attempt(url, "list", work)
    except NotFound:
        return []


def _file_bytes(entry: os.DirEntry) -> int | None:
    """Of a file; None of a folder, 0 of a link to nothing, or of what went just now."""
    try:
        return None if entry.is_dir() else entry.stat().st_size
    except FileNotFoundError:
        return 0


def find_files(url: str) -> list[tuple[str, int]]:
    """(URL, bytes) of every file a path, folder (recursive, hidden names skipped) or glob names, sorted by name.

    Links are followed, each folder is entered once. Raises StoreError for a part that cannot be listed.
    """
    return attempt(url, "read", lambda: sorted(_find_local(url) if is_local(url) else _find_remote(url)))


def _find_remote(url: str) -> Iterator[tuple[str, int]]:
    fs, path = filesystem(url)
    if _has_magic(url) and not fs.exists(path):
        found = fs.glob(path, detail=True)
    elif fs.isdir(path):
        found = fs.find(path, detail=True)
        skip = len(path.rstrip("/")) + 1
        found = {n: i for n, i in found.items() if not any(p.startswith(".") for p in n[skip:].split("/"))}
    else:
        found = {path: fs.info(path)}
    prefix = url.split("://")[0] + "://"
    for name, info in found.items():
        if info["type"] == "file":
            n_bytes = info["size"] if info["size"] is not None else fs.info(name)["size"]  # a web server's listing
            if n_bytes is None:
                raise StoreError(f"{redact(name)}: the server does not tell its size: download it first")
            yield name if "://" in name else prefix + name, int(n_bytes)


def _find_local(url: str) -> Iterator[tuple[str, int]]:
    path = os.path.abspath(local_path(url))
    if _has_magic(path) and not os.path.exists(path):
        names = path.split("/")
        fixed = next(i for i, name in enumerate(names) if _has_magic(name))
        depth = None if "**" in path else len(names) - fixed
        from fsspec.utils import glob_translate  # loads all of fsspec

        wanted = re.compile(glob_translate(path)).match
        yield from _walk("/".join(names[:fixed]) or "/", depth, wanted, hidden="/." in path, seen=set())
    elif os.path.isdir(path):
        yield from _walk(path, None, bool, hidden=False, seen=set())
    else:
        info = os.stat(path)
        if not stat.S_ISREG(info.st_mode):
            raise StoreError(f"{url}: is a pipe or a device, no file")
        yield path, info.st_size


def _walk(
    folder: str, depth: int | None, wanted: Callable[[str], object], *, hidden: bool, seen: set[tuple[int, int]]
) -> Iterator[tuple[str, int]]:
    """The files below a folder, to a depth. Unlike fsspec's it follows links, and names what it may not list."""
    place = os.stat(folder)
    if depth == 0 or (place.st_dev, place.st_ino) in seen:
        return
    seen.add((place.st_dev, place.st_ino))  # a link can lead back to a folder above
    try:
        entries = sorted(os.scandir(folder), key=lambda e: e.name)
    except PermissionError as e:
        raise StoreError(f"{folder}: cannot list: {e.strerror}: change its permissions, or leave it out") from e
    for entry in entries:
        if entry.name.startswith(".") and not hidden:
            continue
        if entry.is_dir():
            yield from _walk(entry.path, depth and depth - 1, wanted, hidden=hidden, seen=seen)
        elif wanted(entry.path):
            if not os.path.exists(entry.path):
                raise StoreError(f"{entry.path}: a link to something that is not there: mend or remove it")
            if stat.S_ISREG((info := entry.stat()).st_mode):
                yield entry.path, info.st_size


def _has_magic(url: str) -> bool:
    return any(c in url for c in "*?[")


def sha256_file(path: Path) -> str:
    """Hex sha256 of a local file."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def get_file(url: str, path: Path, *, sha256: str | None = None) -> None:
    """Copy an object to a local file, which appears only when whole and, if `sha256` is given, proved equal.

    Bytes can be damaged on the way, silently: a copy that differs is fetched again before the object is called damaged.
    """

    def work(last_try: bool) -> bool:
        with staged(path) as temporary:
            if is_local(url):
                shutil.copyfile(local_path(url), temporary)
            else:
                _download(url, temporary)
            if sha256 is None or sha256_file(temporary) == sha256:
                return True
            if last_try:
                raise DataError(f"{redact(url)}: sha256 differs from the recorded one: damaged or changed")
            raise _Mismatch

    for tries_left in (2, 1, 0):
        with contextlib.suppress(_Mismatch):
            if attempt(url, "fetch", lambda last=tries_left == 0: work(last)):
                return


def _download(url: str, path: Path) -> None:
    """Piece by piece, each with tries of its own: an interruption costs a piece, and no request is long."""
    fs, name = filesystem(url)
    n_bytes = call(fs, "info", name)["size"]
    if n_bytes is None:  # a web server that does not tell
        call(fs, "get_file", name, str(path))
        return
    with open(path, "wb") as f:
        for start in range(0, n_bytes, remote.PIECE_BYTES):
            stop = min(start + remote.PIECE_BYTES, n_bytes)
            piece = read_bytes(url, start, stop)
            if len(piece) != stop - start:
                raise OSError(errno.EIO, f"download brought {len(piece)} bytes of {stop - start}", redact(url))
            f.write(piece)


class _Mismatch(StoreError):
    """A fetched copy is not what was recorded: perhaps only the copy is wrong."""


# ---- publishing -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def staged(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """A temporary name beside a local `path`, fsynced and moved over it on success, removed on failure.

    Without `durable` there is no fsync: for what is proved by its hash when it is read, and can be made again.
    """
    drive.require_mounted(path)
    make_folder(path.parent)
    temporary = _temporary(path)
    try:
        yield temporary
        if durable:
            with open(temporary, "rb+") as f:
                os.fsync(f.fileno())  # else a power cut can leave the name with nothing behind it
        os.replace(temporary, path)
        if durable:
            _fsync(path.parent)
    finally:
        with contextlib.suppress(OSError):  # the fault that came first is the one to tell
            drive.discard(temporary)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


def make_folder(path: Path) -> None:
    """A folder and those above it, each as sure to survive a power cut as what will be put into it."""
    new = [p for p in (path, *path.parents) if not p.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for p in new:
        _fsync(p.parent)


def _fsync(path: Path) -> None:
    """Make sure of a file's bytes; of what was renamed, linked or made in a folder, wherever folders can be synced."""
    if drive.holds(path):  # the cloud keeps another order of its own: there is nothing to ask for
        return
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError:  # gone, or one of the mounts that do not open a folder
        return
    try:
        os.fsync(fd)
    except OSError as e:
        if e.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF):  # how mounts say that they cannot
            raise
    finally:
        os.close(fd)


def sync_tree(folder: Path) -> None:
    """Every file and folder in there, as it is now, survives a power cut. Raises OSError."""
    for path in (*folder.rglob("*"), folder):
        if path.is_file() or path.is_dir():
            _fsync(path)


def put_bytes(url: str, data: bytes) -> None:
    """Publish `data` whole under the name, replacing what was there. Raises StoreError; then the old bytes stay."""

    def work() -> None:
        if is_local(url):
            with staged(local_path(url)) as temporary:
                temporary.write_bytes(data)
            return
        remote.upload(url, data)

    attempt(url, "write", work)


def put_file(url: str, source: Path) -> None:
    """Publish a finished local file whole under the name. Raises StoreError; then the old bytes stay."""

    def work() -> None:
        if not is_local(url):
            remote.upload(url, source)
            return
        target = _place(url)
        if target.resolve() == source.resolve():
            return
        if drive.holds(target):
            drive.require_room(source.stat().st_size)
        with staged(target) as temporary:
            shutil.copyfile(source, temporary)
        if drive.holds(target) and sha256_file(target) != sha256_file(source):  # a full Drive makes files of 0 bytes
            raise OSError(errno.EIO, "Drive stored other bytes than were written", url)

    attempt(url, "write", work)


def put_log(url: str, data: bytes) -> None:
    """Publish a file that only ever grows. On a disk what is new is appended, so that a crash can leave a part of it.

    On Drive a file that is replaced goes to the Trash whole: a log of 25 MB at every save would fill an account.
    """

    def work() -> None:
        with open(_place(url), "r+b") as f:
            if f.read() != data[: f.tell()]:
                raise FileNotFoundError
            f.write(data[f.tell() :])
            f.flush()
            os.fsync(f.fileno())

    if not is_local(url):
        put_bytes(url, data)
        return
    try:
        attempt(url, "write", work)
    except NotFound:  # or another file than the beginning of this one
        put_bytes(url, data)


def create(url: str, data: bytes) -> bool:
    """Publish `data` under a name that nothing has yet: True, or False where it is taken. Of many at once the first wins.

    A hard link on local disks, `ifGenerationMatch=0` on GCS (gcsfs 2025.3.0 has it too), `If-None-Match: *` on S3; what
    has none of them (Drive, other stores) is written and read back after a moment, which two at once can both survive.
    Where the answer to a creation is lost, the name is taken, by our own bytes: give bytes that nobody else writes.
    """

    def work() -> bool:
        created = _link(_place(url), data) if is_local(url) else remote.create(url, data)
        if created is not None:
            return created
        if not exists(url):
            put_bytes(url, data)
            time.sleep(SETTLE_S)
        return read_bytes(url) == data

    return attempt(url, "write", work)


def _link(path: Path, data: bytes) -> bool | None:
    """`create` on a disk; None where there are no hard links: exFAT, Drive, some mounts."""
    make_folder(path.parent)
    temporary = _temporary(path)
    try:
        with open(temporary, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        try:
            os.link(temporary, path)  # unlike a rename it fails where the name is taken
        except FileExistsError:
            return path.read_bytes() == data
        except OSError as e:
            if e.errno in (errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP):
                return None
            raise
        _fsync(path.parent)
        return True
    finally:
        temporary.unlink(missing_ok=True)


def move_file(url: str, source: Path) -> None:
    """Publish a finished local file under the name and give up the source: a rename where both are on one disk."""

    def rename() -> bool:
        target = _place(url)
        make_folder(target.parent)
        with open(source, "rb+") as f:
            os.fsync(f.fileno())
        try:
            os.replace(source, target)
        except OSError as e:
            if e.errno != errno.EXDEV:
                raise
            return False
        return True

    if is_local(url) and attempt(url, "write", rename):
        attempt(url, "write", lambda: _fsync(local_path(url).parent))
        return
    put_file(url, source)
    source.unlink()


# ---- removing and moving --------------------------------------------------------------------------------------------


def delete(url: str) -> None:
    """Remove one file; nothing happens when it is not there."""

    def work() -> None:
        if is_local(url):
            drive.discard(_place(url))
        else:
            fs, path = filesystem(url)
            call(fs, "rm_file", path)

    with contextlib.suppress(NotFound):
        attempt(url, "delete", work)


def delete_folder(url: str, *, first: str | None = None) -> None:
    """Remove a folder of files; `first` goes first, so that a half-removed folder is already not what it was."""
    names = [e.name for e in list_folder(url)]
    for name in sorted(names, key=lambda n: n != first):
        delete(join(url, name))
        if name == first and is_local(url):
            attempt(url, "delete", lambda: _fsync(local_path(url)))  # a power cut must not change the order
    if is_local(url):
        with contextlib.suppress(OSError):
            local_path(url).rmdir()


def delete_leftovers(url: str) -> None:
    """Remove what killed writers left directly in a folder: hidden files ending in .tmp."""
    for entry in list_folder(url):
        if entry.name.startswith(".") and entry.name.endswith(".tmp"):
            delete(join(url, entry.name))


def move_folder(source: str, target: str) -> None:
    """Give a folder of files another name: a rename where there is one, else copy each file, then delete."""

    def work() -> None:
        if is_local(source):
            make_folder(_place(target).parent)
            os.rename(local_path(source), local_path(target))
            return
        fs, old = filesystem(source)
        _, new = filesystem(target)
        names = [e.name for e in list_folder(source)]
        for name in names:
            call(fs, "cp_file", f"{old.rstrip('/')}/{name}", f"{new.rstrip('/')}/{name}")
        for name in names:
            call(fs, "rm_file", f"{old.rstrip('/')}/{name}")

    attempt(source, "move", work)
