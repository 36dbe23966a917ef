"""timing.js: how long each pass took, for report.html to show. The one file of a dataset that differs between runs."""

import json
import os
import platform

from cli.progress import Meter, count, duration

NAME = "timing.js"


def peak_memory(meters: list[Meter]) -> int:
    """Bytes that all processes together held at most during any of the passes."""
    return max((m.peak_memory for m in meters), default=0)


def timing_js(meters: list[Meter], *, elapsed_s: float, workers: int, resumed: bool) -> bytes:
    """The script that hands the page its table of passes and a sentence about the run and the machine."""
    passes = [[m.what, duration(m.elapsed_s), m.amount(), m.rate(), f"{count(m.peak_memory)}B"] for m in meters]
    about = (f"{duration(elapsed_s)} in all with {workers} worker{'s' * (workers != 1)}; at most {count(peak_memory(meters))}B of memory, "
             f"all processes together. {platform.system()} {platform.machine()}, {os.cpu_count()} CPUs, "
             f"Python {platform.python_version()}.")  # fmt: skip
    if resumed:
        about += " This run went on from an interrupted one: what that one did is in the amounts, but not in the times."
    return f"var perennial_timing = {json.dumps({'passes': passes, 'about': about}, indent=1)};\n".encode()
