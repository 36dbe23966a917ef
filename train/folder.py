"""The run folder: identity, metrics, events and samples, kept on this machine and mirrored where --out is elsewhere.

OUT/config.json  metrics.jsonl  events.jsonl  tokenizer.json  samples/step-00001000.txt  step-…/ (train/checkpoint.py)
"""

import contextlib
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
from store.untrusted import parse_json
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
            except (ValueError, KeyError, TypeError, OverflowError) as e:
                if any(checkpoint.STEP_NAME.fullmatch(n) for n in names):
                    self._ask_checkpoints()  # the file is damaged, they can still be sound
                    return True
                raise UserError(f"{where}: config.json is unreadable ({e}): give another --out, or delete it") from e
        if any(checkpoint.STEP_NAME.fullmatch(n) for n in names):
            self._ask_checkpoints()  # config.json is gone: they hold its settings too
            return True
        raise UserError(f"{where}: holds something that is not a run ({names[0]} …): give another --out")

    def _ask_checkpoints(self) -> None:
        """Who this run is, where config.json does not tell."""
        manifests, here = checkpoint.committed(self.url), self._local_identity()
        self.run_id = manifests[-1].run_id if manifests else here[0] if here else ""

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

            # a later attempt is newer whatever its step: also where config.json and the leases did not come along
            found = (n for place in {str(self.local), self.url} for n in checkpoint.step_names(place))
            above = max(self.attempt, *(checkpoint.age(name)[0] for name in found), 0)
            self.lease = Lease.claim(self.url, key, {}, wait, above=above)

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

    def promised(self) -> dict[str, set[str]]:
        """The step folders that were reported as saved, by place: one that is there without its manifest has lost it."""
        names = {}
        for place in self.places():
            tier = "remote" if self.two_tiers and place == self.url else "local"
            try:
                lines = parse_lines(fs.read_bytes(fs.join(place, "events.jsonl")))
            except NotFound:
                lines = []
            names[place] = {
                checkpoint.step_name(e["step"], e["attempt"])
                for e in lines
                if e.get("event") == "saved" and e.get("tier") == tier
                and isinstance(e.get("step"), int) and isinstance(e.get("attempt"), int) and min(e["step"], e["attempt"]) >= 0
            }  # fmt: skip
        names[self.url] |= set(self.saved_last())
        return names

    def _local_is_current(self) -> bool:
        """True when this machine's tier is of this run, and no other machine has saved in the run since."""
        mine = self._local_identity()
        if mine is None or mine[0] != self.run_id:
            return False
        later = {n for n in (*checkpoint.step_names(self.url), *self.saved_last()) if checkpoint.age(n)[0] > mine[1]}
        return not any(checkpoint.read_manifest(self.url, name) for name in later)

    def _local_identity(self) -> tuple[str, int] | None:
        """(run_id, attempt) of what the local tier holds."""
        try:
            data = _identity(str(self.local))
            return None if data is None else (str(data["run_id"]), int(data["attempt"]))
        except (NotFound, ValueError, KeyError, TypeError, DataError):
            return None

    def open(
        self, config: dict[str, Any], tokenizer_json: str, *, step: int, val_due: bool = False, **about: Any
    ) -> None:
        """Begin an attempt at `step`: write identity on the first, cut the logs back to the step on a later one.

        With `val_due` the validation after it is still to come. `about` is noted with the start.
        """
        fresh = self.lease is None
        self.hold()
        if fresh and self.is_a_run(resume=True):  # looked at before the data was, which can take long
            raise UserError(
                f"{fs.redact(self.url)}: another trainer has begun a run there meanwhile: run the same command again"
            )
        logged_s = None
        if self.two_tiers and not self._local_is_current():
            self._begin_local_tier()
        elif self.two_tiers:
            self._catch_up()
        if (self.local / "metrics.jsonl").exists():
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
        """Empty the local tier of what is history since another machine went on. What another run left is set aside."""
        mine, aside = self._local_identity(), self.local.with_name(f"{self.local.name}.aside")
        other = (mine is None or mine[0] != self.run_id) and checkpoint.committed(str(self.local))
        if other:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            self.warn(f"{fs.redact(self.url)} holds another run than this machine's copy of it, or none: that copy, up to "
                      f"{other[-1].name}, is set aside as {aside}")  # fmt: skip
        for path in self.local.iterdir():
            if path.name == LOCK:
                continue
            if other:
                os.rename(path, aside / path.name)
            elif path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        for name in KEPT:
            try:
                fs.put_bytes(str(self.local / name), fs.read_bytes(fs.join(self.url, name)))
            except NotFound:
                continue

    def _catch_up(self) -> None:
        """Take into the ledger what starts on other machines wrote, which saved nothing: this tier goes on, not theirs."""
        try:
            theirs = parse_lines(fs.read_bytes(fs.join(self.url, "events.jsonl")))
        except NotFound:
            return
        mine = read_lines(self.local / "events.jsonl")
        newest = max((e["attempt"] for e in mine if isinstance(e.get("attempt"), int)), default=0)
        new = [e for e in theirs if isinstance(e.get("attempt"), int) and e["attempt"] > newest]
        if new:
            self._append("events.jsonl", new)

    def metrics(self, lines: list[dict[str, Any]]) -> None:
        """Append lines to metrics.jsonl; they reach the kernel at once, so a killed process loses none."""
        self._append("metrics.jsonl", lines)
        self._tell("metrics", lines)

    def settle(self) -> None:
        """Every line of metrics.jsonl so far is on the disk, before a checkpoint says that its steps are done. Raises StoreError."""
        self._append("metrics.jsonl", [])  # what could not be written before
        path = self.local / "metrics.jsonl"
        try:
            if self.unwritten.get(path.name):
                raise StoreError(f"{path}: cannot be written now")
            with open(path, "r+b") as f:
                os.fsync(f.fileno())
        except OSError as e:
            raise StoreError(f"{path}: cannot be written to the disk: {e.strerror or e}") from e

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
                    with open(path, "ab+") as f:
                        f.seek(max(whole - 1, 0))
                        torn = f.read(1) not in (b"", b"\n")  # by a power cut: what comes next is a line of its own
                        f.write(b"\n" * torn + self.unwritten[name].encode())
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
        self.fence()  # a trainer that was overtaken must not put its log in the place of its successor's
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
        """That line on stderr, where anything can be written there: a thread that saves must not die of it."""
        with contextlib.suppress(OSError, ValueError):  # a full disk, a lost terminal; closed
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
    data = parse_json(fs.read_bytes(fs.join(place, "config.json")))
    if data["format"] != FORMAT:
        return None
    if data["version"] > VERSION:
        raise DataError(
            f"{fs.redact(place)}: run format {data['version']} is newer than this program's {VERSION}: update it"
        )
    return data


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file; a last line cut off by a kill is left out. Empty when there is no file."""
    return parse_lines(path.read_bytes()) if path.exists() else []


def parse_lines(data: bytes) -> list[dict[str, Any]]:
    """The objects among the lines of a JSONL file."""
    lines = []
    for line in data.decode("utf-8", errors="replace").splitlines():
        try:
            value = parse_json(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            lines.append(value)
    return lines
