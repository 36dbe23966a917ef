"""One rank of several, for tests: RANK=0 WORLD_SIZE=2 … python -m tests.rank CODES JOBS.

JOBS is a JSON list of {"flags": […]}, done one after another in this process, as importing torch takes longer than any of
them; with "fault": [rank, call, what] that rank gets, in its train_step of that number, a SIGTERM (`stop`), no memory
(`memory`) or, from then on, a gradient that is no number (`nan`). CODES is the file for what each ended with: an exit code, or the line of a user's error.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from cli.errors import USER_ERRORS
from tests.helpers import train
from train import run


def faulty(rank: int, call: int, what: str) -> object:
    """run.train_step with the fault."""
    real, calls = run.train_step, 0

    def train_step(*args: object, **options: object) -> object:
        nonlocal calls
        calls += 1
        if rank == int(os.environ["RANK"]) and calls == call:
            if what == "memory":
                raise torch.OutOfMemoryError("CUDA out of memory")
            if what == "nan":
                args[0].ln_f.weight.register_hook(lambda g: g * float("nan"))
            else:
                os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **options)

    return train_step


def main(codes: str, jobs: str) -> None:
    """Do the jobs."""
    ends, real = [], run.train_step
    for job in json.loads(jobs):
        run.train_step = faulty(*job["fault"]) if "fault" in job else real
        try:
            ends.append(train(*job["flags"]))
        except USER_ERRORS as e:
            ends.append(str(e))
        if dist.is_initialized():
            dist.destroy_process_group()
        Path(codes).write_text(json.dumps(ends))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
    os._exit(0)
