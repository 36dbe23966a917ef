"""Google Drive as Colab mounts it: a lazy copy on this machine's own disk, a Trash that counts, a mount that drops.

`fsync` there returns long before anything is in the cloud. What is known of this mount, and from where: docs/storage.md.
"""

import contextlib
import errno
import os
import shutil
from pathlib import Path

MOUNT = Path(os.environ.get("PERENNIAL_DRIVE") or "/content/drive")
ID = "user.drive.id"  # the attribute with a file's id; one beginning "local" is not in the cloud yet


def holds(path: Path) -> bool:
    """True for a path on the Drive, mounted or not, through links too."""
    return _below(path) is not None


def _below(path: Path) -> Path | None:
    """The path as seen from the mount point."""
    for p in (path.absolute(), Path(os.path.realpath(path))):
        if p.is_relative_to(MOUNT):
            return p.relative_to(MOUNT)
    return None


def mounted(path: Path) -> bool:
    """Whether the Drive that holds a path is there: the first folder below its mount (`MyDrive`) is Drive's own."""
    return MOUNT.joinpath(*(_below(path) or Path()).parts[:1]).is_dir()


def require_mounted(path: Path) -> None:
    """Raises OSError (ENOTCONN) for a path on a Drive that is away: writing would fill the folder it is mounted on."""
    if holds(path) and not mounted(path):
        raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN), str(MOUNT))


def require_room(n_bytes: int) -> None:
    """Raises OSError (ENOSPC) where a file of that size cannot fit the mount, or this machine's disk that caches it."""
    for place, what in ((MOUNT, "on the Drive"), (Path.home(), "on this machine's disk, where Drive keeps its cache")):
        with contextlib.suppress(FileNotFoundError, PermissionError):
            if shutil.disk_usage(place).free < n_bytes:
                raise OSError(errno.ENOSPC, f"no space left {what}", str(place))


def discard(path: Path) -> None:
    """Remove a file for good: cut to nothing first, for a deleted file goes to the Trash and still fills the quota."""
    with contextlib.suppress(FileNotFoundError):
        if holds(path) and path.is_file():
            os.truncate(path, 0)
        path.unlink()


def uploaded(path: Path) -> bool | None:
    """Whether a file has reached the cloud, by the id that Drive gave it; None where none is told. Raises nothing."""
    try:
        return not os.getxattr(path, ID).startswith(b"local")
    except (OSError, AttributeError):  # no such attribute, no such file; macOS has no getxattr
        return None
