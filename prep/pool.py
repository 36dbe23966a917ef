"""Run pure tasks in a pool of processes, results in the order of the tasks, whatever finishes first."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from cli.errors import UserError

T = TypeVar("T")


def usable_cpus() -> int:
    """CPUs this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start_worker() -> None:
    # Ctrl-C reaches every process of a terminal: the parent answers for all
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["RAYON_NUM_THREADS"] = "1"  # one process per core already: the engines' own threads would only fight
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()
    # a killed parent must not leave workers behind: they would hold memory, and files that are to be written again
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


class Pool:
    """`with Pool(workers) as pool: for result in pool.run(work, tasks)`: the same processes serve every pass.

    One worker means this process. Workers are spawned, not forked: gcsfs is not fork-safe.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        # glibc gives each large buffer back to the kernel and pays its page faults again at the next task: kept instead,
        # cleaning goes from 33 to 41 MB/s a core. Read when a worker starts; other C libraries ignore it.
        for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"):
            os.environ.setdefault(name, str(1 << 30))
        context = multiprocessing.get_context("spawn")
        self.executor = ProcessPoolExecutor(workers, context, _start_worker) if workers > 1 else None

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if self.executor:
            self.executor.shutdown(wait=True, cancel_futures=True)

    def run(self, work: Callable[..., T], tasks: Iterable[tuple[Any, ...]]) -> Iterator[T]:
        """`work(*task)` for each task, in order, at most 2 tasks per worker under way. What a task raises is raised."""
        if self.executor is None:
            for task in tasks:
                yield work(*task)
            return
        under_way: deque = deque()
        try:
            for task in tasks:
                under_way.append(self.executor.submit(work, *task))
                if len(under_way) >= 2 * self.workers:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        except BrokenProcessPool as e:
            raise UserError("a worker process was killed, most often for lack of memory: "
                            "run the same command with --resume and fewer --workers") from e  # fmt: skip
