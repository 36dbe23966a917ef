"""Checkpoints, format version 1: committed by a manifest written last, verified when loaded, no pickle anywhere.

    OUT/step-00012000-0003/model.safetensors  optimizer.safetensors  rng.safetensors  state.json  MANIFEST.json

The folder's name is the step and the attempt (the start of the trainer) that wrote it: a trainer that woke up late can
never touch what its successor saved. A step without a valid manifest does not exist: `read_manifest` decides that for
loading, listing and retention alike.
"""

import contextlib
import fcntl
import hashlib
import json
import math
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from store import drive, fs, retry
from store.direct import DirectFile, open_direct
from store.errors import DataError, NotFound, StoreError
from store.shards import default_cache
from store.untrusted import parse_json
from train.tensor_file import write_tensors

FORMAT, VERSION = "perennial-checkpoint", 1
MANIFEST = "MANIFEST.json"
TENSOR_PARTS = ("model.safetensors", "optimizer.safetensors", "rng.safetensors")
PARTS = (*TENSOR_PARTS, "state.json")
STEP_NAME = re.compile(r"step-(\d{8,})(?:-(\d{4,}))?")  # the first runs had no attempt in their names


class NewerFormat(DataError):
    """A checkpoint that a later version of the program wrote: sound, and not to be touched."""


@dataclass(frozen=True)
class Manifest:
    """What makes a step exist: size and sha256 of every part, and which run and start of it wrote them."""

    format: str
    version: int
    step: int
    run_id: str
    attempt: int
    val_loss: float | None
    parts: dict[str, dict[str, Any]]  # name -> {"bytes", "sha256"}
    name: str  # of its folder; not in the file

    @property
    def n_bytes(self) -> int:
        """Bytes of all parts."""
        return sum(p["bytes"] for p in self.parts.values())

    def fields(self) -> dict[str, Any]:
        """What MANIFEST.json holds, but for its own hash."""
        return {k: v for k, v in asdict(self).items() if k != "name"}


@dataclass(frozen=True)
class Checkpoint:
    """A loaded, verified checkpoint, tensors on the CPU."""

    manifest: Manifest
    place: str  # the run folder it was found in
    tensors: dict[str, dict[str, Tensor]]  # by part name
    state: dict[str, Any]


def step_name(step: int, attempt: int) -> str:
    """`step-00012000-0003`."""
    return f"step-{step:08d}-{attempt:04d}"


def age(name: str) -> tuple[int, int]:
    """(attempt, step) of a step folder: the order of time. A later attempt is newer whatever its step."""
    m = STEP_NAME.fullmatch(name)
    return int(m[2] or 0), int(m[1])


# ---- what exists ----------------------------------------------------------------------------------------------------


def read_manifest(out: str, name: str) -> Manifest | None:
    """The manifest of a step folder, or None where the step does not exist: no manifest, or not a whole one.

    Raises DataError for a newer format version: going on from an older step would lose work silently.
    """
    try:
        data = parse_json(fs.read_bytes(fs.join(out, name, MANIFEST)))
        if data["format"] != FORMAT or data.pop("sha256") != _manifest_hash(data):
            return None
        if data["version"] > VERSION:
            raise NewerFormat(f"{fs.redact(fs.join(out, name))}: checkpoint format {data['version']} is newer than this "
                            f"program's {VERSION}: update the program")  # fmt: skip
        manifest = Manifest(**data, name=name)
        whole = set(manifest.parts) == set(PARTS) and all(
            type(p["bytes"]) is int and re.fullmatch("[0-9a-f]{64}", p["sha256"]) for p in manifest.parts.values()
        )
        kinds = [type(v) for v in (manifest.version, manifest.step, manifest.attempt, manifest.run_id)]
        val_loss = manifest.val_loss
        scored = val_loss is None or (type(val_loss) in (int, float) and abs(val_loss) < math.inf)
        mine = (step_name(manifest.step, manifest.attempt), f"step-{manifest.step:08d}")
        return manifest if whole and kinds == [int, int, int, str] and scored and name in mine else None
    except (NotFound, ValueError, KeyError, TypeError, AttributeError):
        return None


def committed(out: str) -> list[Manifest]:
    """The steps that exist, oldest first."""
    return [m for m in (read_manifest(out, name) for name in step_names(out)) if m]


def step_names(out: str) -> list[str]:
    """The step folders there, oldest first, whole or not."""
    return sorted((e.name for e in fs.list_folder(out) if STEP_NAME.fullmatch(e.name)), key=age)


# ---- saving ---------------------------------------------------------------------------------------------------------


def save(
    out: Path, *, step: int, run_id: str, attempt: int, val_loss: float | None,
    tensors: dict[str, dict[str, Tensor]], state: dict[str, Any], fence: Callable[[], object] = lambda: None,
) -> Manifest:  # fmt: skip
    """Write and commit one step in a local folder; `fence` is called before the commit and may raise.

    Raises StoreError; then the step does not exist and older ones stay.
    """
    folder = out / step_name(step, attempt)
    fs.delete_folder(str(folder), first=MANIFEST)  # what an earlier try of the same save left
    _check_room(out, sum(t.nbytes for named in tensors.values() for t in named.values()))
    try:
        parts = {
            name: _write_part(folder / name, lambda f, t=tensors[name]: write_tensors(f, t)) for name in TENSOR_PARTS
        }
        parts["state.json"] = _write_part(
            folder / "state.json", lambda f: f.write(json.dumps(state, indent=1).encode())
        )
        fence()
        manifest = Manifest(FORMAT, VERSION, step, run_id, attempt, val_loss, parts, folder.name)
        signed = {**manifest.fields(), "sha256": _manifest_hash(manifest.fields())}
        fs.put_bytes(str(folder / MANIFEST), json.dumps(signed, indent=1).encode())
    except StoreError:
        with contextlib.suppress(StoreError):
            fs.delete_folder(str(folder))  # a full disk needs the room more than half a checkpoint does
        raise
    return manifest


def upload(source: Path, out: str, manifest: Manifest, *, fence: Callable[[], object] = lambda: None) -> None:
    """Copy a step committed in the folder `source` to any URL and commit it there. Raises StoreError, or what `fence` does.

    Each part is proved before it goes, and by the store's own size and hash once it is there.
    """
    for name, part in manifest.parts.items():
        path = source / manifest.name / name
        _prove(path, part)
        fs.put_file(fs.join(out, manifest.name, name), path)
    fence()
    fs.put_bytes(fs.join(out, manifest.name, MANIFEST), (source / manifest.name / MANIFEST).read_bytes())


class _HashingFile:
    """A file that knows the sha256 of what was written to it."""

    def __init__(self, file: DirectFile) -> None:
        self.file, self.sha256, self.n_bytes = file, hashlib.sha256(), 0

    def write(self, data: memoryview | bytes) -> None:
        self.sha256.update(data)
        self.file.write(data)
        self.n_bytes += len(data)


def _write_part(path: Path, write: Callable[[_HashingFile], object]) -> dict[str, Any]:
    """One part, which appears only when whole; its size and sha256."""

    def work() -> dict[str, Any]:
        with fs.staged(path) as staged:
            with open_direct(staged) as f:
                hashing = _HashingFile(f)
                write(hashing)
            return {"bytes": hashing.n_bytes, "sha256": hashing.sha256.hexdigest()}

    return retry.attempt(str(path), "write", work)


def _check_room(out: Path, n_bytes: int) -> None:
    """Raise StoreError at once where a save cannot fit, instead of filling the disk with a part of it."""
    with contextlib.suppress(OSError):  # a mount that does not tell
        fs.make_folder(out)
        free = shutil.disk_usage(out).free
        if free < n_bytes:
            raise StoreError(f"{out}: no space left: {free >> 20} MiB free, a checkpoint takes {n_bytes >> 20} MiB")


def _manifest_hash(fields: dict[str, Any]) -> str:
    """sha256 of the manifest's other fields: a flipped bit in the manifest itself must be noticed too."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def retain(out: str, keep: int, *, spare: str | None = None) -> None:
    """Delete all committed steps but the newest `keep`, the best by validation loss and `spare`; manifests go first.

    Steps without a manifest before the newest one are what killed saves left: they go too, or they would fill the disk.
    """
    manifests = committed(out)
    for name in step_names(out):
        if manifests and age(name) < age(manifests[-1].name) and not fs.exists(fs.join(out, name, MANIFEST)):
            fs.delete_folder(fs.join(out, name))
    scored = [m for m in manifests if m.val_loss is not None]
    best = min(scored, key=lambda m: (m.val_loss, -m.step)).name if scored else None
    for m in manifests[:-keep]:
        if m.name not in (best, spare):
            fs.delete_folder(fs.join(out, m.name), first=MANIFEST)


# ---- loading --------------------------------------------------------------------------------------------------------


def load_newest(
    places: Iterable[str], warn: Callable[[str], None], *, also: Iterable[str] = (), promised: Mapping[str, Collection[str]] = {},
) -> Checkpoint | None:  # fmt: skip
    """The newest step in any of the `places` whose every byte proves right; the first place is asked first.

    Damaged ones are reported and set aside under quarantine/. `also` names step folders that a listing may not show yet.
    `promised` has those, by place, that were reported as saved: without a manifest they are damaged too.
    None when no step was ever committed. Raises DataError when steps existed and none is sound: never a silent restart.
    """
    places, damaged = tuple(places), 0
    found = {(place, name) for place in places for name in (*step_names(place), *filter(STEP_NAME.fullmatch, also))}
    for place, name in sorted(found, key=lambda f: (age(f[1]), -places.index(f[0])), reverse=True):
        there = fs.exists(fs.join(place, name, MANIFEST))
        if not there and not (name in promised.get(place, ()) and _has_parts(fs.join(place, name))):
            continue  # a save that was killed before it was promised, or one that was deleted
        try:
            if not there:
                raise DataError(f"{MANIFEST} is missing")
            manifest = read_manifest(place, name)
            if manifest is None:
                raise DataError(f"{MANIFEST} is not whole")
            return load(place, manifest)
        except DataError as e:
            if isinstance(e, NewerFormat):
                raise
            damaged += 1
            aside = fs.join(place, "quarantine", f"{name}-{secrets.token_hex(4)}")
            try:
                fs.move_folder(fs.join(place, name), aside)
                said = f"set aside as {fs.redact(aside)}"
            except StoreError as why:  # a place that is read only: it is passed over at every start
                said = f"passed over, it cannot be set aside: {why}"
            warn(f"checkpoint {name} is damaged ({e}); {said}")
    if damaged or any(STEP_NAME.match(e.name) for p in places for e in fs.list_folder(fs.join(p, "quarantine"))):
        raise DataError(f"{fs.redact(places[-1])}: every checkpoint is damaged and set aside under quarantine/: "
                        "restore one, or start again with another --out")  # fmt: skip
    if lost := {name for names in promised.values() for name in names}:
        raise DataError(f"{fs.redact(places[-1])}: no checkpoint is left, though {max(lost, key=age)} was reported as saved: "
                        "restore it, or start again with another --out")  # fmt: skip
    return None


def _has_parts(folder: str) -> bool:
    return any(fs.exists(fs.join(folder, name)) for name in PARTS)


def load(out: str, manifest: Manifest, parts: tuple[str, ...] = PARTS) -> Checkpoint:
    """One step, or some `parts` of it, each proved against its sha256. Raises DataError naming the part that differs."""
    url = fs.join(out, manifest.name)
    in_place = fs.is_local(out) and not drive.holds(fs.local_path(out))
    try:
        with contextlib.nullcontext() if in_place else _staging(out) as folder:
            paths = {name: _proved(fs.join(url, name), manifest.parts[name], folder) for name in parts}
            tensors = {name: load_file(path) for name, path in paths.items() if name in TENSOR_PARTS}
            state = parse_json(paths["state.json"].read_bytes())
        _check_state(state, manifest)
        return Checkpoint(manifest, out, tensors, state)
    except (SafetensorError, ValueError) as e:
        raise DataError(f"{fs.redact(url)}: unreadable ({e})") from e


def _check_state(state: Any, manifest: Manifest) -> None:
    """Raises ValueError unless state.json has the fields that are relied on, in their types: it is untrusted input."""
    if not isinstance(state, dict):
        raise ValueError("state.json is no object")
    number = (int, float)
    kinds = {"step": int, "elapsed_s": number, "val_loss": (*number, type(None)), "scaler": dict, "config": dict,
             "model": dict, "data": dict}  # fmt: skip
    for name, kind in kinds.items():
        if not isinstance(state.get(name), kind):
            raise ValueError(f"state.json: {name} is {type(state.get(name)).__name__}")
    for name in ("guard", "machine"):  # the first programs wrote none
        if not isinstance(state.get(name, {}), dict):
            raise ValueError(f"state.json: {name} is {type(state[name]).__name__}")
    if state["step"] != manifest.step:
        raise ValueError(f"state.json is of step {state['step']}")
    if not isinstance(state["data"].get("fingerprint"), str) or not isinstance(state["data"].get("vocab_size"), int):
        raise ValueError("state.json: data has no fingerprint or vocab_size")


@contextlib.contextmanager
def _staging(out: str) -> Iterator[Path]:
    """Where the fetched parts of a remote run lie while they are read: a folder of its own, for a chat with the run must not
    disturb its trainer's start. What killed loads left is removed while nobody loads.
    """
    place = default_cache() / "staging" / hashlib.sha256(out.encode()).hexdigest()[:16]
    with contextlib.ExitStack() as stack:
        try:
            fs.make_folder(place)
            lock = stack.enter_context(open(place / ".lock", "ab"))
            with contextlib.suppress(OSError):  # another one loads, or a mount without locks
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                for left in place.glob("load-*"):
                    shutil.rmtree(left, ignore_errors=True)
            with contextlib.suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_SH)
            folder = Path(
                stack.enter_context(tempfile.TemporaryDirectory(prefix="load-", dir=place, ignore_cleanup_errors=True))
            )
        except OSError as e:
            raise StoreError(f"{place}: cannot be written: {e.strerror or e}") from e
        yield folder


def _proved(url: str, part: dict[str, Any], folder: Path | None) -> Path:
    """A local path with exactly the bytes of the manifest: the file itself, or a copy that is fetched to the `folder`.

    A Drive is copied from: what it fails to give now is tried again, and what was proved is what is then read.
    """
    if folder is None:
        path = fs.local_path(url)
        _prove(path, part)
        return path
    copy = folder / Path(url).name
    try:
        fs.get_file(url, copy, sha256=part["sha256"])
    except NotFound as e:
        raise DataError(f"{Path(url).name} is missing") from e
    return copy


def _prove(path: Path, part: dict[str, Any]) -> None:
    """Raise DataError unless the file has the size and the sha256 of the manifest."""
    if not path.is_file():
        raise DataError(f"{path.name} is missing")
    try:
        if path.stat().st_size != part["bytes"]:
            raise DataError(f"{path.name} has {path.stat().st_size} bytes, expected {part['bytes']}")
        if fs.sha256_file(path) != part["sha256"]:
            raise DataError(f"{path.name} has another sha256 than its manifest")
    except OSError as e:  # a bad sector
        raise DataError(f"{path.name} cannot be read: {e.strerror or e}") from e
