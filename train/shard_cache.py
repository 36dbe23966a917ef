"""The cache of shards on this machine: raw copies and partly fetched ones, shared by processes, bounded if asked.

    FOLDER/0f3a…-train-00000.bin            a raw copy, memory-mapped; it appears only once verified
    FOLDER/0f3a…-train-00000.bin.zst.part   what has arrived of the stored shard: a killed fetch goes on from here

Names begin with the hash of what the shard must be, so another dataset's files are never taken for this one's. A process
that works on a shard locks its part file. Files that others have mapped may be removed: they keep what they have mapped.
"""

import contextlib
import fcntl
import math
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from store.shards import Shard

KEY = re.compile(r"\.?([0-9a-f]{20}-(?:train|val)-[0-9]+)\.bin")


class ShardCache:
    """`limit` is the most bytes that its files should take, None for no limit."""

    def __init__(self, folder: Path, limit: int | None) -> None:
        self.folder, self.limit = folder, limit

    def part_path(self, shard: Shard) -> Path:
        """Where the stored bytes of a shard are gathered."""
        return self.folder / f"{shard.sha256[:20]}-{shard.name}.part"

    def key(self, shard: Shard) -> str:
        """What the names of all its files begin with."""
        return _key(self.part_path(shard))

    @contextlib.contextmanager
    def part(self, shard: Shard, ended: Callable[[], bool]) -> Iterator[BinaryIO]:
        """A shard's part file, open for reading and appending, and this shard ours alone until the end of the block.

        Waits while another process works on the same shard, until `ended`.
        """
        path = self.part_path(shard)
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            file = open(path, "a+b", buffering=0)  # noqa: SIM115 - kept open beyond this block
            if _lock(file) and _is_at(file, path):  # else whoever had it has removed it: what we hold has no name
                break
            file.close()
            if ended():
                raise InterruptedError
            time.sleep(0.05)
        try:
            for other in self.folder.glob(".*.tmp"):
                if _key(other) == _key(path):  # left by a process that was killed while it unpacked
                    other.unlink(missing_ok=True)
            yield file
        finally:
            file.close()

    def make_room(
        self, reserved: dict[str, int], *, worth: Callable[[str], float], below: float
    ) -> tuple[bool, list[str]]:  # fmt: skip
        """(whether what is reserved fits now, the keys of the shards whose files were removed for it).

        A key is what the names of a shard's files begin with. `reserved` tells what each shard that is worked on will take;
        the others go, those worth least first, while they are worth less than `below`.
        """
        gone: list[str] = []
        while self.limit is not None:
            held = self._held()
            sizes = {k: max(held.get(k, (0, 0))[0], reserved.get(k, 0)) for k in held.keys() | reserved.keys()}
            if sum(sizes.values()) <= self.limit:
                break
            others = held.keys() - reserved.keys() - set(gone)
            cheap = sorted((worth(k), held[k][1], k) for k in others if worth(k) < below)
            if not cheap:
                return False, gone
            gone.append(cheap[0][2])
            self._remove(gone[-1])
        return True, gone

    def _held(self) -> dict[str, tuple[int, float]]:
        """key -> (bytes on the disk, when it last changed)."""
        held: dict[str, tuple[int, float]] = {}
        with contextlib.suppress(FileNotFoundError):
            for entry in os.scandir(self.folder):
                if key := _key(Path(entry.name)):
                    with contextlib.suppress(FileNotFoundError):
                        stat = entry.stat()
                        size, oldest = held.get(key, (0, math.inf))
                        held[key] = (size + stat.st_size, min(oldest, stat.st_mtime))
        return held

    def _remove(self, key: str) -> None:
        """Remove what there is of a shard, unless another process works on it."""
        paths = [p for p in self.folder.iterdir() if _key(p) == key]
        with contextlib.ExitStack() as stack:
            for path in paths:
                if path.suffix == ".part":
                    with contextlib.suppress(FileNotFoundError):
                        if not _lock(stack.enter_context(open(path, "rb"))):
                            return
            for path in paths:
                path.unlink(missing_ok=True)


def _key(path: Path) -> str | None:
    m = KEY.match(path.name)
    return m and m[1]


def _lock(file: BinaryIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # a mount without locks: two processes that fetch one shard end in a wrong hash, and it is fetched again
    return True


def _is_at(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False
