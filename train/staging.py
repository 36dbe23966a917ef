"""Shards brought while training runs, in the order it will need them.

A remote shard is fetched by a few threads, each a range of bytes at a time, those of the shard needed first before all
others: one connection to an object store gives 30 to 100 MB/s, and the first step waits for the first shard alone. What
has arrived is kept in the cache's part file, hashed and unpacked on the way, and counts once every hash is right. Local
shards are verified, and unpacked where they are compressed, ahead of need in the same way.
"""

import errno
import functools
import io
import itertools
import logging
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future

import numpy as np

from cli.progress import Meter, count, duration
from store import drive, fs
from store.errors import DataError, StoreError
from store.shards import HEADER_BYTES, Shard, TokenShards
from train.shard_cache import ShardCache

FETCHERS = 8  # ranges under way at once
RANGE_BYTES = 4 << 20
UNPACKERS = 2  # shards under way at once: while one ends, the next one's bytes come
REPLACE_AHEAD = 2  # shards ahead of need for which others leave a full cache
TRIES = 3  # of a shard that arrives damaged

log = logging.getLogger(__name__)


class Staging:
    """Brings `tokens`' shards into memory (`preload`) or into mapped local files, from `begin` until `close`."""

    def __init__(self, tokens: TokenShards, *, preload: bool, limit: int | None) -> None:
        self.tokens, self.preload = tokens, preload
        self.remote = not fs.is_local(tokens.url) or drive.holds(fs.local_path(tokens.url))
        self.cache = ShardCache(tokens.cache, limit)
        self.arrays: dict[str, np.ndarray] = {}  # by the name of their shard
        self.failed: dict[str, BaseException] = {}
        self.changed = threading.Condition()
        self.broken: BaseException | None = None  # what ended a thread
        self.ended = False
        self._upcoming: deque[Shard] = deque()  # training reads the first one now; the others follow in this order
        self._demanded: list[Shard] = []  # what somebody waits for
        self._busy: dict[str, Shard] = {}
        self._turns, self._turn = itertools.count(), {}  # what was begun earlier is needed earlier
        self._arrived: dict[str, int] = {}  # stored bytes, of shards that are there and that are coming
        self._staged: dict[str, float] | None = None
        self._report: Callable[[], None] | None = None
        self._waited = False

    # ---- what training asks for -------------------------------------------------------------------------------------

    def begin(self, visits: Iterable[Shard]) -> None:
        """Start to bring the shards that will be read, in the order of `visits`; one may be visited again."""
        self._visits, self.begin_s = iter(visits), time.monotonic()
        self._upcoming.extend(itertools.islice(self._visits, 2 * len(self.tokens.shards)))  # each at least once
        self._jobs = _Jobs(FETCHERS if self.remote else 0)
        for _ in range(UNPACKERS):
            threading.Thread(target=self._work, daemon=True).start()

    def wait(self, shards: list[Shard], told_to_stop: Callable[[], bool]) -> bool:
        """Wait until those shards are there, and show how it goes. False when told to stop; raises what take() raises."""
        if not shards:
            return True
        names = [s.name for s in shards]
        with self.changed, Meter("load data", sum(s.stored_bytes for s in shards), "B") as meter:
            self._demanded += shards
            self.changed.notify_all()
            while any(n not in self.arrays for n in names) and not told_to_stop():
                self._raise_failed(names)
                self.changed.wait(0.1)
                meter.done = sum(self._arrived.get(n, 0) for n in names)
            meter.done = sum(self._arrived.get(n, 0) for n in names)
            self._demanded.clear()
            self._waited = self._staged is None
            return all(n in self.arrays for n in names)

    def take(self, shard: Shard) -> np.ndarray:
        """The tokens of a shard, as soon as they are there; the shards that were to be read before it are done with.

        Raises DataError for a shard that stays damaged, StoreError for one that cannot be had.
        """
        with self.changed:
            if shard in self._upcoming:
                while self._upcoming[0] != shard:
                    self._upcoming.popleft()
                    self._upcoming.extend(itertools.islice(self._visits, 1))
                    self.changed.notify_all()
            if shard.name not in self.arrays:
                self.failed.pop(shard.name, None)  # ahead of need it failed: perhaps somebody has mended it since
                self._demanded.append(shard)
                self.changed.notify_all()
                try:
                    while shard.name not in self.arrays:
                        self._raise_failed([shard.name])
                        self.changed.wait()
                finally:
                    self._demanded.remove(shard)
            return self.arrays[shard.name]

    def report(self, event: Callable[..., object]) -> None:
        """Call event("staged", seconds=…, bytes=…) once every shard that is still to be read is there."""

        def tell() -> None:
            event("staged", **self._staged)
            if self._waited:  # else the meter's line has said it
                n_bytes, seconds = self._staged["bytes"], self._staged["seconds"]
                print(f"staged     all data, {count(n_bytes)}B in {duration(seconds)}", flush=True)

        with self.changed:
            self._report = tell if self._staged is None else None
        if not self._report:
            tell()

    def close(self) -> None:
        """End the threads; what has arrived stays in the cache."""
        with self.changed:
            self.ended = True
            self.changed.notify_all()
        if hasattr(self, "_jobs"):
            self._jobs.close()

    def _raise_failed(self, names: list[str]) -> None:
        if self.ended:
            raise InterruptedError("staging has ended")
        if self.broken:
            raise StoreError(f"{self.cache.folder}: the cache of shards cannot be used: {self.broken}") from self.broken
        for name in names:
            if name in self.failed:
                raise self.failed[name]

    # ---- the threads ------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while shard := self._next_or_broken():
            array = error = None
            try:
                array = self._bring(shard)
            except BaseException as e:  # it must surface in the loop
                error = e
            with self.changed:
                del self._busy[shard.name]
                if self.ended:
                    return
                if error is None:
                    self.arrays[shard.name] = array
                    self._arrived[shard.name] = shard.stored_bytes
                else:
                    self.failed[shard.name] = error
                    if shard not in self._demanded:
                        log.warning(
                            "warning: %s; training goes on until it needs that shard, and tries again then", error
                        )
                del array
                tell = self._all_there()
                self.changed.notify_all()
            if tell:
                tell()

    def _all_there(self) -> Callable[[], None] | None:
        """Notes when nothing is missing any more; returns whom to tell it then."""
        if self._staged is not None or any(s.name not in self.arrays for s in self._upcoming):
            return None
        seconds = round(time.monotonic() - self.begin_s, 3)
        self._staged = {"seconds": seconds, "bytes": sum(self._arrived.values())}
        return self._report

    def _next_or_broken(self) -> Shard | None:
        try:
            return self._next()
        except BaseException as e:  # the cache cannot be looked at, say: nobody may wait for a thread that is gone
            with self.changed:
                self.broken = e
                self.changed.notify_all()
            return None

    def _next(self) -> Shard | None:
        """The next shard to work on, as soon as there is one; None at the end."""
        with self.changed:
            while not self.ended:
                for need, shard in enumerate([*self._demanded, *self._upcoming]):
                    if shard.name in self.arrays or shard.name in self._busy:
                        continue
                    if shard.name in self.failed or not self._fits(shard, need):
                        break  # nothing after it either: it would only have to make room, or to fail in turn
                    self._busy[shard.name] = shard
                    self._turn[shard.name] = next(self._turns)
                    return shard
                self.changed.wait()
            return None

    # ---- room -------------------------------------------------------------------------------------------------------

    def _fits(self, shard: Shard, need: int) -> bool:
        """Make room for a shard in the cache; what training waits for, or is about to read, comes in any case."""
        if self.cache.limit is None or not self._kept:
            return True
        soonest: dict[str, int] = {}
        for at, s in enumerate(self._upcoming):
            if not (self.preload and s.name in self.arrays):  # what is in memory is not read from the disk again
                soonest.setdefault(self.cache.key(s), at)
        at, never = max(need - len(self._demanded), 0), len(self._upcoming) + 1
        together = [*self._busy.values(), shard, *self._demanded]
        fits, gone = self.cache.make_room(
            {self.cache.key(s): 0 if s.name in self.arrays else self._takes(s) for s in together},
            worth=lambda key: -soonest.get(key, never),
            # what is needed later than this one; but far ahead of need only what is needed no more at all: by the time
            # of need there is something that can better be spared
            below=-at if at <= REPLACE_AHEAD else -len(self._upcoming),
        )
        if not self.preload:
            for s in self.tokens.shards:
                if self.cache.key(s) in gone:
                    self.arrays.pop(s.name, None)
        return fits or at == 0

    @property
    def _kept(self) -> bool:
        """Whether shards take room in the cache: those that are fetched, or unpacked to be mapped."""
        return self.remote or (not self.preload and any(s.name.endswith(".zst") for s in self.tokens.shards))

    def _takes(self, shard: Shard) -> int:
        """The most bytes that a shard takes in the cache while it is brought."""
        raw = 0 if self.preload else HEADER_BYTES + shard.tokens * self.tokens.dtype.itemsize
        return raw + (shard.stored_bytes if self.remote else 0)

    # ---- one shard --------------------------------------------------------------------------------------------------

    def _bring(self, shard: Shard) -> np.ndarray:
        """The verified tokens of a shard. What arrived damaged is dropped and fetched again."""
        if not self.remote and (self.preload or not shard.name.endswith(".zst")):
            return self.tokens.load(shard, preload=self.preload)  # read, or mapped, where it lies
        path = self.cache.part_path(shard)
        try:
            with self.cache.part(shard, lambda: self.ended) as part:
                copy = self.tokens.copied(shard)
                if copy is not None and self.preload:
                    copy = np.array(copy)
                for tries_left in reversed(range(TRIES if self.remote and copy is None else 1)):
                    try:
                        if copy is None:
                            stored = (lambda: self._stored(shard, part)) if self.remote else None
                            copy = self.tokens.load(shard, preload=self.preload, stored=stored)
                        break
                    except DataError:
                        part.truncate(0)
                        if not tries_left:
                            path.unlink(missing_ok=True)
                            raise
                if not (self.preload and self.remote):  # there it is what a restart reads
                    path.unlink(missing_ok=True)
                return copy
        except OSError as e:
            if e.errno in (errno.ENOSPC, errno.EDQUOT):
                raise StoreError(f"{self.cache.folder}: no space left for shard {shard.name}: free some, name a larger "
                                 "disk with --cache, or bound it with --cache-limit") from e  # fmt: skip
            raise StoreError(f"{self.cache.folder}: cannot keep shard {shard.name} there: {e.strerror}") from e

    def _stored(self, shard: Shard, part: io.FileIO) -> "_Arriving":
        url, turn = fs.join(self.tokens.url, shard.name), self._turn[shard.name]

        def ask(begin: int, end: int) -> Future[bytes]:
            return self._jobs.submit(turn, lambda: _fetch(url, begin, end))

        def on_bytes(n: int) -> None:
            self._arrived[shard.name] = n

        return _Arriving(part, shard.stored_bytes, RANGE_BYTES if self._serves_ranges else None, ask, on_bytes)

    @functools.cached_property
    def _serves_ranges(self) -> bool:
        """A plain web server may not: then each shard comes whole, and a killed fetch begins again."""
        url = fs.join(self.tokens.url, self.tokens.shards[0].name)
        return not url.startswith("http") or len(fs.read_bytes(url, 0, 1)) == 1


class StagedShards:
    """The shards of one split: `lengths` in tokens, known from the start; `[i]` waits until its tokens are there."""

    def __init__(self, staging: Staging, shards: list[Shard]) -> None:
        self.staging, self.shards = staging, shards
        self.lengths = [s.tokens for s in shards]

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, i: int) -> np.ndarray:
        return self.staging.take(self.shards[i])


class _Arriving(io.RawIOBase):
    """A shard's stored bytes, front to back: what its part file has, then what is fetched and appended to it."""

    def __init__(
        self, part: io.FileIO, n_bytes: int, range_bytes: int | None,
        ask: Callable[[int, int], Future[bytes]], on_bytes: Callable[[int], None],
    ) -> None:  # fmt: skip
        self.part, self.n_bytes, self.ask, self.on_bytes = part, n_bytes, ask, on_bytes
        self.range_bytes = range_bytes or max(n_bytes, 1)
        self.kept = part.seek(0, io.SEEK_END)
        if self.kept > n_bytes or (range_bytes is None and self.kept < n_bytes):
            part.truncate(0)
            self.kept = 0
        part.seek(0)
        self.at, self.asked_to = 0, self.kept
        self.asked: deque[Future[bytes]] = deque()
        self.piece = memoryview(b"")
        self._ask_ahead()

    def _ask_ahead(self) -> None:
        while self.asked_to < self.n_bytes and len(self.asked) < FETCHERS:
            end = min(self.asked_to + self.range_bytes, self.n_bytes)
            self.asked.append(self.ask(self.asked_to, end))
            self.asked_to = end

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        if self.at < self.kept:
            n = self.part.readinto(memoryview(buffer)[: self.kept - self.at])
        else:
            if not self.piece and self.asked:
                self.piece = unwritten = memoryview(self.asked.popleft().result())
                self._ask_ahead()
                while unwritten:  # a raw file takes what fits, and says so only when nothing does
                    unwritten = unwritten[self.part.write(unwritten) :]
            n = min(len(self.piece), len(buffer))
            buffer[:n], self.piece = self.piece[:n], self.piece[n:]
        self.at += n
        self.on_bytes(self.at)
        return n

    def close(self) -> None:
        while self.asked:
            self.asked.popleft().cancel()
        super().close()


def _fetch(url: str, begin: int, end: int) -> bytes:
    """The bytes [begin, end). Raises DataError when fewer come again and again."""
    for _ in range(TRIES):
        data = fs.read_bytes(url, begin, end)
        if len(data) == end - begin:
            return data
    raise DataError(f"{fs.redact(url)}: gives {len(data)} bytes where {end - begin} were asked for: copy it again")


class _Jobs:
    """Threads that do what is submitted, of the lowest turn first. They are daemons: a hanging request delays no exit.

    A filesystem object is made in the thread that uses it (store/fs.py): gcsfs is neither thread- nor fork-safe.
    """

    def __init__(self, n_threads: int) -> None:
        self.waiting: queue.PriorityQueue = queue.PriorityQueue()
        self.numbers, self.ended = itertools.count(), False
        for _ in range(n_threads):
            threading.Thread(target=self._work, daemon=True).start()

    def submit(self, turn: int, work: Callable[[], bytes]) -> Future[bytes]:
        future: Future[bytes] = Future()
        self.waiting.put((turn, next(self.numbers), future, work))
        if self.ended:
            future.cancel()
        return future

    def close(self) -> None:
        """What has not been begun fails with CancelledError, now and from now on."""
        self.ended = True
        self._put_end()

    def _put_end(self) -> None:
        self.waiting.put((math.inf, next(self.numbers), None, None))  # after all jobs

    def _work(self) -> None:
        while True:
            _, _, future, work = self.waiting.get()
            if future is None:
                return self._put_end()  # for the other threads
            if self.ended:
                future.cancel()
            elif future.set_running_or_notify_cancel():
                try:
                    future.set_result(work())
                except BaseException as e:  # raised where the bytes are asked for
                    future.set_exception(e)
