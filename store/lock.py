"""One writer per folder on one machine: a lock file held for the life of the process, let go however it ends."""

import fcntl
import os
import socket
from pathlib import Path
from typing import BinaryIO

from store.errors import StoreError
from store.fs import make_folder
from store.retry import attempt

_held: list[BinaryIO] = []


def hold(path: Path, *, shared: bool = False) -> str:
    """Take a local lock file for the rest of this process's life. Raises StoreError when another process has it.

    Any number of processes can hold one `shared`; then none can hold it alone. Returns what names this lock among all
    machines and boots: whoever held the same before is gone. Empty on a mount without locks, which proves nothing.
    """

    def work() -> BinaryIO:
        make_folder(path.parent)
        return open(path, "ab+")  # NFS gives a shared lock only to who may read

    lock = attempt(str(path), "write", work)
    try:
        fcntl.flock(lock, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError as e:
        lock.close()
        raise StoreError(f"{path.parent}: another process is writing there: wait for it or stop it") from e
    except OSError:
        lock.close()  # a mount without locks (Drive): nothing to hold on to
        return ""
    _held.append(lock)
    info = os.fstat(lock.fileno())
    return f"{_boot_id()}:{info.st_dev}:{info.st_ino}"


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # macOS: its host name is the best there is
        return socket.gethostname()


def let_go() -> None:
    """Give back every lock of this process: for programs that run in one process after another, as tests do."""
    while _held:
        _held.pop().close()
