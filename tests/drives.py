"""Two Google Drives for tests: one in FUSE, and its twin in this process for machines that have none.

Both answer a write from this machine's cache and bring a file to the cloud LAG_S after it was last written; what is not
there yet is lost with the mount. No hard links; what is deleted or replaced goes to the Trash.
"""

import errno
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest

from tests.faulty_disk import FaultyDisk

LAG_S = 0.3
PROGRAM = Path(__file__).parent / "fuse_drive.py"


def run(*command: object) -> bool:
    """Whether this machine has the program, and lets us."""
    try:
        return subprocess.run([str(c) for c in command], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


class FuseDrive:
    """tests/fuse_drive.py as a process, mounted. Needs Linux, libfuse, /dev/fuse and root."""

    def __init__(self, folder: Path) -> None:
        if not os.path.exists("/dev/fuse") or os.geteuid() != 0:
            pytest.skip("no /dev/fuse here, or not root")
        try:
            pytest.importorskip("mfusepy")
        except OSError:
            pytest.skip("no libfuse here")
        self.cloud, self.cache, self.mount = (folder / n for n in ("cloud", "cache", "mount"))
        for name in (self.cloud / "files" / "MyDrive", self.cloud / "trash", self.mount):
            name.mkdir(parents=True)
        self.begin()

    def begin(self) -> None:
        """Mount what the cloud has."""
        program = [sys.executable, PROGRAM, self.cloud, self.cache, self.mount, LAG_S]
        self.process = subprocess.Popen([str(p) for p in program], stderr=subprocess.DEVNULL)
        deadline_s = time.monotonic() + 10
        while not os.path.ismount(self.mount) and self.process.poll() is None and time.monotonic() < deadline_s:
            time.sleep(0.02)
        if not os.path.ismount(self.mount):
            pytest.skip("this machine lets nobody mount")

    def drop(self) -> None:
        """Every call under the mount fails with error 107 from now on."""
        self.process.kill()
        self.process.wait()

    def unmount(self) -> None:
        """The folder under the mount is there again, empty: what drive.mount does first, and a new machine has."""
        self.drop()
        run("umount", "-l", self.mount)

    def trash_bytes(self) -> int:
        """What the Trash takes of the quota."""
        return sum(p.stat().st_size for p in (self.cloud / "trash").iterdir())

    close = unmount


class TwinDrive(FaultyDisk):
    """The same as a layer under the file calls of this process, which alone sees it."""

    def __init__(self, folder: Path) -> None:
        self.cloud, self.mount = folder / "cloud", folder / "mount"
        for name in (self.cloud / "MyDrive", self.mount):
            name.mkdir(parents=True)
        super().__init__(self.mount)
        self.fail("link", errno.EOPNOTSUPP, times=1_000_000)
        self.dropped_s: float | None = None
        self.__enter__()
        for name in ("stat", "lstat", "scandir", "listdir", "statvfs", "getxattr"):
            self.stack.enter_context(mock.patch.object(os, name, self._reader(getattr(os, name))))
        self.begin()

    def _away(self, path: object) -> bool:
        mine = isinstance(path, str | os.PathLike) and os.path.abspath(path).startswith(self.root)
        return mine and self.dropped_s is not None

    def _reader(self, real):
        def read(path=".", *args, **kwargs):
            if self._away(path):
                raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN), str(path))
            if real.__name__ == "getxattr":
                return b"1kFdYcXq" if time.time() - os.stat(path).st_mtime > LAG_S else b"local-1"
            return real(path, *args, **kwargs)

        return read

    def _meet(self, operation: str) -> None:
        if self.dropped_s is not None:
            raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))
        super()._meet(operation)

    def _open(self, path, *args, **kwargs):
        if self._away(path):
            raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN), str(path))
        return super()._open(path, *args, **kwargs)

    def begin(self) -> None:
        """See FuseDrive."""
        shutil.copytree(self.cloud, self.mount, dirs_exist_ok=True)
        self.mounted = True

    def drop(self) -> None:
        """See FuseDrive."""
        self.dropped_s = self.dropped_s or time.time()

    def unmount(self) -> None:
        """See FuseDrive."""
        if not self.mounted:
            return
        self.drop()
        left = self.mount.parent / f"left-{next(self.fresh)}"  # at once: other threads write there
        self.real["rename"](self.mount / "MyDrive", left)
        gone_s, self.dropped_s, self.mounted = self.dropped_s, None, False
        files = {p.relative_to(left): p for p in left.rglob("*") if p.is_file()}
        for name, path in files.items():
            if gone_s - path.stat().st_mtime > LAG_S:
                arrived = self.cloud / "MyDrive" / name
                arrived.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, arrived)
        for path in [p for p in self.cloud.rglob("*") if p.is_file()]:
            if path.relative_to(self.cloud / "MyDrive") not in files:
                path.unlink()

    def trash_bytes(self) -> int:
        """See FuseDrive."""
        return self.trash

    def close(self) -> None:
        """Take the layer away."""
        self.dropped_s = None
        self.__exit__()
