"""A disk that fails on order, and what a power cut leaves of it: a thin layer under the file calls of this process.

Real bytes in a real folder. Faults are raised by the call that meets them; a power cut is computed from what was done:
only what was fsynced is sure to survive, of a file otherwise any beginning, of names whatever was on its way in any
choice of them (Pillai et al., OSDI 2014, found real file systems to do all of this).
"""

import builtins
import contextlib
import errno
import io
import itertools
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

OPERATIONS = ("create", "write", "fsync", "rename", "link", "unlink", "truncate", "mkdir", "rmdir", "fsync folder")


@dataclass
class Fault:
    """The calls of one kind, from the `first` on (1 is the next), `times` of them, raise OSError(number)."""

    operation: str
    number: int
    first: int
    times: int


class FaultyDisk:
    """`with FaultyDisk(folder) as disk`: every file call of this process below the folder passes here.

    `counts` of operations by kind; `trash`: bytes that deleted and replaced files had, as Drive's Trash keeps them.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.counts, self.faults = os.path.realpath(root), Counter(), []
        self.room: int | None = None  # bytes that can still be written
        self.full_number, self.trash, self.log = errno.ENOSPC, 0, []
        self.numbers, self.fresh = {}, itertools.count()
        self.before = {p: self.number_of(p) for p in self._files()}
        self.bytes = {n: Path(p).read_bytes() for p, n in self.before.items()}
        self.folders = {str(p) for p in Path(self.root).rglob("*") if p.is_dir()}

    def fail(self, operation: str, number: int, *, first: int = 1, times: int = 1) -> None:
        """Let calls of a kind fail."""
        assert operation in OPERATIONS
        self.faults.append(Fault(operation, number, self.counts[operation] + first, times))

    def fill(self, room: int, number: int = errno.ENOSPC) -> None:
        """After that many more bytes the disk, or the quota, is full."""
        self.room, self.full_number = room, number

    def mend(self) -> None:
        """No fault any more, and room."""
        self.faults, self.room = [], None

    # ---- the layer ----------------------------------------------------------------------------------------------

    def __enter__(self) -> "FaultyDisk":
        self.stack, real = contextlib.ExitStack(), {}
        for name in ("open", "fsync", "rename", "replace", "link", "unlink", "remove", "truncate", "mkdir", "rmdir"):
            real[name] = getattr(os, name)
        self.real, self.real_open = real, builtins.open
        patches = [(os, "fsync", self._fsync), (os, "truncate", self._truncate), (builtins, "open", self._open),
                   (io, "open", self._open), (shutil, "_USE_CP_SENDFILE", False)]  # fmt: skip
        patches += [(os, name, self._renamer(name)) for name in ("rename", "replace")]
        patches += [(os, name, self._remover(name)) for name in ("unlink", "remove", "rmdir")]
        patches += [(os, "link", self._link), (os, "mkdir", self._mkdir)]
        for where, name, new in patches:
            self.stack.enter_context(mock.patch.object(where, name, new))
        return self

    def __exit__(self, *error: object) -> None:
        self.stack.close()

    def _files(self) -> list[str]:
        return [str(p) for p in Path(self.root).rglob("*") if p.is_file()]

    def number_of(self, path: str) -> int:
        """A number of this file that is never used again, as inode numbers are."""
        return self.numbers.setdefault(os.stat(path).st_ino, next(self.fresh))

    def _mine(self, path: object) -> str | None:
        if isinstance(path, int):
            return None
        path = os.path.join(os.path.realpath(os.path.dirname(os.path.abspath(path))), os.path.basename(path))
        return path if path.startswith(self.root + os.sep) or path == self.root else None

    def _meet(self, operation: str) -> None:
        self.counts[operation] += 1
        for f in self.faults:
            if f.operation == operation and f.first <= self.counts[operation] < f.first + f.times:
                raise OSError(f.number, os.strerror(f.number))

    def _open(self, path, mode="r", buffering=-1, encoding=None, errors=None, newline=None, **kwargs):
        mine = self._mine(path)
        if mine is None or not set(mode) & set("wax+"):
            return self.real_open(path, mode, buffering, encoding, errors, newline, **kwargs)
        there = os.path.exists(mine)
        if "w" in mode or not there:
            self._meet("create")
        raw = _Raw(self, mine, mode.replace("b", "").replace("t", ""))
        if not there:
            self.numbers.pop(os.stat(mine).st_ino, None)
            number = self.number_of(mine)
            self.bytes[number] = b""
            self.log.append(("create", mine, number))
        elif "w" in mode:
            self.log.append(("cut", self.number_of(mine), 0))
        if buffering == 0:
            return raw
        binary = (io.BufferedRandom if "+" in mode else io.BufferedWriter)(raw)
        return binary if "b" in mode else io.TextIOWrapper(binary, encoding or "utf-8", errors, newline)

    def _write(self, raw: "_Raw", data: bytes) -> int:
        self._meet("write")
        if self.room is not None and len(data) > self.room:
            fits, self.room = self.room, 0
            if fits == 0:
                raise OSError(self.full_number, os.strerror(self.full_number))
            data = data[:fits]  # as the kernel does: the next call gets the error
        elif self.room is not None:
            self.room -= len(data)
        at = os.fstat(raw.fileno()).st_size if "a" in raw.how else raw.tell()
        written = io.FileIO.write(raw, data)
        self.log.append(("write", self.number_of(raw.path), at, bytes(data[:written])))
        return written

    def _fsync(self, fd: int) -> None:
        path = self._mine(os.readlink(f"/proc/self/fd/{fd}"))
        if path is None:
            return self.real["fsync"](fd)
        folder = os.path.isdir(path)
        self._meet("fsync folder" if folder else "fsync")
        self.log.append(("sync folder", path) if folder else ("sync", self.number_of(path)))
        return None  # nothing here survives a power cut of this machine, and it takes milliseconds

    def _renamer(self, name: str):
        def rename(source, target, **kwargs):
            a, b = self._mine(source), self._mine(target)
            if a is None or b is None:
                return self.real[name](source, target, **kwargs)
            self._meet("rename")
            if os.path.isfile(b):
                self.trash += os.stat(b).st_size
            number = self.number_of(a) if os.path.isfile(a) else None
            self.real[name](source, target, **kwargs)
            self.log.append(("rename", a, b, number))

        return rename

    def _link(self, source, target, **kwargs) -> None:
        a, b = self._mine(source), self._mine(target)
        if a is None or b is None:
            return self.real["link"](source, target, **kwargs)
        self._meet("link")
        self.real["link"](source, target, **kwargs)
        self.log.append(("create", b, self.number_of(a)))

    def _remover(self, name: str):
        def remove(path, **kwargs):
            mine = self._mine(path) if kwargs.get("dir_fd") is None else None
            if mine is None:
                return self.real[name](path, **kwargs)
            self._meet("rmdir" if name == "rmdir" else "unlink")
            size = os.stat(mine).st_size if os.path.isfile(mine) and os.stat(mine).st_nlink == 1 else 0
            self.real[name](path, **kwargs)
            self.trash += size
            self.log.append(("remove", mine))

        return remove

    def _truncate(self, path, length: int) -> None:
        mine = self._mine(path)
        if mine is None:
            return self.real["truncate"](path, length)
        self._meet("truncate")
        self.real["truncate"](path, length)
        self.log.append(("cut", self.number_of(mine), length))

    def _mkdir(self, path, *args, **kwargs) -> None:
        mine = self._mine(path) if kwargs.get("dir_fd") is None else None
        if mine is None:
            return self.real["mkdir"](path, *args, **kwargs)
        if not os.path.isdir(mine):
            self._meet("mkdir")
        self.real["mkdir"](path, *args, **kwargs)
        self.log.append(("mkdir", mine))

    # ---- the power cut ------------------------------------------------------------------------------------------

    def after_power_cuts(self) -> Iterator[tuple[int, dict[str, bytes]]]:
        """(how many operations had been done, files by path below the folder) for each moment and each way it can end.

        Of a file's bytes that were not fsynced nothing, half or all survives; of the names that were not, each choice.
        """
        for moment in range(len(self.log) + 1):
            yield from ((moment, files) for files in self._cut(self.log[:moment]))

    def _cut(self, log: list[tuple]) -> Iterator[dict[str, bytes]]:
        now = dict(self.bytes)
        sure = {n: self.bytes[n] for n in self.before.values()}
        for op in log:
            if op[0] == "write":
                _, number, at, data = op
                old = now.get(number, b"")
                now[number] = old[:at].ljust(at, b"\0") + data + old[at + len(data) :]
            elif op[0] == "cut":
                now[op[1]] = now.get(op[1], b"")[: op[2]].ljust(op[2], b"\0")
            elif op[0] == "create":
                now.setdefault(op[2], b"")
            elif op[0] == "sync":
                sure[op[1]] = now[op[1]]
        names = [(i, op) for i, op in enumerate(log) if op[0] in ("create", "rename", "remove", "mkdir")]
        synced = {(i, op[1]) for i, op in enumerate(log) if op[0] == "sync folder"}

        def is_sure(i: int, op: tuple) -> bool:
            folder = os.path.dirname(op[2] if op[0] == "rename" else op[1])
            return any(j > i and path == folder for j, path in synced)

        pending = [i for i, op in names if not is_sure(i, op)]
        for lost in _choices(pending):
            places = dict(self.before)
            folders = set(self.folders)
            for i, op in names:
                if i not in lost:
                    _apply(op, places, folders)
            root = self.root + os.sep
            kept = {
                p: n
                for p, n in places.items()
                if all(str(f) in folders for f in Path(p).parents if str(f).startswith(root))
            }
            for share in (0.0, 0.5, 1.0):
                yield {p[len(root) :]: _partly(sure.get(n, b""), now.get(n, b""), share) for p, n in kept.items()}


def _apply(op: tuple, places: dict[str, int], folders: set[str]) -> None:
    if op[0] == "create":
        places[op[1]] = op[2]
    elif op[0] == "mkdir":
        folders.add(op[1])
    elif op[0] == "remove":
        places.pop(op[1], None)
        folders.discard(op[1])
    elif op[3] is not None:
        places.pop(op[1], None)
        places[op[2]] = op[3]
    else:
        for held in [p for p in (*places, *folders) if p == op[1] or p.startswith(op[1] + os.sep)]:
            moved = op[2] + held[len(op[1]) :]
            if held in places:
                places[moved] = places.pop(held)
            else:
                folders.discard(held)
                folders.add(moved)


def _partly(sure: bytes, now: bytes, share: float) -> bytes:
    """What is left where `sure` was fsynced and `now` was written: a part of the change, from its beginning on."""
    if now.startswith(sure):
        return now[: len(sure) + int((len(now) - len(sure)) * share)]
    cut = int(len(now) * share)
    return now[:cut] + sure[cut:] if share < 1 else now


def _choices(pending: list[int]) -> Iterator[set[int]]:
    """Every subset of the last eight; of more the older ones are all there or all lost."""
    old, new = pending[:-8], pending[-8:]
    for n in range(len(new) + 1):
        for lost in itertools.combinations(new, n):
            yield set(lost)
            if old:
                yield {*old, *lost}


class _Raw(io.FileIO):
    """A file whose writes meet the disk's faults."""

    def __init__(self, disk: FaultyDisk, path: str, how: str) -> None:
        super().__init__(path, how)
        self.disk, self.how, self.path = disk, how, path

    def write(self, data) -> int:
        return self.disk._write(self, memoryview(data).cast("B"))

    def truncate(self, size=None) -> int:
        size = self.tell() if size is None else size
        self.disk._meet("truncate")
        self.disk.log.append(("cut", self.disk.number_of(self.path), size))
        return super().truncate(size)
