"""A sign of life for whoever watches from outside: a file that is touched while training gets on.

As a program it is a container's health check: exit code 0 while the file is young, 1 when the trainer has not come round
for MOST_S. Nothing but the standard library, since it runs twice a minute beside the trainer.
"""

import contextlib
import os
import sys
import time
from pathlib import Path

NAME = "PERENNIAL_HEARTBEAT"
EVERY_S = 5.0
MOST_S = 900.0  # without a touch: compiling, staging and restoring take minutes


class Heartbeat:
    """Call it as often as you like. Touches the file that $PERENNIAL_HEARTBEAT names; without one it does nothing."""

    def __init__(self) -> None:
        self.path = Path(os.environ[NAME]) if os.environ.get(NAME) else None
        self.next_s = 0.0
        self()

    def __call__(self) -> None:
        if self.path is None or (now_s := time.monotonic()) < self.next_s:
            return
        self.next_s = now_s + EVERY_S
        with contextlib.suppress(OSError):  # no trainer stops because nobody can be told that it lives
            self.path.touch()


def age_s(path: Path) -> float | None:
    """Seconds since the file was touched; None where there is none."""
    try:
        return max(time.time() - path.stat().st_mtime, 0.0)
    except OSError:
        return None


def main() -> int:
    """Say how long ago the trainer came round."""
    path = os.environ.get(NAME)
    if not path:
        print(f"${NAME} names no file", file=sys.stderr)
        return 2
    age = age_s(Path(path))
    print("no sign of life yet" if age is None else f"the trainer came round {age:.0f} s ago")
    return 0 if age is not None and age <= MOST_S else 1


if __name__ == "__main__":
    sys.exit(main())
