"""Write a large file past the page cache, where the file system can.

A checkpoint is read again only after a failure, yet copying it into the page cache costs the cores (2.4 s of a core for
1.6 GB on a two-core VM, against 0.1 s past it) and drives out the dataset that training reads from there.
"""

import contextlib
import errno
import fcntl
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

BUFFER_BYTES = (
    4 << 20
)  # a multiple of every device's block; small enough that what was just hashed is copied from cache


class DirectFile:
    """A binary file to `write` to, from its beginning to its end, in pieces of any size. `close` or lose the last of them."""

    def __init__(self, path: Path) -> None:
        self.file = open(path, "wb", buffering=0)  # noqa: SIM115
        self.buffer = memoryview(mmap.mmap(-1, BUFFER_BYTES))  # in whole pages, as O_DIRECT wants its memory
        self.filled = 0
        self._switch(direct=True)

    def write(self, data: memoryview | bytes) -> None:
        """Take all of `data` (of bytes). Raises OSError where what came before could not be written."""
        data = memoryview(data)
        while len(data):
            n = min(len(data), BUFFER_BYTES - self.filled)
            self.buffer[self.filled : self.filled + n] = data[:n]
            self.filled += n
            data = data[n:]
            if self.filled == BUFFER_BYTES:
                self._flush()

    def finish(self) -> None:
        """Write what is left, of any length, which O_DIRECT cannot."""
        self._switch(direct=False)
        self._flush()

    def _flush(self) -> None:
        at = 0
        while at < self.filled:
            try:
                at += self.file.write(self.buffer[at : self.filled])
            except OSError as e:
                if e.errno != errno.EINVAL or not self.direct:
                    raise
                self._switch(direct=False)  # a stricter device, or a short write left it between two blocks
        self.filled = 0

    def _switch(self, *, direct: bool) -> None:
        """O_DIRECT on or off. macOS has none; tmpfs and many FUSE mounts refuse, and go on without."""
        self.direct, flag = False, getattr(os, "O_DIRECT", 0)
        with contextlib.suppress(OSError):
            flags = fcntl.fcntl(self.file, fcntl.F_GETFL)
            fcntl.fcntl(self.file, fcntl.F_SETFL, flags | flag if direct else flags & ~flag)
            self.direct = direct and flag != 0


@contextlib.contextmanager
def open_direct(path: Path) -> Iterator[DirectFile]:
    """A new file at `path`, complete when the block ends without an error; not yet fsynced."""
    file = DirectFile(path)
    with file.file:
        yield file
        file.finish()
