"""How long this process has run. Durations never come from the wall clock, which people and NTP move."""

import os
import time
from pathlib import Path


def _start_s() -> float:
    """When this process began, on the clock of time.monotonic: its imports, which take seconds, are part of what it ran."""
    now_s = time.monotonic()
    try:
        fields = Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()  # the name before it may hold anything
        ran_s = time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError, IndexError):  # not Linux: count from here
        return now_s
    return now_s - max(ran_s, 0.0)


START_S = _start_s()


def up_s() -> float:
    """Seconds since this process began."""
    return time.monotonic() - START_S
