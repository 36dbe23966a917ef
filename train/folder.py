"""The run folder: identity, metrics, events and samples, kept on this machine and mirrored where --out is elsewhere.

OUT/config.json  metrics.jsonl  events.jsonl  tokenizer.json  samples/step-00001000.txt  step-…/ (train/checkpoint.py)
"""

import datetime
import hashlib
import json
import os
import platform
import secrets
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import Any, Protocol

from cli.errors import UserError
from store import drive, fs, lock
from store.errors import DataError, NotFound, StoreError
from store.lease import TTL_S, Lease
from store.shards import default_cache
from train import checkpoint, clock
from train.ledger import crash_found, iso

FORMAT, VERSION = "perennial-run", 1
CLOSE_S = 10.0  # for a watcher to send what it holds: a preempted machine has no more
LOCK = ".lock"
KEPT = ("metrics.jsonl", "events.jsonl")


class Watcher(Protocol):
    """Is told what the run writes, in the threads that write it: a display, a logger."""

    def metrics(self, lines: list[dict[str, Any]]) -> None:
        """Lines of metrics.jsonl."""

    def event(self, line: dict[str, Any]) -> None:
        """A line of events.jsonl."""

    def sample(self, step: int, text: str) -> None:
        """A step's samples."""

    def close(self) -> None:
        """The process is about to end."""


class RunFolder:
    """One training run at any URL.

    `local` is where this machine writes: `url` itself, or, where that is a bucket or a mounted Drive, a folder of the cache
    that holds the logs and the newest checkpoints too (the local tier), from which a Mirror feeds `url`.
    """

    def __init__(self, url: str, cache: Path | None = None) -> None:
        self.url, self.run_id, self.attempt = url, "", 0
        self.stored_config: dict[str, Any] | None = None
        self.lease: Lease | None = None
        self.opened = False
        self.unwritten: dict[str, str] = {}  # lines of logs that could not be appended yet
        self.writing = threading.Lock()  # the loop and the saving threads log
        self.two_tiers = not fs.is_local(url) or drive.holds(fs.local_path(url))
        mine = (cache or default_cache()) / "runs" / hashlib.sha256(url.encode()).hexdigest()[:16]
        self.local = mine if self.two_tiers else fs.local_path(url)
        self.published: dict[str, int] = {}  # bytes of each file that the mirror has brought to `url`
        self.watchers: list[Watcher] = []
        self.logged: dict[str, int] = {}  # newest step of each metric that an earlier attempt logged, kept or not

    def is_a_run(self, *, resume: bool) -> bool:
        """True when a run is to be gone on with, False when the place is free. Writes nothing.

        Raises UserError without `resume` when anything is there, and with it when something else is.
        """
        if fs.is_local(self.url):
            path = fs.local_path(self.url).absolute()
            if drive.holds(path) and not drive.mounted(path):
                raise UserError(f"--out {self.url}: Google Drive is not mounted: run drive.mount({str(drive.MOUNT)!r}) in a cell "
                                "of its own")  # fmt: skip
            there = next(p for p in (path, *path.parents) if p.exists())
            if not there.is_dir() or not os.access(there, os.W_OK):
                what = "cannot be written" if there.is_dir() else "is a file"
                raise UserError(f"--out {self.url}: {there} {what}: give a folder that can be made and written")
        names = [e.name for e in fs.list_folder(self.url)]
        # a start that was killed before config.json was there can have left these
        if all(
            n in (*KEPT, LOCK, "samples", "leases", "tokenizer.json") or (n.startswith(".") and n.endswith(".tmp"))
            for n in names
        ):
            return False
        where = fs.redact(self.url)
        if not resume:
            raise UserError(f"{where}: is not empty ({names[0]} …): add --resume to go on with the run there, "
                            "or give another --out")  # fmt: skip
        if "config.json" in names:
            try:
                data = _identity(self.url)
                if data is not None:
                    self.run_id, self.attempt = str(data["run_id"]), int(data.get("attempt", 0))
                    self.stored_config = dict(data["config"])
                    return True
            except (ValueError, KeyError, TypeError) as e:
                if any(checkpoint.STEP_NAME.fullmatch(n) for n in names):
                    self.run_id = secrets.token_hex(4)  # the file is damaged, the checkpoints can still be sound
                    return True
                raise UserError(f"{where}: config.json is unreadable ({e}): give another --out, or delete it") from e
        if any(checkpoint.STEP_NAME.fullmatch(n) for n in names):
            return True  # config.json is gone, the checkpoints hold its settings too
        raise UserError(f"{where}: holds something that is not a run ({names[0]} …): give another --out")

    def hold(self) -> None:
        """Become the one process that writes here, on this machine by a lock, among all machines by a lease.

        Raises StoreError while another one is alive. One that went silent is waited for.
        """
        if self.lease is None:
            key, told = lock.hold(self.local / LOCK), False

            def wait(seconds: float, record: dict[str, Any]) -> None:
                nonlocal told
                if not told:
                    told = True
                    self.warn(f"{fs.redact(self.url)}: its last trainer (host {record.get('host', 'unknown')}) gave no notice of its "
                              f"end: waiting for a sign of life, {TTL_S:g} seconds at most")  # fmt: skip
                time.sleep(seconds)

            self.lease = Lease.claim(self.url, key, {}, wait, above=self.attempt)

    def release(self) -> None:
        """Let the next trainer begin at once; nothing is left of a start that was refused. Safe to call at any time."""
        while self.watchers:
            watcher = self.watchers.pop()
            closing = threading.Thread(target=self._told, args=(watcher, "close"), daemon=True)
            closing.start()
            closing.join(CLOSE_S)
        if self.lease is not None:
            (self.lease.release if self.opened else self.lease.cancel)()

    def fence(self) -> None:
        """Called before every commit: raises Fenced when another trainer has taken the run over."""
        self.lease.check()

    def saved_last(self) -> tuple[str, ...]:
        """The step folder that the last trainer reported as committed in `url`: a listing may not show it yet."""
        name = (self.lease.previous or {}).get("saved") if self.lease else None
        return (name,) if isinstance(name, str) and checkpoint.STEP_NAME.fullmatch(name) else ()

    def places(self) -> list[str]:
        """Where this run's checkpoints are, the nearest first."""
        return [str(self.local), self.url] if self.two_tiers and self._local_is_current() else [self.url]

    def _local_is_current(self) -> bool:
        """True when this machine was the last to write to the run: nobody went on with it elsewhere since."""
        try:
            data = _identity(str(self.local))
            return data is not None and data["run_id"] == self.run_id and int(data["attempt"]) >= self.attempt
        except (NotFound, ValueError, KeyError, TypeError, DataError):
            return False

    def open(
        self, config: dict[str, Any], tokenizer_json: str, *, step: int, val_due: bool = False, **about: Any
    ) -> None:
        """Begin an attempt at `step`: write identity on the first, cut the logs back to the step on a later one.

        With `val_due` the validation after it is still to come. `about` is noted with the start.
        """
        self.hold()
        logged_s = None
        if self.two_tiers and not self._local_is_current():
            self._begin_local_tier()
        elif (self.local / "metrics.jsonl").exists():
            logged_s = (self.local / "metrics.jsonl").stat().st_mtime
        self.run_id = self.run_id or secrets.token_hex(4)
        fs.delete_leftovers(str(self.local))
        self.attempt, self.opened = self.lease.epoch, True
        events, metrics = read_lines(self.local / "events.jsonl"), read_lines(self.local / "metrics.jsonl")
        if (crash := crash_found(events, metrics, step, self.lease.previous, logged_s)) is not None:
            self.event("crash_found", **crash)
        for m in metrics:
            if isinstance(m.get("step"), int):
                self.logged |= {key: max(m["step"], self.logged.get(key, 0)) for key in m}
        # what was logged after the checkpoint will happen, and be logged, again
        kept = [m for m in metrics if m.get("step", 0) < step + ("val_loss" not in m or not val_due)]
        fs.put_bytes(str(self.local / "metrics.jsonl"), b"".join(json.dumps(m).encode() + b"\n" for m in kept))
        identity = {
            "format": FORMAT,
            "version": VERSION,
            "run_id": self.run_id,
            "attempt": self.attempt,
            "config": config,
        }
        # the local one first: until both name this attempt, the local tier counts as the newer, which it is
        for place in dict.fromkeys((str(self.local), self.url)):
            fs.put_bytes(fs.join(place, "config.json"), json.dumps(identity, indent=1).encode())
        fs.put_bytes(fs.join(self.url, "tokenizer.json"), tokenizer_json.encode())
        self.event("start", step=step, host=platform.node(), **about)

    def _begin_local_tier(self) -> None:
        """Empty the local tier of what another run left, or of what is history since another machine went on."""
        for path in self.local.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != LOCK:
                path.unlink()
        for name in KEPT:
            try:
                fs.put_bytes(str(self.local / name), fs.read_bytes(fs.join(self.url, name)))
            except NotFound:
                continue

    def metrics(self, lines: list[dict[str, Any]]) -> None:
        """Append lines to metrics.jsonl; they reach the kernel at once, so a killed process loses none."""
        self._append("metrics.jsonl", lines)
        self._tell("metrics", lines)

    def event(self, event: str, **fields: Any) -> None:
        """Append one line to events.jsonl: what happened, when, in which attempt. Any thread may."""
        now = datetime.datetime.now(datetime.UTC).timestamp()
        # `up_s` is what durations are made of: `time` moves with the wall clock
        line = {"time": iso(now), "up_s": round(clock.up_s(), 3), "attempt": self.attempt, "event": event, **fields}
        self._append("events.jsonl", [line])
        self._tell("event", line)

    def _tell(self, what: str, *args: Any) -> None:
        for watcher in tuple(self.watchers):
            self._told(watcher, what, *args)

    def _told(self, watcher: Watcher, what: str, *args: Any) -> None:
        """Tell a watcher; one that fails is told no more. Training does not depend on who looks on."""
        try:
            getattr(watcher, what)(*args)
        except Exception as e:
            if watcher in self.watchers:
                self.watchers.remove(watcher)
            words = " ".join(str(e).split())[:200]
            self.warn(
                f"{type(watcher).__name__} failed and is told no more ({type(e).__name__}: {words}); training goes on"
            )

    def _append(self, name: str, lines: list[dict[str, Any]]) -> None:
        """Append now, or with the next lines where the place is away or full: training does not stop for its log."""
        with self.writing:
            self.unwritten[name] = self.unwritten.get(name, "") + "".join(json.dumps(line) + "\n" for line in lines)
            path = self.local / name
            try:
                whole = path.stat().st_size if path.exists() else 0
                try:
                    with open(path, "a", encoding="utf-8") as f:
                        f.write(self.unwritten[name])
                except OSError:
                    os.truncate(path, whole)  # half of the lines may be there: they are all to come again
                    raise
                self.unwritten[name] = ""
            except OSError as e:
                self.warn(f"{name} cannot be written now ({e.strerror}); its lines wait")

    def sample(self, step: int, text: str) -> None:
        """Keep a step's samples, where the storage lets us."""
        self._tell("sample", step, text)
        try:
            fs.put_bytes(str(self.local / "samples" / f"step-{step:08d}.txt"), text.encode())
        except StoreError as e:
            self.warn(f"samples of step {step} were not kept: {e}")

    def publish(self) -> None:
        """Bring logs and samples that are new to `url`, where that is elsewhere. Raises StoreError. For one thread."""
        if not self.two_tiers:
            return
        found = (p for pattern in ("samples/*.txt", "tensorboard/*") for p in self.local.glob(pattern))
        for name in (*KEPT, *sorted(str(p.relative_to(self.local)) for p in found)):
            with self.writing:
                data = (self.local / name).read_bytes() if (self.local / name).exists() else b""
            if len(data) != self.published.get(name, 0):
                fs.put_log(fs.join(self.url, name), data)
                self.published[name] = len(data)

    def warn(self, message: str) -> None:
        """One line on stderr."""
        self.tell(f"warning: {message}")

    def tell(self, line: str) -> None:
        """That line on stderr."""
        print(line, file=sys.stderr, flush=True)


class BystandingFolder:
    """The run folder of every process but the first: it knows the run, and writes nothing."""

    def __init__(self, url: str) -> None:
        self.url, self.run_id, self.attempt = url, "", 0
        self.stored_config: dict[str, Any] | None = None
        self.lease = self

    def nothing(self, *arguments: object, **options: object) -> None:
        """What rank 0 alone has to do."""

    open = event = metrics = sample = warn = tell = renew = release = nothing


def _identity(place: str) -> dict[str, Any] | None:
    """config.json of a run; None where it is something else's. Raises NotFound, ValueError, DataError (newer format)."""
    data = json.loads(fs.read_bytes(fs.join(place, "config.json")))
    if data["format"] != FORMAT:
        return None
    if data["version"] > VERSION:
        raise DataError(
            f"{fs.redact(place)}: run format {data['version']} is newer than this program's {VERSION}: update it"
        )
    return data


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file; a last line cut off by a kill is left out. Empty when there is no file."""
    lines = []
    for line in path.read_text("utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            lines.append(value)
    return lines
