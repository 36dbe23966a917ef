"""What can stop a run, or cost it hours later, looked at before anything is paid for. Each check leaves nothing behind."""

import contextlib
import ctypes
import errno
import importlib.metadata
import os
import re
import secrets
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from cli.errors import USER_ERRORS
from cli.progress import count
from store import drive, fs, retry
from store.shards import default_cache
from train.precision import Machine

ROOT = Path(__file__).resolve().parent.parent
PATIENCE_S = 10.0  # for a look at storage: a mistyped bucket fails as one does whose server restarts
OUR_SHARE = 0.1  # of a GPU's memory that somebody else may hold before it is worth a word


@dataclass(frozen=True)
class Check:
    """One line of the report. Without `ok` the run would fail: `text` says what to set right."""

    name: str
    text: str
    ok: bool = True


def out_of(url: str) -> Check:
    """Whether files can be written, read back and removed where the run is to live. The probe leaves nothing."""
    where = fs.redact(url)
    home = _existing(fs.local_path(url)) if fs.is_local(url) else None
    probe = fs.join(str(home) if home else url, f".probe-{secrets.token_hex(4)}.tmp")
    data = secrets.token_bytes(1024)
    try:
        with retry.patience(PATIENCE_S):
            fs.put_bytes(probe, data)  # a whole one, or none that would have to be removed
            try:
                if fs.read_bytes(probe) != data:
                    return Check(
                        "out", f"{where} gave back other bytes than were written: give another --out", ok=False
                    )
            finally:
                fs.delete(probe)
            if fs.exists(probe):
                return Check("out", f"{where}: what is removed stays: old checkpoints would fill it", ok=False)
    except USER_ERRORS as e:
        return Check("out", f"cannot be written: {e}", ok=False)
    return Check("out", f"{where} can be written, read and cleaned up")


def room(place: Path, n_bytes: int, what: str) -> Check:
    """Whether `n_bytes` more fit below a local folder: by its disk, and by asking for them, which a quota answers too."""
    name = "Drive" if drive.holds(place) else "disk"
    there = _existing(place)
    try:
        free = shutil.disk_usage(there).free
    except OSError as e:
        return Check(name, f"{there}: free space is not told ({e.strerror})")
    needs = f"{what} take {count(n_bytes)}B"
    if free < n_bytes:
        return Check(name, f"{there} has {count(free)}B free, {needs}: make room, or give another place", ok=False)
    refused = None if drive.holds(place) else _reserve(there, n_bytes)
    if refused:
        return Check(
            name, f"{there} has {count(free)}B free, but {needs} and were refused ({refused}): a quota?", ok=False
        )
    return Check(name, f"{there} has {count(free)}B free; {needs}")


def _reserve(folder: Path, n_bytes: int) -> str | None:
    """Ask for that many bytes in a file without a name, and give them back. What refused them; None where nothing did.

    The system call itself: where it is not supported, the C library's posix_fallocate would write every block.
    """
    if not sys.platform.startswith("linux") or not hasattr(os, "O_TMPFILE"):
        return None
    try:
        fd = os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o600)
    except OSError:
        return None  # a file system without such files; writing there is checked by itself
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.fallocate(fd, 0, ctypes.c_int64(0), ctypes.c_int64(n_bytes)) == 0:
            return None
        code = ctypes.get_errno()
        return os.strerror(code) if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else None
    finally:
        os.close(fd)


def _existing(path: Path) -> Path:
    path = path.absolute()
    return next(p for p in (path, *path.parents) if p.is_dir())


def cache(folder: Path | None, n_bytes: int, what: str) -> Check:
    """Room for `what` on this machine, in the cache."""
    return room(folder or default_cache(), n_bytes, what)


def versions() -> Check:
    """What requirements.txt asks for, against what is installed."""
    wrong = []
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        if m := re.match(r"([\w-]+)>=([\d.]+)", line):
            try:
                found = importlib.metadata.version(m[1])
            except importlib.metadata.PackageNotFoundError:
                wrong.append(f"{m[1]} is missing")
                continue
            if _numbers(found) < _numbers(m[2]):
                wrong.append(f"{m[1]} is {found}, expected {m[2]} or later")
    if wrong:
        return Check("versions", f"{'; '.join(wrong)}: pip install -r requirements.txt", ok=False)
    return Check("versions", f"Python {sys.version.split()[0]}, torch {torch.__version__}; requirements.txt is met")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version.split("+")[0])[:3])


def driver(machine: Machine) -> Check:
    """The GPU as the driver sees it: its version, faults, and who else holds memory there."""
    told = _nvidia_smi("driver_version,ecc.errors.uncorrected.volatile.total")
    if machine.device.type != "cuda":
        if told and machine.device.type == "cpu":
            why = (
                "this torch was built without CUDA"
                if torch.version.cuda is None
                else "its driver is too old for this torch"
            )
            return Check(
                "driver", f"there is an NVIDIA GPU (driver {told[0]}), but torch cannot use it: {why}", ok=False
            )
        return Check("driver", f"none needed: trains on {machine.name}")
    free, total = torch.cuda.mem_get_info(machine.device)
    version = told[0] if told else "unknown"
    if told and told[1].isdigit() and int(told[1]):
        return Check("driver", f"{machine.name} reports {told[1]} uncorrectable memory errors: rent another", ok=False)
    held = total - free
    others = f"; {count(held)}B of its memory are held already" if held > OUR_SHARE * total else ""
    return Check("driver", f"{machine.name}, {count(total)}B, driver {version}, CUDA {torch.version.cuda}{others}")


def _nvidia_smi(fields: str) -> list[str] | None:
    """Those fields of the first GPU; None where there is no driver."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=20)
        if ran.returncode == 0 and ran.stdout.strip():
            return [field.strip() for field in ran.stdout.splitlines()[0].split(",")]
    return None


def device_bytes(machine: Machine) -> int:
    """Free memory of a CUDA GPU, before this process holds any there."""
    return torch.cuda.mem_get_info(machine.device)[0]


def device_memory(machine: Machine, needed: int, host_bytes: int) -> Check:
    """Whether the estimate fits the GPU, or this machine's memory where it trains on a CPU."""
    if machine.device.type == "cuda":
        has, place = device_bytes(machine), machine.name
    else:
        has, place = host_bytes, "this machine"
    if needed > has:
        text = (
            f"{place} has {count(has)}B free, the estimate is {count(needed)}B: give a smaller --micro-batch or --model"
        )
        return Check("memory", text, ok=False)
    return Check("memory", f"{place} has {count(has)}B free; the estimate is {count(needed)}B")
