"""glibc's memory, for processes that need the same large buffers again and again."""

import contextlib
import ctypes

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h


def keep_freed_memory() -> None:
    """Have glibc keep what is freed for its next use, instead of giving large buffers back to the kernel each time.

    The kernel zeroes them page by page when they come back: 1 ms a MB on a virtual machine. Other C libraries are left
    as they are.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
