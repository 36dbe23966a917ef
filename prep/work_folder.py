"""The folder of temporary files: where it is, which job it belongs to, and who may write there."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from cli.errors import UserError
from store import fs, lock
from store.shards import TokenShards, default_cache

JOB, LOCK = "job.json", ".lock"
PROJECT = Path(__file__).resolve().parent.parent
# Modules of prep that decide no byte of what passes between tasks: they ask, show, wait, or describe in one go at the end
NO_BYTES = {"charts", "pool", "ray_pool", "report", "report_page", "settings", "shares", "spool", "summary", "timing",
            "verdict", "work_folder"}  # fmt: skip


def place(output: str, asked: str) -> Path:
    """Where temporary files go: inside a local output, else in this machine's cache; in a folder of this output's own."""
    where = str(fs.local_path(output).absolute()) if fs.is_local(output) else output.rstrip("/")
    if fs.is_local(output) and not asked:
        return Path(where) / ".prep"
    folder = Path(asked).expanduser().absolute() if asked else default_cache() / "prep"
    return folder / f"perennial-prep-{hashlib.sha256(where.encode()).hexdigest()[:16]}"


def is_complete(output: str, *, resume: bool) -> bool:
    """True when the output is a finished dataset, of whatever job. Raises UserError for one that is not asked for."""
    complete = fs.exists(fs.join(output, "metadata.json"))
    if complete and not resume:
        raise UserError(f"{fs.redact(output)}: exists already and is complete: give another --output, or delete it")
    return complete


def already_complete(output: str, job: dict[str, Any], *, resume: bool) -> bool:
    """True when the output is the finished dataset of this very job. Raises UserError when it is anything else."""
    complete = is_complete(output, resume=resume)
    if complete:
        same_job(TokenShards(output).metadata.get("job", {}), job, output)
    return complete


def same_job(old: dict[str, Any], new: dict[str, Any], where: str) -> None:
    """Raises UserError naming the first setting or source that differs from the interrupted run's."""
    old = old if isinstance(old, dict) else {}  # metadata.json can be anybody's
    old_settings = old["settings"] if isinstance(old.get("settings"), dict) else {}
    for name, value in new["settings"].items():
        if old_settings.get(name) != value:
            raise UserError(f"{fs.redact(where)}: was begun with --{name.replace('_', '-')} {old_settings.get(name)}, "
                            f"now it is {value}: give the old value, or another --output")  # fmt: skip
    if old.get("sources") != new["sources"]:
        raise UserError(f"{fs.redact(where)}: was begun from other input files, or they have changed: "
                        "give another --output, or delete it")  # fmt: skip


def is_new(work: Path, output: str) -> bool:
    """True where no run has begun. Raises UserError when the output holds what is no run's."""
    if (work / JOB).exists():
        return False
    others = [e.name for e in fs.list_folder(output) if e.name != ".prep"]
    if others:
        raise UserError(f"{fs.redact(output)}: exists and holds something else ({others[0]}): give another --output")
    return True


def enter(
    work: Path, output: str, job: dict[str, Any], versions: dict[str, str], *, resume: bool, share: int | None
) -> bool:
    """Make or re-enter the folder and lock it for the life of this process; True when it is new.

    A `share` of the work may be done beside other shares, anything else alone. Raises UserError when the folder belongs
    to another job or was begun with other versions: half of the bytes would be the one's, half the other's. An update
    of this program is no other version where it changed nothing that makes bytes.
    """
    created = is_new(work, output)
    lock.hold(work / LOCK, shared=share is not None)
    if share is not None:
        lock.hold(work / f"{LOCK}-{share}")
    if not (created or resume):
        raise UserError(f"{fs.redact(output)}: holds an unfinished run: add --resume to go on, or delete it")
    code = code_versions()
    fs.create(str(work / JOB), json.dumps(job | {"versions": versions, "code": code}).encode())
    begun = json.loads((work / JOB).read_bytes())
    same_job(begun, job, output)
    for name, now in versions.items():
        if (before := begun["versions"].get(name)) != now:
            raise UserError(f"{fs.redact(output)}: was begun with {name} {before}, now it is {now}: "
                            f"install that version again, or delete {work} and begin anew")  # fmt: skip
    if changed := sorted(name for name, _ in begun.get("code", {}).items() ^ code.items()):
        raise UserError(f"{fs.redact(output)}: was begun with another version of this program, which has changed since "
                        f"({changed[0]}): check the old one out again, or delete {work} and begin anew")  # fmt: skip
    return created


def code_versions() -> dict[str, str]:
    """A hash of each module that makes bytes: a run must not begin with one version and end with another."""
    modules = [p for p in (PROJECT / "prep").glob("*.py") if p.stem not in NO_BYTES]
    modules += [PROJECT / name for name in ("gpt/tokenizer.py", "store/hashing.py", "store/shards.py")]
    return {f"{p.parent.name}/{p.name}": hashlib.sha256(p.read_bytes()).hexdigest()[:12] for p in modules}


def remove(work: Path, output: str) -> None:
    """Undo a failed fresh run: the output was empty or absent before it."""
    shutil.rmtree(work, ignore_errors=True)
    fs.delete_folder(output)
