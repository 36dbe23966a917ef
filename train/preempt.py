"""Being told to stop: SIGTERM, Ctrl-C and a closed terminal ask the loop to save and leave."""

import os
import signal
import sys
from types import FrameType


class StopSignal:
    """Call it anywhere to ask whether to stop. A second signal leaves at once: what is committed stays committed."""

    def __init__(self) -> None:
        self.name: str | None = None
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup asked to be left alone
                signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.name is not None:
            os._exit(128 + number)
        self.name = signal.Signals(number).name
        # os.write: print can deadlock when the signal came in the middle of one
        os.write(sys.stderr.fileno(), f"\n{self.name}: saving, then stopping; once more to leave at once\n".encode())

    def seconds_left(self) -> float:
        """Of the grace between being told to stop and being killed."""
        return 30.0

    def __call__(self) -> bool:
        return self.name is not None
