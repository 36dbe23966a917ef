"""A Google Drive in FUSE, as a program: `fuse_drive.py CLOUD CACHE MOUNT LAG_S`. Killing it is the mount that drops.

A write is in the cache at once and in the cloud a while after its file was closed; what never got there is gone with the
machine (the cache begins as a copy of the cloud). No hard links; deleted and replaced files go to CLOUD's Trash.
"""

import errno
import os
import shutil
import sys
import threading
import time
from pathlib import Path

import mfusepy as fuse


class Drive(fuse.Operations):
    """Every call is answered from the cache; a thread uploads."""

    use_ns = True

    def __init__(self, cloud: Path, cache: Path, lag_s: float) -> None:
        shutil.rmtree(cache, ignore_errors=True)
        shutil.copytree(cloud / "files", cache)
        self.cloud, self.cache, self.lag_s = cloud, cache, lag_s
        self.changed: dict[str, float] = {}
        self.guard = threading.Lock()

    def init(self, path: str) -> None:
        threading.Thread(target=self._upload, daemon=True).start()

    def _upload(self) -> None:
        while True:
            time.sleep(self.lag_s / 10)
            with self.guard:
                for path, at in list(self.changed.items()):
                    if time.monotonic() - at >= self.lag_s:
                        target = self.cloud / "files" / path[1:]
                        target.parent.mkdir(parents=True, exist_ok=True)
                        shutil.copyfile(self.cache / path[1:], target)
                        del self.changed[path]

    def _at(self, path: str) -> str:
        return f"{self.cache}{path}"

    def _to_trash(self, path: str) -> None:
        if os.path.isfile(self._at(path)):
            shutil.copyfile(self._at(path), self.cloud / "trash" / str(time.monotonic_ns()))
        (self.cloud / "files" / path[1:]).unlink(missing_ok=True)
        self.changed.pop(path, None)

    def getattr(self, path, fh=None):
        info = os.lstat(self._at(path))
        names = ("st_mode", "st_nlink", "st_uid", "st_gid", "st_size", "st_blocks")
        times = {f"st_{k}": getattr(info, f"st_{k}_ns") for k in ("atime", "mtime", "ctime")}
        return {n: getattr(info, n) for n in names} | times

    def readdir(self, path, fh):
        return [".", "..", *os.listdir(self._at(path))]

    def mkdir(self, path, mode):
        os.mkdir(self._at(path), mode)

    def rmdir(self, path):
        os.rmdir(self._at(path))

    def create(self, path, mode, fi=None):
        return self.open(path, os.O_CREAT | os.O_RDWR)

    def open(self, path, flags):
        return os.open(self._at(path), flags & ~os.O_APPEND, 0o644)

    def read(self, path, size, offset, fh):
        return os.pread(fh, size, offset)

    def write(self, path, data, offset, fh):
        self.changed[path] = float("inf")  # until it is closed
        return os.pwrite(fh, data, offset)

    def truncate(self, path, length, fh=None):
        os.truncate(self._at(path), length)
        self.changed[path] = time.monotonic()

    def release(self, path, fh):
        os.close(fh)
        with self.guard:
            if path in self.changed:
                self.changed[path] = time.monotonic()

    def fsync(self, path, datasync, fh):
        return 0  # of nothing

    def unlink(self, path):
        with self.guard:
            self._to_trash(path)
            os.unlink(self._at(path))

    def rename(self, old, new):
        with self.guard:
            self._to_trash(new)
            os.rename(self._at(old), self._at(new))
            source, target = self.cloud / "files" / old[1:], self.cloud / "files" / new[1:]
            if source.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                source.rename(target)
            if old in self.changed:
                self.changed[new] = self.changed.pop(old)

    def link(self, target, source):
        raise fuse.FuseOSError(errno.EOPNOTSUPP)

    def utimens(self, path, times=None):
        return 0

    def statfs(self, path):
        info = os.statvfs(self.cache)
        return {n: getattr(info, n) for n in ("f_bavail", "f_bfree", "f_blocks", "f_bsize", "f_frsize", "f_namemax")}

    def getxattr(self, path, name, position=0):
        if name != "user.drive.id" or not os.path.isfile(self._at(path)):
            raise fuse.FuseOSError(errno.ENODATA)
        return b"local-1" if path in self.changed else b"1kFdYcXq"


if __name__ == "__main__":
    cloud, cache, mount = map(Path, sys.argv[1:4])
    fuse.FUSE(Drive(cloud, cache, float(sys.argv[4])), str(mount), foreground=True)
