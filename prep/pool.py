"""Run pure tasks in a pool of processes, results in the order of the tasks, whatever finishes first."""

import contextlib
import gc
import itertools
import multiprocessing
import os
import queue
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Protocol, TypeVar

from cli.errors import Unfinished
from cli.flags import quiet_drivers
from cli.memory import keep_freed_memory

T = TypeVar("T")

# One process per core already: the engines' own threads would only fight. (fastokens 0.3.5 begins another one whatever
# Rayon is told, and two of them take 1.5 times the CPU time of one for the same text.)
WORKER_ENVIRONMENT = {"RAYON_NUM_THREADS": "1", "FASTOKENS_BPE_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


class Executor(Protocol):
    """What a pass needs of whatever runs its tasks: `with executor as pool: for result in pool.run(work, tasks)`."""

    workers: int

    def __enter__(self) -> "Executor": ...

    def __exit__(self, kind: object, error: object, trace: object) -> None: ...

    def run(self, work: Callable[..., T], tasks: Iterable[tuple[Any, ...]]) -> Iterator[T]:
        """`work(*task)` for each task, in order, a bounded number under way, the first ones from now on.

        What a task raises is raised.
        """


def usable_cpus() -> int:
    """CPUs this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_order(
    start: Callable[[Any], Any], result: Callable[[Any], T], tasks: Iterable[Any], under_way: int
) -> Iterator[T]:
    """`result(start(task))` of each task, in order, with at most `under_way` started and not yet given out.

    The first ones are started here and now, before any result is asked for.
    """
    tasks = iter(tasks)
    started = deque(map(start, itertools.islice(tasks, under_way)))

    def results() -> Iterator[T]:
        while started:
            yield result(started.popleft())
            started.extend(map(start, itertools.islice(tasks, 1)))

    return results()


# Ctrl-C and a closed terminal reach every process of it: the parent answers for all
PARENTS_SIGNALS = (signal.SIGINT, signal.SIGHUP)


# Python looks for cycles whenever 700 objects are new: cutting a task of conversations makes 100,000, none of them in a
# cycle, and took a third less time without; memory did not grow
GARBAGE_EVERY = 1_000_000


def _start_worker() -> None:
    gc.set_threshold(GARBAGE_EVERY)
    for number in PARENTS_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, PARENTS_SIGNALS)
    os.environ.update(WORKER_ENVIRONMENT)
    keep_freed_memory()  # cleaning goes from 33 to 41 MB/s a core
    quiet_drivers()
    parent = multiprocessing.parent_process()
    # a killed parent must not leave workers behind: they would hold memory, and files that are to be written again
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _start_method() -> str:
    """ "fork" where no other thread can hold what a copy of this process would wait for: workers then import nothing.

    Else "spawn": a quarter of a second of every core. gcsfs has a thread from the first address that it looks at.
    """
    return "fork" if sys.platform == "linux" and threading.active_count() == 1 else "spawn"


class Pool:
    """The executor of one machine: the same processes, started here and now, serve every pass.

    One worker means this process.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        if workers == 1:
            keep_freed_memory()
            self.executor = None
            return
        context = multiprocessing.get_context(_start_method())
        self.executor = ProcessPoolExecutor(workers, context, _start_worker)
        try:
            self._submit(os.getpid)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers, whatever they do."""
        if self.executor is None:
            return
        # Nothing is waited for: after an error or a signal the next run does again what a pure task had half done, and at
        # the end a worker has nothing left but to take its memory down, for 0.2 s
        for worker in multiprocessing.active_children():
            worker.kill()
        self.executor.shutdown(wait=True, cancel_futures=True)

    def run(self, work: Callable[..., T], tasks: Iterable[tuple[Any, ...]]) -> Iterator[T]:
        """`work(*task)` for each task, in order, at most 2 tasks per worker under way. What a task raises is raised."""
        if self.executor is None:
            return itertools.starmap(work, tasks)
        return in_order(lambda task: self._submit(work, *task), _result, tasks, under_way=2 * self.workers)

    def _submit(self, work: Callable[..., T], *task: Any) -> Future:
        # This may start a worker, which takes a moment until it ignores signals: they are held back from it until then, as
        # they are from whoever starts it.
        held = signal.pthread_sigmask(signal.SIG_BLOCK, PARENTS_SIGNALS)
        try:
            with _a_lost_worker_explained():
                return self.executor.submit(work, *task)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, held)


def _result(future: Future) -> Any:
    with _a_lost_worker_explained():
        return future.result()


@contextlib.contextmanager
def _a_lost_worker_explained() -> Iterator[None]:
    try:
        yield
    except BrokenProcessPool as e:
        raise Unfinished("a worker process was killed, most often for lack of memory: "
                         "run the same command with --resume and fewer --workers") from e  # fmt: skip


def in_threads(work: Callable[[Any], T], items: Iterable[Any], *, threads: int) -> Iterator[T]:
    """`work(item)` for each item, in order, while the next items are being made: for what waits on a disk or a network.

    At most `threads` items wait or are worked on. What `work` raises is raised. The threads are daemons, so that a
    program which stops does not stay for a slow upload.
    """
    jobs: queue.SimpleQueue = queue.SimpleQueue()

    def serve() -> None:
        while (job := jobs.get()) is not None:
            future, item = job
            try:
                future.set_result(work(item))
            except BaseException as e:  # handed to whoever asks for the result
                future.set_exception(e)

    def start(item: Any) -> Future:
        future: Future = Future()
        jobs.put((future, item))
        return future

    for _ in range(threads):
        threading.Thread(target=serve, daemon=True).start()
    try:
        yield from in_order(start, Future.result, items, under_way=threads)
    finally:
        with contextlib.suppress(queue.Empty):  # what has not begun never does
            while True:
                jobs.get_nowait()
        for _ in range(threads):
            jobs.put(None)
