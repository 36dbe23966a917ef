"""Checkpoints, format version 1: committed by a manifest written last, verified when loaded, no pickle anywhere.

    OUT/step-00012000/model.safetensors  optimizer.safetensors  rng.safetensors  state.json  MANIFEST.json

A step without a valid manifest does not exist: `read_manifest` decides that for loading, listing and retention alike.
"""

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from store import fs
from store.errors import DataError, NotFound, StoreError
from store.shards import default_cache

FORMAT, VERSION = "perennial-checkpoint", 1
MANIFEST = "MANIFEST.json"
TENSOR_PARTS = ("model.safetensors", "optimizer.safetensors", "rng.safetensors")
PARTS = (*TENSOR_PARTS, "state.json")
STEP_NAME = re.compile(r"step-(\d{8,})")


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

    @property
    def name(self) -> str:
        """The step's folder."""
        return step_name(self.step)


@dataclass(frozen=True)
class Checkpoint:
    """A loaded, verified checkpoint, tensors on the CPU."""

    manifest: Manifest
    tensors: dict[str, dict[str, Tensor]]  # by part name
    state: dict[str, Any]


def step_name(step: int) -> str:
    """`step-00012000`."""
    return f"step-{step:08d}"


# ---- what exists ----------------------------------------------------------------------------------------------------


def read_manifest(out: str, name: str) -> Manifest | None:
    """The manifest of a step folder, or None where the step does not exist: no manifest, or not a whole one.

    Raises DataError for a newer format version: going on from an older step would lose work silently.
    """
    try:
        data = json.loads(fs.read_bytes(fs.join(out, name, MANIFEST)))
        if data["format"] != FORMAT or data.pop("sha256") != _manifest_hash(data):
            return None
        if data["version"] > VERSION:
            raise NewerFormat(f"{fs.redact(fs.join(out, name))}: checkpoint format {data['version']} is newer than this "
                            f"program's {VERSION}: update the program")  # fmt: skip
        manifest = Manifest(**data)
        whole = set(manifest.parts) == set(PARTS) and all(
            isinstance(p["bytes"], int) and re.fullmatch("[0-9a-f]{64}", p["sha256"]) for p in manifest.parts.values()
        )
        return manifest if whole and manifest.name == name else None
    except (NotFound, ValueError, KeyError, TypeError, AttributeError):
        return None


def committed(out: str) -> list[Manifest]:
    """The steps that exist, oldest first."""
    found = [read_manifest(out, name) for name in _step_names(out)]
    return sorted((m for m in found if m), key=lambda m: m.step)


def _step_names(out: str) -> list[str]:
    return [e.name for e in fs.list_folder(out) if STEP_NAME.fullmatch(e.name)]


# ---- saving ---------------------------------------------------------------------------------------------------------


def save(
    out: str, *, step: int, run_id: str, attempt: int, val_loss: float | None,
    tensors: dict[str, dict[str, Tensor]], state: dict[str, Any],
) -> Manifest:  # fmt: skip
    """Write and commit one step at any URL. Raises StoreError; then the step does not exist and older ones stay.

    What an earlier, killed save left under the same name is removed first.
    """
    url = fs.join(out, step_name(step))
    fs.delete_folder(url, first=MANIFEST)
    try:
        parts = {name: _write_part(out, url, name, tensors, state) for name in PARTS}
    except StoreError:
        with contextlib.suppress(StoreError):
            fs.delete_folder(url)  # a full disk needs the room more than half a checkpoint does
        raise
    manifest = Manifest(FORMAT, VERSION, step, run_id, attempt, val_loss, parts)
    signed = {**asdict(manifest), "sha256": _manifest_hash(asdict(manifest))}
    fs.put_bytes(fs.join(url, MANIFEST), json.dumps(signed, indent=1).encode())
    return manifest


def _write_part(
    out: str, url: str, name: str, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]
) -> dict[str, Any]:
    """Publish one part whole; its size and sha256."""
    path = (fs.local_path(url) if fs.is_local(url) else _staging(out) / "save") / name
    try:
        with fs.staged(path) as staged:
            if name in TENSOR_PARTS:
                save_file({k: v.detach().contiguous() for k, v in tensors[name].items()}, staged)
            else:
                staged.write_text(json.dumps(state, indent=1), "utf-8")
        part = {"bytes": path.stat().st_size, "sha256": fs.sha256_file(path)}
    except (SafetensorError, OSError) as e:
        raise StoreError(f"{fs.redact(url)}: cannot write {name}: {e}") from e
    fs.put_file(fs.join(url, name), path)
    if not fs.is_local(url):
        path.unlink()
    return part


def _manifest_hash(fields: dict[str, Any]) -> str:
    """sha256 of the manifest's other fields: a flipped bit in the manifest itself must be noticed too."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def retain(out: str, keep: int) -> None:
    """Delete all committed steps but the newest `keep` and the best by validation loss; manifests go first.

    Steps without a manifest before the newest one are what killed saves left: they go too, or they would fill the disk.
    """
    manifests = committed(out)
    for name in _step_names(out):
        if manifests and name < manifests[-1].name and not fs.exists(fs.join(out, name, MANIFEST)):
            fs.delete_folder(fs.join(out, name))
    scored = [m for m in manifests if m.val_loss is not None]
    best = min(scored, key=lambda m: (m.val_loss, -m.step)).step if scored else None
    for m in manifests[:-keep]:
        if m.step != best:
            fs.delete_folder(fs.join(out, m.name), first=MANIFEST)


# ---- loading --------------------------------------------------------------------------------------------------------


def load_newest(out: str, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest step whose every byte proves right; damaged ones are reported and set aside under OUT/quarantine.

    None when no step was ever committed. Raises DataError when steps exist and none is sound: never a silent restart.
    """
    damaged = 0
    for name in sorted(_step_names(out), reverse=True):
        if not fs.exists(fs.join(out, name, MANIFEST)):
            continue  # a save that was killed: it was never promised
        try:
            manifest = read_manifest(out, name)
            if manifest is None:
                raise DataError(f"{MANIFEST} is not whole")
            return load(out, manifest)
        except DataError as e:
            if isinstance(e, NewerFormat):
                raise
            damaged += 1
            aside = fs.join(out, "quarantine", f"{name}-{secrets.token_hex(4)}")
            warn(f"checkpoint {name} is damaged ({e}); set aside as {fs.redact(aside)}")
            fs.move_folder(fs.join(out, name), aside)
    if damaged or any(STEP_NAME.match(e.name) for e in fs.list_folder(fs.join(out, "quarantine"))):
        raise DataError(f"{fs.redact(out)}: every checkpoint is damaged and set aside under quarantine/: "
                        "restore one, or start again with another --out")  # fmt: skip
    return None


def load(out: str, manifest: Manifest, parts: tuple[str, ...] = PARTS) -> Checkpoint:
    """One step, or some `parts` of it, each proved against its sha256. Raises DataError naming the part that differs."""
    url = fs.join(out, manifest.name)
    folder = (
        _staging(out) / f"load-{os.getpid()}"
    )  # of its own: a chat with the run must not disturb its trainer's save
    try:
        paths = {name: _proved(fs.join(url, name), manifest.parts[name], folder / name) for name in parts}
        tensors = {name: load_file(path) for name, path in paths.items() if name in TENSOR_PARTS}
        state = json.loads(paths["state.json"].read_bytes())
        _check_state(state, manifest)
        return Checkpoint(manifest, tensors, state)
    except (SafetensorError, ValueError, RecursionError) as e:
        raise DataError(f"{fs.redact(url)}: unreadable ({e})") from e
    finally:
        shutil.rmtree(folder, ignore_errors=True)


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
    if state["step"] != manifest.step:
        raise ValueError(f"state.json is of step {state['step']}")
    if not isinstance(state["data"].get("fingerprint"), str) or not isinstance(state["data"].get("vocab_size"), int):
        raise ValueError("state.json: data has no fingerprint or vocab_size")


def _staging(out: str) -> Path:
    """Where parts of a remote run lie on their way: one folder per run, so that a killed save leaves at most one state."""
    return default_cache() / "staging" / hashlib.sha256(out.encode()).hexdigest()[:16]


def _proved(url: str, part: dict[str, Any], copy: Path) -> Path:
    """A local path with exactly the bytes of the manifest: the file itself, or a fetched copy."""
    path = fs.local_path(url)
    if not fs.is_local(url):
        try:
            fs.get_file(url, copy, sha256=part["sha256"])
        except NotFound as e:
            raise DataError(f"{Path(url).name} is missing") from e
        return copy
    if not path.is_file():
        raise DataError(f"{path.name} is missing")
    if path.stat().st_size != part["bytes"]:
        raise DataError(f"{path.name} has {path.stat().st_size} bytes, expected {part['bytes']}")
    if fs.sha256_file(path) != part["sha256"]:
        raise DataError(f"{path.name} has another sha256 than its manifest")
    return path
