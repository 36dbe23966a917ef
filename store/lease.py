"""One run, one writer, on any number of machines: a numbered lease that only its holder renews.

    OUT/leases/00000007.json   {epoch, holder, lock, host, beat, time, released, …what the holder tells}

Each start of a writer creates the next number exclusively, so an epoch has one holder for ever and the newest number is
the run's writer. Nothing here trusts a listing, which can omit the newest and show the deleted: names are asked for.
"""

import contextlib
import json
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from store import fs, retry
from store.errors import NotFound, StoreError

FOLDER = "leases"
KEPT = 20  # leases: older ones are deleted, oldest first
RECORD_BYTES = 1024  # always: a renewal in place then has neither a shorter nor a longer file behind it
try:
    TTL_S = float(os.environ["PERENNIAL_LEASE_S"])
except (KeyError, ValueError):
    TTL_S = 60.0
LONG_AGO_S = 6 * 3600.0  # no clock is as wrong as that


class Fenced(StoreError):
    """Another writer has taken the run over: commit nothing more."""


class Lease:
    """The right to write to one folder. `epoch` >= 1 grows with every holder; `previous` is what the last one last wrote.

    `previous` has `time` (seconds since 1970, of that machine's clock), `host`, `released` and what that holder told;
    it is None for the first holder.
    """

    def __init__(self, url: str, record: dict[str, Any], previous: dict[str, Any] | None) -> None:
        self.url, self.epoch, self.previous = url, int(record["epoch"]), previous
        self._record, self._guard, self._end = record, threading.Lock(), threading.Event()
        self.fenced: Fenced | None = None  # set as soon as this process knows, by `check` or by the thread
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._thread.start()

    @classmethod
    def claim(
        cls,
        url: str,
        lock: str,
        info: dict[str, Any],
        wait: Callable[[float, dict[str, Any]], object],
        *,
        above: int = 0,
    ) -> "Lease":
        """Become the one writer of the folder `url`. Raises StoreError while another one is alive.

        `lock` names the local lock that the caller holds (`store.lock.hold`): a predecessor that held the same one is
        dead, and is followed at once. So is one that released, and one whose stamp is six hours old. Any other has to be silent
        for one TTL: an object store's own clock tells since when it is, and for what is left it is watched, on this machine's
        monotonic clock. On a disk its stamp tells, which a wrong clock's can do falsely: older than four TTL it is watched
        for somewhat longer than a beat. Between looks `wait(seconds, its record)` is called, which sleeps, may tell, may raise.
        `info` goes into the record. Epochs begin after `above`, for a run whose leases were deleted.
        """
        while True:
            epoch, last = _newest(url, above)
            if last is not None:
                _outlive(url, epoch, last, lock, wait)
                last = _read(url, epoch) or last
            record = {"host": socket.gethostname(), **info, "epoch": epoch + 1, "holder": secrets.token_hex(8),
                      "lock": lock, "beat": 0, "time": time.time(), "released": False}  # fmt: skip
            if fs.create(_name(url, epoch + 1), _encoded(record)):
                return cls(url, record, last)
            # somebody was quicker: look at that one

    def check(self) -> None:
        """Raises Fenced when another writer took over: call it right before every commit. Raises StoreError."""
        if self.fenced is None:
            later = _read(self.url, self.epoch + 1)
            own = {} if later is not None else _read(self.url, self.epoch)
            if own is None:
                # pruned while we slept; or deleted by hand, or lost by a mount before its upload: then it is still ours
                newest, record = _newest(self.url, self.epoch)
                if newest > self.epoch:
                    later = record or {}
                else:
                    fs.create(self._own_name, _encoded(self._record))
                    own = _read(self.url, self.epoch) or {}
            if later is not None or own.get("holder", self._record["holder"]) != self._record["holder"]:
                host = (own if later is None else later).get("host", "unknown")
                self.fenced = Fenced(
                    f"{fs.redact(self.url)}: another trainer (host {host}) has taken this run over: this one stops; "
                    "what it had saved is kept"
                )
        if self.fenced is not None:
            raise self.fenced

    def renew(self, **info: Any) -> None:
        """Tell what the next holder may want to know (`step`, `saved`); it is written with the next beat."""
        with self._guard:
            self._record = {**self._record, **info}

    def release(self) -> None:
        """Give the run up, so that the next writer need not wait. Never raises: without it the lease lapses."""
        self._end.set()
        self._thread.join(2.0)
        if self.fenced is None and not self._record["released"]:
            self.renew(released=True)
            self._beat(5.0)

    def cancel(self) -> None:
        """As if it had never been claimed: for a start that was refused before it wrote anything."""
        self._end.set()
        self._thread.join(2.0)
        with contextlib.suppress(StoreError):
            fs.delete(self._own_name)

    @property
    def _own_name(self) -> str:
        return _name(self.url, self.epoch)

    def _keep(self) -> None:
        self._prune()
        while not self._end.wait(TTL_S / 4) and self.fenced is None:
            self._beat(TTL_S / 4)

    def _prune(self) -> None:
        """Remove the leases of long ago. Oldest first: whose own is still there finds its successor's too."""
        with contextlib.suppress(StoreError), retry.patience(TTL_S):
            for epoch in _listed(self.url):
                if epoch <= self.epoch - KEPT:
                    fs.delete(_name(self.url, epoch))

    def _beat(self, seconds: float) -> None:
        """Look whether the run is still ours and say that we live. A storage that fails now is no reason to stop."""
        try:
            with retry.patience(seconds):
                self.check()
                with self._guard:
                    self._record = {**self._record, "beat": self._record["beat"] + 1, "time": time.time()}
                    record = self._record
                _overwrite(self._own_name, _encoded(record))
        except StoreError:
            pass  # `check` remembers Fenced; the rest passes, and the savers tell of it


def _outlive(
    url: str, epoch: int, last: dict[str, Any], lock: str, wait: Callable[[float, dict[str, Any]], object]
) -> None:
    """Return when the holder of the epoch is dead or silent for a TTL. Raises StoreError when it gives a sign of life."""
    stamp = last.get("time")
    age_s = time.time() - stamp if isinstance(stamp, int | float) else 0.0
    if last.get("released") or (lock and last.get("lock") == lock) or age_s > LONG_AGO_S:
        return
    watch_s = TTL_S if age_s <= 4 * TTL_S else 0.4 * TTL_S  # a beat comes every 0.25
    silent_until = time.monotonic() + min(watch_s, TTL_S - _silent_s(url, epoch))
    while time.monotonic() < silent_until:
        wait(TTL_S / 20, last)
        now = _read(url, epoch)
        if now is not None and now.get("released"):
            return
        if now is not None and now.get("beat") != last.get("beat"):
            raise StoreError(
                f"{fs.redact(url)}: another trainer is writing there (host {now.get('host', 'unknown')}): "
                "stop it, or give another --out"
            )


def _silent_s(url: str, epoch: int) -> float:
    """Since when an object store has seen no beat, by its own clock; 0 on a disk, and where a store does not tell."""
    if fs.is_local(url):
        return 0.0
    probe = fs.join(url, FOLDER, f".now-{secrets.token_hex(4)}.tmp")
    with contextlib.suppress(StoreError), retry.patience(TTL_S / 4):
        fs.put_bytes(probe, b"\n")
        try:
            now_s, beat_s = fs.modified_s(probe), fs.modified_s(_name(url, epoch))
        finally:
            fs.delete(probe)
        if now_s and beat_s:
            return max(now_s - beat_s, 0.0)
    return 0.0


def _newest(url: str, above: int) -> tuple[int, dict[str, Any] | None]:
    """The newest epoch and its record. A listing only tells where to begin: what it shows is asked for by name."""
    epoch = next((n for n in reversed(_listed(url)) if _read(url, n) is not None), 0)
    epoch = max(epoch, above)
    while _read(url, epoch + 1) is not None:
        epoch += 1
    return epoch, _read(url, epoch) if epoch else None


def _listed(url: str) -> list[int]:
    names = (e.name for e in fs.list_folder(fs.join(url, FOLDER)))
    return sorted(int(m[1]) for name in names if (m := re.fullmatch(r"(\d{8,})\.json", name)))


def _name(url: str, epoch: int) -> str:
    return fs.join(url, FOLDER, f"{epoch:08d}.json")


def _read(url: str, epoch: int) -> dict[str, Any] | None:
    """A lease as it is stored; empty when it is no JSON object (a full Drive makes files of 0 bytes), None when missing."""
    try:
        record = json.loads(fs.read_bytes(_name(url, epoch)))
        return record if isinstance(record, dict) else {}
    except NotFound:
        return None
    except (ValueError, RecursionError):
        return {}


def _encoded(record: dict[str, Any]) -> bytes:
    return json.dumps(record).ljust(RECORD_BYTES - 1).encode() + b"\n"


def _overwrite(url: str, data: bytes) -> None:
    """In place on a disk: on Drive a file that is replaced goes to the Trash, 5,760 times a day. A torn one reads as {}."""
    if not fs.is_local(url):
        return fs.put_bytes(url, data)

    def work() -> None:
        with open(fs.local_path(url), "r+b") as f:
            f.write(data)
            f.truncate()

    return retry.attempt(url, "write", work)
