"""The run folder: identity, metrics, events and samples, kept locally and mirrored when --out is a URL.

OUT/config.json  metrics.jsonl  events.jsonl  tokenizer.json  samples/step-00001000.txt  step-…/ (train/checkpoint.py)
"""

import datetime
import hashlib
import json
import os
import secrets
import sys
from pathlib import Path
from typing import Any

from cli.errors import UserError
from store import fs, lock
from store.errors import DataError, NotFound, StoreError
from store.shards import default_cache
from train import checkpoint

FORMAT, VERSION = "perennial-run", 1
LOCK = ".lock"
KEPT = ("metrics.jsonl", "events.jsonl")


class RunFolder:
    """One training run at any URL. Logs are appended to local files; `publish` mirrors them beside each checkpoint."""

    def __init__(self, url: str, cache: Path | None = None) -> None:
        self.url, self.run_id, self.attempt = url, "", 0
        self.stored_config: dict[str, Any] | None = None
        self.held = False
        self.unwritten: dict[str, str] = {}  # lines of logs that could not be appended yet
        remote = (cache or default_cache()) / "runs" / hashlib.sha256(url.encode()).hexdigest()[:16]
        self.local = fs.local_path(url) if fs.is_local(url) else remote

    def is_a_run(self, *, resume: bool) -> bool:
        """True when a run is to be gone on with, False when the place is free. Writes nothing.

        Raises UserError without `resume` when anything is there, and with it when something else is.
        """
        if fs.is_local(self.url):
            there = next(p for p in (self.local.absolute(), *self.local.absolute().parents) if p.exists())
            if not there.is_dir() or not os.access(there, os.W_OK):
                what = "cannot be written" if there.is_dir() else "is a file"
                raise UserError(f"--out {self.url}: {there} {what}: give a folder that can be made and written")
        names = [e.name for e in fs.list_folder(self.url)]
        # a start that was killed before config.json was there can have left these
        if all(
            n in (*KEPT, LOCK, "samples", "tokenizer.json") or (n.startswith(".") and n.endswith(".tmp")) for n in names
        ):
            return False
        where = fs.redact(self.url)
        if not resume:
            raise UserError(f"{where}: is not empty ({names[0]} …): add --resume to go on with the run there, "
                            "or give another --out")  # fmt: skip
        if "config.json" in names:
            try:
                data = json.loads(fs.read_bytes(fs.join(self.url, "config.json")))
                if data["format"] == FORMAT and data["version"] > VERSION:
                    raise DataError(
                        f"{where}: run format {data['version']} is newer than this program's {VERSION}: update it"
                    )
                if data["format"] == FORMAT:
                    self.run_id, self.stored_config = str(data["run_id"]), dict(data["config"])
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
        """Become the one process of this machine that writes here. Raises StoreError while another one is."""
        if not self.held:
            lock.hold(self.local / LOCK)
            self.held = True

    def open(self, config: dict[str, Any], tokenizer_json: str, *, step: int) -> None:
        """Begin an attempt at `step`: write identity on the first, cut the logs back to the step on a later one."""
        self.hold()
        self.run_id = self.run_id or secrets.token_hex(4)
        identity = {"format": FORMAT, "version": VERSION, "run_id": self.run_id, "config": config}
        fs.put_bytes(fs.join(self.url, "config.json"), json.dumps(identity, indent=1).encode())
        self.local.mkdir(parents=True, exist_ok=True)
        fs.delete_leftovers(self.url)
        if not fs.is_local(self.url):
            for name in KEPT:
                try:
                    fs.put_bytes(str(self.local / name), fs.read_bytes(fs.join(self.url, name)))
                except NotFound:
                    (self.local / name).unlink(missing_ok=True)
        self.attempt = 1 + sum(e.get("event") == "start" for e in read_lines(self.local / "events.jsonl"))
        # what was logged after the checkpoint will happen, and be logged, again
        kept = [m for m in read_lines(self.local / "metrics.jsonl") if m.get("step", 0) <= step]
        fs.put_bytes(str(self.local / "metrics.jsonl"), b"".join(json.dumps(m).encode() + b"\n" for m in kept))
        fs.put_bytes(fs.join(self.url, "tokenizer.json"), tokenizer_json.encode())
        self.event("start", step=step)

    def metrics(self, lines: list[dict[str, Any]]) -> None:
        """Append lines to metrics.jsonl; they reach the kernel at once, so a killed process loses none."""
        self._append("metrics.jsonl", lines)

    def event(self, event: str, **fields: Any) -> None:
        """Append one line to events.jsonl: what happened, when, in which attempt."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        self._append("events.jsonl", [{"time": now, "attempt": self.attempt, "event": event, **fields}])

    def _append(self, name: str, lines: list[dict[str, Any]]) -> None:
        """Append now, or with the next lines where the place is away or full: training does not stop for its log."""
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
        try:
            fs.put_bytes(fs.join(self.url, "samples", f"{checkpoint.step_name(step)}.txt"), text.encode())
        except StoreError as e:
            self.warn(f"samples of step {step} were not kept: {e}")

    def publish(self) -> None:
        """Mirror the logs to a remote --out. Raises StoreError."""
        if not fs.is_local(self.url):
            for name in KEPT:
                if (self.local / name).exists():
                    fs.put_file(fs.join(self.url, name), self.local / name)

    def warn(self, message: str) -> None:
        """One line on stderr."""
        print(f"warning: {message}", file=sys.stderr, flush=True)


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
