"""What torch.compile made, kept with the run: a restart on another machine of the same kind need not compile again.

    OUT/compile/<key>.tar.zst   inductor's whole folder: cold 53 s, with it 3.4 s, torch's own artifact blob 28 s (measured)
    OUT/compile/<key>.json      {"bytes", "sha256", "signature", "time"}, written last

Such a folder holds machine code and pickles: unpacking one and compiling is running it. So each is signed with a secret of
the user's (`secret`), and nothing else is ever unpacked: a run folder from somebody else can at worst compile anew.
"""

import contextlib
import hashlib
import hmac
import json
import os
import platform
import secrets
import shutil
import tarfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import torch
import zstandard

from gpt.model import GPTConfig
from store import drive, fs
from store.errors import StoreError
from store.retry import patience
from store.shards import default_cache
from store.untrusted import parse_json
from train import config as settings
from train.config import TrainConfig
from train.folder import RunFolder
from train.precision import Machine

FOLDER = "TORCHINDUCTOR_CACHE_DIR"  # where inductor looks; triton's folder lies inside
THEIRS = os.environ.get(FOLDER)  # read now: torch sets it to a default of its own as soon as its compiler is imported
PATIENCE_S = 60.0  # compiling takes no longer than that
WHOLE = "whole"  # a file that says that a first step has passed with this folder
SECRET = "PERENNIAL_COMPILE_KEY"
ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("gpt/*.py", "train/step.py", "train/precision.py")  # what is compiled, and how
MOST_STORED, MOST_BYTES, MOST_FILES = 256 << 20, 1 << 30, 20_000  # 12 layers: 4 MB, 100 files
KEPT = 4  # kinds of machine, shapes or versions: the oldest others go
UNUSABLE = (StoreError, OSError, ValueError, KeyError, TypeError, tarfile.TarError, zstandard.ZstdError)


class CompileCache:
    """Inductor's folder for one kind of machine, model and program: `restore` before the first compile, `keep` after."""

    def __init__(self, config: TrainConfig, shape: GPTConfig, machine: Machine, folder: RunFolder) -> None:
        cache = config.cache_folder or default_cache()
        self.key = cache_key(config, shape, machine)
        self.path, self.url, self.run_id = cache / "compiled" / self.key, fs.join(folder.url, "compile"), folder.run_id
        self.on = config.compile_cache == "on" and not THEIRS
        self.secret = secret(cache) if self.on else b""
        self.damaged = True  # the run's copy, or there is none
        self.thread: threading.Thread | None = None

    def restore(self) -> str:
        """Lead torch to this folder, filled from the run's copy where it is new here. Returns off, cold or warm."""
        if not self.on:
            return "off"
        os.environ[FOLDER] = str(self.path)
        os.environ.pop("TRITON_CACHE_DIR", None)  # then it lies in inductor's folder
        if (self.path / WHOLE).exists():
            self.damaged = False
            return "warm"
        if self.path.exists():
            return "cold"  # killed while it compiled: what is there already is used
        try:
            with patience(PATIENCE_S):
                note = self._note(self.key)
                if note["bytes"] > MOST_STORED:
                    return "cold"
                archive = fs.join(self.url, f"{self.key}.tar.zst")
                fetched = self.path.with_name(f".{self.key}.{os.getpid()}.tar.zst.tmp")
                try:
                    fs.get_file(archive, fetched, sha256=note["sha256"])
                    unpack(fetched, self.path)
                finally:
                    fetched.unlink(missing_ok=True)
            self.damaged = False
            return "warm"
        except UNUSABLE:
            return "cold"

    def keep(self) -> None:
        """Store a copy with the run, in the background. Nothing waits for it, and where it fails nothing is lost."""
        if self.on and self.path.is_dir():  # no such folder: a backend that keeps nothing
            self.thread = threading.Thread(target=self._keep, daemon=True, name="compile-cache")
            self.thread.start()

    def wait(self, timeout_s: float) -> None:
        """Give `keep` that long to finish."""
        if self.thread is not None:
            self.thread.join(timeout_s)

    def _keep(self) -> None:
        packed = self.path.with_name(f".{self.key}.{os.getpid()}.tar.zst.tmp")
        try:
            fs.sync_tree(self.path)  # a file cut off by a power cut, and yet marked, would fail every start
            (self.path / WHOLE).write_bytes(b"")
            with contextlib.suppress(*UNUSABLE):
                if not self.damaged and self._note(self.key):
                    return
            pack(self.path, packed)
            if packed.stat().st_size > MOST_STORED:
                return
            note = {"bytes": packed.stat().st_size, "sha256": fs.sha256_file(packed), "time": time.time()}
            note["signature"] = self._sign(self.key, note)
            fs.put_file(fs.join(self.url, f"{self.key}.tar.zst"), packed)
            fs.put_bytes(fs.join(self.url, f"{self.key}.json"), json.dumps(note).encode())
            self._thin_out()
        except UNUSABLE:
            return
        finally:
            packed.unlink(missing_ok=True)

    def _note(self, key: str) -> dict[str, Any]:
        """What is recorded of an archive of that size. Raises one of UNUSABLE unless our secret signed it for this run."""
        note = parse_json(fs.read_bytes(fs.join(self.url, f"{key}.json")))
        if not hmac.compare_digest(note["signature"], self._sign(key, note)):
            raise ValueError("signed with another secret, or for another run")
        if fs.size(fs.join(self.url, f"{key}.tar.zst")) != note["bytes"]:
            raise ValueError("another archive than this note's")
        return note

    def _sign(self, key: str, note: dict[str, Any]) -> str:
        signed = json.dumps([self.run_id, key, note["bytes"], note["sha256"], note["time"]])
        return hmac.digest(self.secret, signed.encode(), "sha256").hex()

    def _thin_out(self) -> None:
        times = {}
        for name in (e.name for e in fs.list_folder(self.url)):
            if name.endswith(".json"):
                try:
                    times[name.removesuffix(".json")] = float(self._note(name.removesuffix(".json"))["time"])
                except UNUSABLE:
                    times[name.removesuffix(".json")] = 0.0  # of no use to us
        for key in sorted(times, key=times.__getitem__)[:-KEPT]:
            fs.delete(fs.join(self.url, f"{key}.json"))
            fs.delete(fs.join(self.url, f"{key}.tar.zst"))


def cache_key(config: TrainConfig, shape: GPTConfig, machine: Machine) -> str:
    """A name for all that decides what is compiled and where its machine code can run."""
    gpu = [machine.name, torch.cuda.get_device_capability(machine.device)] if machine.device.type == "cuda" else []
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = None
    parts = [
        asdict(shape), config.lora_rank, config.micro_batch, config.batch % config.micro_batch, config.checkpoint_activations, machine.precision, gpu, triton,
        torch.__version__, torch.version.cuda, platform.python_version(), platform.machine(), platform.libc_ver(), _cpu(),
        [hashlib.sha256(p.read_bytes()).hexdigest() for pattern in SOURCES for p in sorted(ROOT.glob(pattern))],
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def _cpu() -> str:
    """The processor's instructions: inductor compiles for exactly this one, on another its code is a crash."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def secret(cache: Path) -> bytes:
    """What signs the archives: $PERENNIAL_COMPILE_KEY, or a random one in the user's cache (on Colab: the user's Drive)."""
    if given := os.environ.get(SECRET):
        return given.encode()
    mine = drive.MOUNT / "MyDrive"
    home = mine if settings.on_colab() and mine.is_dir() else cache
    path = home / ".perennial-compile-key"
    made = secrets.token_hex(32).encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError), open(path, "xb", opener=lambda p, how: os.open(p, how, 0o600)) as f:
            f.write(made)
        kept = path.read_bytes()
    except OSError:
        return made  # it can be kept nowhere: what is signed today serves nobody tomorrow
    return kept if len(kept) == len(made) else made  # one that was cut off, or is just being written, is none


# ---- the archive ----------------------------------------------------------------------------------------------------


def pack(folder: Path, target: Path) -> None:
    """Everything below a folder but locks and half-written files, as a tar.zst."""

    def wanted(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        name = Path(member.name).name
        return None if name == "locks" or name.endswith((".lock", ".tmp")) or "tmp." in name else member

    with (
        open(target, "wb") as f,
        zstandard.ZstdCompressor(level=3).stream_writer(f) as z,
        tarfile.open(fileobj=z, mode="w|") as tar,
    ):
        tar.add(folder, arcname=".", filter=wanted)


def unpack(archive: Path, folder: Path) -> None:
    """Restore a packed folder, which appears only when whole. Raises ValueError, OSError, TarError or ZstdError.

    Only plain files and folders inside it, no more of them and no larger than MOST_FILES and MOST_BYTES.
    """
    fresh = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    try:
        with (
            open(archive, "rb") as f,
            zstandard.ZstdDecompressor().stream_reader(f) as z,
            tarfile.open(fileobj=_Bounded(z), mode="r|") as tar,
        ):
            tar.extraction_filter = getattr(tarfile, "data_filter", None)  # from Python 3.11.4 on; Debian 12 has 3.11.2
            tar.extractall(fresh, members=_plain(tar))
        fs.sync_tree(fresh)  # the mark is in it
        os.rename(fresh, folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _plain(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The members, each a file or a folder below the one they are unpacked to; a ValueError at the first that is not."""
    for count, member in enumerate(tar):
        name = PurePosixPath(member.name)
        if count >= MOST_FILES or not (member.isreg() or member.isdir()) or name.is_absolute() or ".." in name.parts:
            raise ValueError(f"{member.name}: not a plain file of this folder, or one of too many")
        member.uid, member.gid, member.uname, member.gname = os.getuid(), os.getgid(), "", ""
        member.mode &= 0o755
        yield member


class _Bounded:
    """A reader that gives up after MOST_BYTES: a few kB of zstd can stand for terabytes."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream, self.left = stream, MOST_BYTES

    def read(self, size: int) -> bytes:
        data = self.stream.read(size)
        self.left -= len(data)
        if self.left < 0:
            raise ValueError("larger unpacked than such a cache can be")
        return data
