"""A file written past the page cache holds what was written, whatever the file system says to that."""

import errno
import os
import random
import shutil
import subprocess

import pytest

from store.direct import BUFFER_BYTES, open_direct


def write(path, raw, wrapped=lambda file: file):
    """`raw` in pieces of odd sizes."""
    pick, at = random.Random(1), 0
    with open_direct(path) as f:
        f.file = wrapped(f.file)
        while at < len(raw):
            size = pick.choice([1, 511, 4096, 70_001, 2 * BUFFER_BYTES])
            f.write(memoryview(raw)[at : at + size])
            at += size


@pytest.mark.parametrize("n", [0, 1, 4095, 4096, BUFFER_BYTES - 1, BUFFER_BYTES, 3 * BUFFER_BYTES + 511])
def test_pieces_of_any_size_make_the_file(tmp_path, n):
    raw = random.Random(n).randbytes(n)
    write(tmp_path / "file", raw)
    assert (tmp_path / "file").read_bytes() == raw


class Awkward:
    """Stands in for an open file: refuses or cuts short what is written to it, as real ones do."""

    def __init__(self, file, refuse=(), longest=1 << 30, full_after=None):
        self.file, self.refuse, self.longest, self.room = file, set(refuse), longest, full_after
        self.calls = 0

    def fileno(self):
        return self.file.fileno()

    def write(self, data):
        self.calls += 1
        if self.calls in self.refuse:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        if self.room is not None:
            if not self.room:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            data = data[: self.room]
            self.room -= len(data)
        return self.file.write(data[: self.longest])


@pytest.mark.parametrize("how", [{"refuse": [1]}, {"refuse": [2]}, {"longest": 1 << 20}, {"longest": 1_000_003}])
def test_a_device_that_refuses_or_takes_less_gets_all_of_it(tmp_path, how):
    raw = random.Random(5).randbytes(2 * BUFFER_BYTES + 77)
    write(tmp_path / "file", raw, lambda file: Awkward(file, **how))
    assert (tmp_path / "file").read_bytes() == raw


@pytest.mark.parametrize("room", [0, 4096, BUFFER_BYTES + 100, 2 * BUFFER_BYTES])
def test_a_full_disk_is_told(tmp_path, room):
    raw = random.Random(5).randbytes(2 * BUFFER_BYTES + 77)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "file", raw, lambda file: Awkward(file, full_after=room))


def test_the_page_cache_keeps_what_training_reads(tmp_path):
    if not shutil.which("fincore"):
        pytest.skip("no fincore here")
    raw = bytes(2 * BUFFER_BYTES + 77)
    write(tmp_path / "file", raw)
    (tmp_path / "cached").write_bytes(raw)
    with open(tmp_path / "file", "rb") as f:
        os.fsync(f.fileno())
    if subprocess.run(["stat", "-f", "-c", "%T", tmp_path], capture_output=True, text=True).stdout.strip() == "tmpfs":
        pytest.skip("a tmpfs is the page cache")
    cached = {name: int(subprocess.check_output(["fincore", "-n", "-b", "-o", "RES", tmp_path / name]))
              for name in ("file", "cached")}  # fmt: skip
    assert cached["cached"] >= len(raw)
    assert cached["file"] <= 4096  # the end that is no whole block
