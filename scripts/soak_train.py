"""Train while everything goes wrong, and end with the very weights, moments and losses of a quiet run.

    python scripts/soak_train.py                                             # a generated corpus, about a minute
    python scripts/soak_train.py --data tokens --train "--model small --steps 4000" --minutes 60 --every 20 --out gs

A misfortune comes every few seconds, at random: kill -9, SIGTERM once or twice, a frozen process, a second trainer, damaged
checkpoints, a machine that is replaced, a full disk; with `--out gs` a bucket (a server on loopback) that answers 503, drops
connections, damages bytes or falls silent. After each the same command is run again. Checked all the way: a start goes on from
the last step that was reported stored, unless the soak itself destroyed that one, and no start needs anything but the command.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # Python put this file's folder first in sys.path: the project's root belongs there
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import contextlib
import multiprocessing
import os
import random
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from cli import flags
from cli.errors import UserError
from cli.flags import flag
from cli.progress import duration
from scripts import demo_corpus
from train import checkpoint
from train.exits import STOPPED, UNSAVED
from train.folder import read_lines

ROOT = Path(__file__).resolve().parent.parent
SMALL = (
    "--model tiny --n-embd 32 --n-head 2 --block-size 32 --batch 8 --device cpu --log-every 20 --eval-every 500 "
    "--eval-tokens 512 --sample-every 0 --steps 6000 --dropout 0.1"
)
SAVING = "--save-every 25 --save-every-minutes 0 --keep 3"
FORGIVEN = (
    0,
    STOPPED,
    UNSAVED,
    -signal.SIGKILL,
    -signal.SIGTERM,
    128 + signal.SIGTERM,
)  # exit codes that misfortunes may lead to


@dataclass(frozen=True)
class SoakFlags:
    """Flags of scripts/soak_train.py."""

    data: str = flag("", "a token dataset (default: made of a generated corpus)")
    train: str = flag(SMALL, "flags of both runs, in one string")
    saving: str = flag(SAVING, "flags of saving, in one string")
    out: Literal["local", "gs"] = flag("local", "where the run lives: a folder, or a bucket on loopback")
    every: float = flag(3.0, "mean seconds between misfortunes")
    minutes: float = flag(1.0, "after this long the run is left in peace, to end")
    count: int = flag(0, "leave it in peace after so many misfortunes, whatever the time; 0: by --minutes alone")
    kinds: tuple[str, ...] = flag((), "only these misfortunes (default: all that are possible)")
    warm: bool = flag(False, "fork every start from a process that has imported torch, which takes seconds of each")
    seed: int = flag(1, "seed of kinds and moments")
    folder: str = flag("", "where the scratch folder is made (default: where temporary files go)")


class Broken(Exception):
    """An invariant does not hold."""


FORKS = multiprocessing.get_context("forkserver")


class Forked:
    """A program's process that begins where its imports are done; the part of subprocess.Popen that is used here."""

    def __init__(self, command: list[str], log: Path) -> None:
        self.process = FORKS.Process(target=_train_here, args=(command[2:], str(log)))
        self.process.start()

    def poll(self) -> int | None:
        """The exit code, negative for a signal's; None while it runs."""
        return self.process.exitcode

    def wait(self, timeout: float) -> int:
        """The exit code, once it has ended."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired("train/run.py", timeout)
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        """Nothing where it has ended."""
        if self.process.exitcode is None:
            os.kill(self.process.pid, number)


def _train_here(arguments: list[str], log: str) -> None:
    """train/run.py in this process, as its last lines do it."""
    from train import clock, preempt, run

    preempt.leave_at_once()
    clock.START_S = time.monotonic()
    with open(log, "a") as f:
        os.dup2(f.fileno(), 1)
        os.dup2(f.fileno(), 2)
    flags.run(lambda: run.main(arguments), outlives_stdout=True, at_once=True)


@dataclass
class Soak:
    """One run under misfortune: its process, its places, what was promised and what was destroyed."""

    args: SoakFlags
    folder: Path
    data: Path
    rng: random.Random
    server: "Bucket | None"
    process: "subprocess.Popen | Forked | None" = None
    starts: int = 0
    filled: bool = False  # the disk was full since the last start
    attempt: int = 0  # the newest that was seen
    promised: dict[tuple[str, str], int] = field(default_factory=dict)  # (tier, step folder) reported as saved -> step
    done: Counter = field(default_factory=Counter)

    @property
    def cache(self) -> Path:
        """This machine's cache; gone when the machine is replaced."""
        return self.folder / "disk" / "machine"

    @property
    def out(self) -> str:
        """Where the run lives."""
        return "gs://soak/run" if self.server else str(self.folder / "disk" / "run")

    def command(self) -> list[str]:
        """The same every time."""
        return [sys.executable, str(ROOT / "train/run.py"), "--data", str(self.data), "--out", self.out, "--cache", str(self.cache),
                "--resume", *self.args.train.split(), *self.args.saving.split()]  # fmt: skip

    def environment(self) -> dict[str, str]:
        """Short patience, so that an outage of seconds is a long one; where the bucket is."""
        short = {"PERENNIAL_RETRY_FOR_S": "4", "PERENNIAL_LEASE_S": "4"}
        return {
            **os.environ,
            "PERENNIAL_CACHE": str(self.cache),
            **short,
            **(self.server.environment if self.server else {}),
        }

    def start(self) -> None:
        """Run the command, its output at the end of a log."""
        self.starts, self.filled = self.starts + 1, False
        with open(self.folder / "log.txt", "a") as log:
            log.write(f"\n---- start {self.starts}\n")
            log.flush()
            if self.args.warm:
                self.process = Forked(self.command(), self.folder / "log.txt")
                return
            self.process = subprocess.Popen(self.command(), stdout=log, stderr=log, env=self.environment())

    def end(self, number: int | None = None) -> int:
        """Send a signal, if one is given, and wait for the process to end."""
        if number is not None:
            self.process.send_signal(number)
        code = self.process.wait(120)
        if code not in FORGIVEN and not (code == 2 and self.filled):  # a start that met a full disk says so and ends
            raise Broken(f"exit code {code}: see {self.folder / 'log.txt'}")
        return code

    def steps(self) -> list[Path]:
        """The step folders on this machine, oldest first."""
        place = self.tier()
        return [place / n for n in checkpoint.step_names(str(place))] if place.is_dir() else []

    def tier(self) -> Path:
        """The local folder with checkpoints and logs."""
        if not self.server:
            return Path(self.out)
        return next((self.cache / "runs").glob("*"), self.cache / "none")

    def logged_starts(self) -> list[dict[str, object]]:
        """The starts that events.jsonl tells of."""
        return [e for e in read_lines(self.tier() / "events.jsonl") if e["event"] == "start"]

    def trained(self) -> int:
        """Steps logged so far."""
        return len(read_lines(self.tier() / "metrics.jsonl"))


# ---- misfortunes: each takes a running process and leaves one that has ended, or still runs --------------------------


def kill(soak: Soak) -> None:
    """SIGKILL: no warning at all."""
    soak.end(signal.SIGKILL)


def stop(soak: Soak) -> None:
    """SIGTERM: what a spot VM and `docker stop` send."""
    soak.end(signal.SIGTERM)


def stop_twice(soak: Soak) -> None:
    """A second one within a second: leave at once."""
    soak.process.send_signal(signal.SIGTERM)
    time.sleep(soak.rng.random() * 0.3)
    if soak.process.poll() is None:
        soak.process.send_signal(signal.SIGTERM)
    soak.end()


def freeze(soak: Soak) -> None:
    """SIGSTOP, and SIGCONT after some seconds: a paused VM."""
    soak.process.send_signal(signal.SIGSTOP)
    time.sleep(1 + 4 * soak.rng.random())
    soak.process.send_signal(signal.SIGCONT)


def second_trainer(soak: Soak) -> None:
    """The same command in another window: refused, and the first goes on."""
    second = subprocess.run(soak.command(), env=soak.environment(), capture_output=True, text=True, timeout=120)
    if soak.process.poll() is None and second.returncode != 2:
        raise Broken(f"a second trainer ended with {second.returncode}: {second.stderr[-500:]}")


def damage(soak: Soak) -> bool:
    """Killed, and a file of the newest checkpoint here is not what it was. False where that would leave no good one."""
    kill(soak)
    shutil.rmtree(soak.tier() / "quarantine", ignore_errors=True)  # what was damaged before has been looked at
    steps = [s for s in soak.steps() if (s / checkpoint.MANIFEST).exists()]
    if len(steps) < 2 and not any(tier == "remote" and step for (tier, _), step in soak.promised.items()):
        return False  # a good one must remain, here or in the bucket
    for step in steps[-1:]:
        path = step / soak.rng.choice((*checkpoint.PARTS, checkpoint.MANIFEST))
        raw = bytearray(path.read_bytes())
        at, how = soak.rng.randrange(len(raw)), soak.rng.choice(("bit", "truncated", "empty", "page", "missing"))
        raw[at] ^= 1 << soak.rng.randrange(8)
        changed = {"bit": raw, "truncated": raw[:at], "empty": b"", "page": raw[:at] + bytes(len(raw) - at)}
        soak.promised["local", step.name] = 0
        if how == "missing":
            path.unlink()
        else:
            path.write_bytes(changed[how])
    return bool(steps)


def replaced_machine(soak: Soak) -> None:
    """The machine goes, with its disk; only what the bucket holds is left."""
    kill(soak)
    newest_promised(soak)
    soak.promised |= dict.fromkeys((p for p in soak.promised if p[0] == "local"), 0)
    shutil.rmtree(soak.cache)


def full_disk(soak: Soak) -> None:
    """No space on the disk of the run for some seconds."""
    soak.filled = True
    free = shutil.disk_usage(soak.folder / "disk").free
    filler = soak.folder / "disk" / "filler"
    with open(filler, "wb") as f, contextlib.suppress(OSError):  # the run was quicker, and has filled it itself
        os.posix_fallocate(f.fileno(), 0, max(free - (64 << 10), 1))
    time.sleep(1 + 3 * soak.rng.random())
    if soak.rng.random() < 0.5:
        soak.end(signal.SIGKILL)
    filler.unlink()


def silent_bucket(soak: Soak) -> None:
    """The server takes connections and never answers."""
    soak.server.process.send_signal(signal.SIGSTOP)
    time.sleep(2 + 6 * soak.rng.random())
    soak.server.process.send_signal(signal.SIGCONT)


def failing_bucket(soak: Soak) -> None:
    """Of the requests half end badly for some seconds: 503, 429, dropped connections, truncated or changed bytes."""
    soak.server.faults(0.5)
    time.sleep(2 + 6 * soak.rng.random())
    soak.server.faults(0.0)


EVERYWHERE = (kill, kill, stop, stop_twice, freeze, second_trainer, damage)
WITH_BUCKET = (replaced_machine, silent_bucket, failing_bucket)


class Bucket:
    """tests/fake_gcs.py as a process of its own."""

    def __init__(self, folder: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.fake_gcs"], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        self.url = self.process.stdout.readline().strip()
        names = ("STORAGE_EMULATOR_HOST", "FSSPEC_GCS_TOKEN", "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT")
        self.environment = dict(zip(names, (self.url, "anon", "false"), strict=True))

    def faults(self, rate: float) -> None:
        """The share of requests that fail from now on."""
        urllib.request.urlopen(
            urllib.request.Request(f"{self.url}/faults?rate={rate}", method="PUT"), timeout=10
        ).close()


# ---- the soak -------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """Returns 0 when every invariant held."""
    args, _ = flags.parse(SoakFlags, argv, prog="soak_train.py", description=__doc__.split("\n")[0])
    folder = Path(tempfile.mkdtemp(prefix="soak-train-", dir=args.folder or None))
    (folder / "disk").mkdir()
    mounted = mount_small_disk(folder)
    server = Bucket(folder) if args.out == "gs" else None
    soak: Soak | None = None
    quiet: subprocess.Popen | None = None
    try:
        data = Path(args.data).expanduser().resolve() if args.data else make_data(folder)
        soak = Soak(args, folder, data, random.Random(args.seed), server)
        quiet, wait_for_quiet = start_quiet(soak)
        if server:
            os.environ |= server.environment  # this process looks into the bucket too
        if args.warm:
            os.environ |= soak.environment()  # read by what is imported there, once for all starts
            FORKS.set_forkserver_preload(["train.run"])
        begin_s = time.monotonic()
        misfortunes = list(EVERYWHERE) + ([full_disk] if mounted else []) + (list(WITH_BUCKET) if server else [])
        if args.kinds:
            misfortunes = [m for m in misfortunes if m.__name__ in args.kinds]
        endure(soak, misfortunes)
        compare(wait_for_quiet(), outcome(soak.out, soak.tier()))
        report(soak, time.monotonic() - begin_s)
        return 0
    except Broken as e:
        print(f"broken: {e}; everything is left in {folder}", file=sys.stderr)
        folder = None
        return 1
    finally:
        if quiet:
            quiet.kill()
        if soak and soak.process and soak.process.poll() is None:
            soak.process.send_signal(signal.SIGKILL)
        if server:
            server.process.send_signal(signal.SIGCONT)
            server.process.kill()
        if folder:
            if mounted:
                subprocess.run(["umount", "-l", folder / "disk"], check=False)
            shutil.rmtree(folder, ignore_errors=True)


def mount_small_disk(folder: Path) -> bool:
    """A file system of 1 GB for the run, so that it can be full; False where that is not allowed."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=1g", "tmpfs", folder / "disk"]
    return not subprocess.run(mount, capture_output=True).returncode


def make_data(folder: Path) -> Path:
    """A small real dataset."""
    demo_corpus.main(["--output", str(folder / "corpus.txt")])
    command = [sys.executable, str(ROOT / "prep/tokenize_bpe.py"), "--input", str(folder / "corpus.txt"), "--output",
               str(folder / "tokens"), "--vocab-size", "512", "--compress", "--workers", "1"]  # fmt: skip
    if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
        raise UserError("the dataset could not be made: see the message above")
    return folder / "tokens"


def start_quiet(soak: Soak) -> tuple[subprocess.Popen, Callable[[], dict[str, object]]]:
    """Begin an uninterrupted run beside the other one: (its process, what waits for it and tells its outcome)."""
    out, start_s = soak.folder / "quiet", time.monotonic()
    command = [sys.executable, str(ROOT / "train/run.py"), "--data", str(soak.data), "--out", str(out), "--cache",
               str(soak.folder / "quiet-cache"), *soak.args.train.split(), "--save-every-minutes", "5"]  # fmt: skip
    with open(soak.folder / "quiet.txt", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)

    def wait() -> dict[str, object]:
        if process.wait():
            raise Broken(f"the quiet run failed: {(soak.folder / 'quiet.txt').read_text()[-400:]}")
        print(f"quiet run   there after {duration(time.monotonic() - start_s)}", flush=True)
        return outcome(str(out), out)

    return process, wait


def outcome(out: str, logs: Path) -> dict[str, object]:
    """What two runs must share: the newest checkpoint's tensors, and every logged line, each step once."""
    newest = checkpoint.committed(out)[-1]
    hashes = {name: newest.parts[name]["sha256"] for name in checkpoint.TENSOR_PARTS}
    return {"step": newest.step, **hashes, "metrics": read_lines(logs / "metrics.jsonl")}


def endure(soak: Soak, misfortunes: list[Callable[[Soak], bool | None]]) -> None:
    """One misfortune after another until the time is over, then peace until the run has ended."""
    end_s = time.monotonic() + 60 * soak.args.minutes
    soak.start()
    while time.monotonic() < end_s and (not soak.args.count or soak.done.total() < soak.args.count):
        time.sleep(soak.rng.expovariate(1 / soak.args.every))
        if soak.process.poll() is None:
            misfortune = soak.rng.choice(misfortunes)
            newest_promised(soak)
            print(
                f"{duration(end_s - time.monotonic()):>8} left  step {soak.trained():>6}  {misfortune.__name__}",
                flush=True,
            )
            happened = misfortune(soak) is not False
            soak.done[misfortune.__name__ if happened else "kill"] += 1
        if soak.process.poll() is not None:
            code = soak.end()
            if code == 0:
                return
            promised = newest_promised(soak)
            soak.start()
            check_start(soak, promised)
    for _ in range(20):  # what is under way when peace begins can still cost a start or two
        if soak.end() == 0:
            return
        soak.start()
    raise Broken(f"left in peace it does not end: see {soak.folder / 'log.txt'}")


def newest_promised(soak: Soak) -> int:
    """The highest step that was ever reported as saved in a place that the soak has not destroyed since.

    To be asked before a misfortune too: that may take the log with it.
    """
    soak.attempt = max([soak.attempt, *(e["attempt"] for e in soak.logged_starts())])
    for e in read_lines(soak.tier() / "events.jsonl"):
        if (
            e["event"] == "saved"
            and (e["tier"], name := checkpoint.step_name(e["step"], e["attempt"])) not in soak.promised
        ):
            soak.promised[e["tier"], name] = e["step"]
    return max(soak.promised.values(), default=0)


def check_start(soak: Soak, promised: int) -> None:
    """The start that was just made goes on from at least the step that was promised."""
    limit_s = time.monotonic() + 120
    while time.monotonic() < limit_s and soak.process.poll() is None:
        starts = soak.logged_starts()
        if starts and starts[-1]["attempt"] > soak.attempt:
            if starts[-1]["step"] < promised:
                raise Broken(f"went on from step {starts[-1]['step']}, {promised} had been reported as saved")
            return
        time.sleep(0.05)
    if soak.process.poll() is None:
        raise Broken("a start has not begun to train within two minutes")


def compare(quiet: dict[str, object], found: dict[str, object]) -> None:
    """Raise Broken unless both runs gave the same."""
    different = [name for name in quiet if quiet[name] != found[name]]
    if different:
        raise Broken(f"{', '.join(different)} differ from the quiet run's")


def report(soak: Soak, seconds: float) -> None:
    """The closing lines."""
    events = Counter(e["event"] for e in read_lines(soak.tier() / "events.jsonl"))
    print(f"\n{sum(soak.done.values())} misfortunes in {duration(seconds)}: "
          + ", ".join(f"{n} {name}" for name, n in soak.done.most_common()))  # fmt: skip
    print(f"{soak.starts} starts with `{shlex.join(soak.command()[1:])}`")
    print(f"{events['saved']} saves committed, {events['save_failed']} failed")
    print("equal to the quiet run: weights, moments, random state, every logged loss")


if __name__ == "__main__":
    flags.run(main)
