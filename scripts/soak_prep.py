"""Prepare one corpus in every way and under every misfortune; each way must give the same bytes.

    python scripts/soak_prep.py                                          # a generated corpus, some seconds
    python scripts/soak_prep.py --input corpus.txt --megabytes 100 --kills 20

One worker and many, Ray where it is installed, separate commands in shuffled order; killed at random moments, stopped,
out of disk, without its source: sha256 of every output file is compared. Exits with 1 on a difference.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # Python put this file's folder first in sys.path: the project's root belongs there
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import hashlib
import importlib.util
import itertools
import os
import random
import resource
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from cli import flags
from cli.errors import UserError
from cli.flags import flag
from cli.progress import count, duration
from scripts import demo_corpus

ROOT = Path(__file__).resolve().parent.parent
EXEMPT = {"timing.js"}  # figures of the machine, for people to look at
PASSES = ("clean", "tokenizer", "encode", "write")  # each says so when it ends


@dataclass(frozen=True)
class SoakFlags:
    """Flags of scripts/soak_prep.py."""

    input: str = flag("", "a text file (default: a generated corpus)")
    megabytes: int = flag(24, "how much of it, in millions of bytes")
    workers: tuple[int, ...] = flag((2, 5), "numbers of workers to compare with one")
    num_tasks: int = flag(3, "separate commands, in shuffled order, two at a time")
    kills: int = flag(3, "SIGKILLs of the whole process group, at random moments")
    seed: int = flag(1, "seed of those moments")
    ray: bool = flag(True, "compare Ray too, where it is installed")
    faults: bool = flag(True, "also SIGTERM, a full disk, a source that vanishes")
    prep: str = flag("--vocab-size 1000 --compress --shard-tokens 1M --tokenizer-sample 8M", "flags of every run")
    folder: str = flag("", "where the scratch folder is made (default: where temporary files go)")


class Broken(Exception):
    """A run that did not do what it must."""


class Run:
    """prep as a real process in a group of its own."""

    numbers = itertools.count()

    def __init__(self, scratch: Path, *arguments: object, **options: object) -> None:
        number = next(self.numbers)
        self.said, self.complained = scratch / f"{number}.out", scratch / f"{number}.err"
        command = [sys.executable, str(ROOT / "prep" / "tokenize_bpe.py"), *map(str, arguments)]
        with open(self.said, "wb") as out, open(self.complained, "wb") as err:
            self.process = subprocess.Popen(command, stdout=out, stderr=err, start_new_session=True, **options)

    def end(self, code: int = 0, lines: int = 0) -> str:
        """Wait for it; its complaint but for warnings. Raises Broken on another exit code or another number of lines."""
        found = self.process.wait()
        said = self.complained.read_text().splitlines(keepends=True)
        complaint = "".join(line for line in said if not line.startswith("warning: "))  # about the text, not the run
        if found != code or complaint.count("\n") != lines:
            raise Broken(f"exit code {found}, expected {code} and {lines} lines: {complaint[-2000:]}")
        return complaint.strip()

    def kill(self) -> str:
        """SIGKILL for all of it; the pass that this ended."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        begun = self.said.read_text().splitlines()
        done = {line.split()[0] for line in begun if line}
        return next((p for p in PASSES if p not in done), "end") if begun else "start"


@dataclass
class Soak:
    """One corpus and the ways to prepare it. Each way leaves a dataset in `output` and may return a note."""

    scratch: Path
    flags: list[str]
    random: random.Random
    reference: dict[str, str] = field(default_factory=dict)
    dataset_bytes: int = 0
    within_s: float = 0.0  # what an undisturbed run takes
    failed: bool = False

    @property
    def corpus(self) -> Path:
        return self.scratch / "corpus.txt"

    @property
    def output(self) -> Path:
        return self.scratch / "output"

    def start(self, *more: object, output: Path | None = None, **options: object) -> Run:
        fixed = ("--input", self.corpus, "--output", output or self.output, *self.flags)
        return Run(self.scratch, *fixed, *more, **options)

    def way(self, name: str, how: Callable[[], str | None]) -> None:
        """Do it, compare with the first one, print a row of the table."""
        start_s, made, note = time.monotonic(), {}, None
        try:
            note = how()
            made = hashes(self.output)
            if not self.reference:
                self.reference, self.dataset_bytes = made, sum(p.stat().st_size for p in self.output.iterdir())
            differing = sorted(n for n in {*made, *self.reference} if made.get(n) != self.reference.get(n))
            verdict = "same" if not differing else f"DIFFERENT: {', '.join(differing)}"
        except Broken as e:
            verdict = f"FAILED: {e}"
        self.failed |= verdict != "same"
        elapsed_s = time.monotonic() - start_s
        whole = hashlib.sha256(repr(sorted(made.items())).encode()).hexdigest()[:16] if made else ""
        print(f"{name:<25} {duration(elapsed_s):>6}  {len(made):>5}  {whole:<16}  {verdict}  {note or ''}", flush=True)
        shutil.rmtree(self.output, ignore_errors=True)

    # ---- ways -------------------------------------------------------------------------------------------------------

    def workers(self, n: int) -> None:
        """One undisturbed run."""
        start_s = time.monotonic()
        self.start("--workers", n).end()
        self.within_s = time.monotonic() - start_s

    def ray(self) -> None:
        """Ray on this machine."""
        self.start("--executor", "ray", "--workers", 2).end()

    def shares(self, n: int) -> str:
        """Separate commands, two at a time."""
        order = self.random.sample(range(n), n)
        with ThreadPoolExecutor(2) as two:
            list(two.map(lambda i: self.start("--num-tasks", n, "--task-index", i, "--workers", 1).end(), order))
        self.start("--finish", "--workers", 2).end()
        return f"order {', '.join(map(str, order))}"

    def kills(self, n: int) -> str:
        """The same command with --resume after each kill, with other numbers of workers."""
        where, datasets = Counter(), 1
        while where.total() < n:
            run = self.start("--resume", "--workers", self.random.choice((1, 2, 5)))
            try:
                run.process.wait(self.random.uniform(0.2, self.within_s))
            except subprocess.TimeoutExpired:
                where[run.kill()] += 1
                continue
            run.end()  # it came through: this one is compared too, and the next begins anew
            datasets += 1
            if hashes(self.output) != self.reference:
                raise Broken(f"differs after {where.total()} kills")
            shutil.rmtree(self.output)
        self.start("--resume", "--workers", 2).end()
        return f"{datasets} datasets; killed in " + ", ".join(
            f"{p} {where[p]}" for p in ("start", *PASSES, "end") if where[p]
        )

    # ---- misfortunes: one line, then the same command with --resume finishes ----------------------------------------

    def stopped(self) -> str:
        """SIGTERM to the parent."""
        run = self.start("--workers", 2)
        time.sleep(self.random.uniform(0.3, 0.6) * self.within_s)
        run.process.terminate()
        line = run.end(code=143, lines=1)
        self.start("--resume", "--workers", 2).end()
        return line

    def source_gone(self) -> str:
        """The corpus is moved away as soon as the work has begun."""
        run = self.start("--workers", 2)
        while not (self.output / ".prep" / "job.json").exists() and run.process.poll() is None:
            time.sleep(0.001)
        away = self.corpus.rename(self.scratch / "away.txt")
        line = run.end(code=2, lines=1)
        away.rename(self.corpus)
        self.start("--resume", "--workers", 2).end()
        return line.replace(f"{self.scratch}/", "")

    def full_disk(self, share: float) -> str:
        """A disk that holds only a share of the dataset; then one that holds all."""
        disk = self.scratch / "disk"
        disk.mkdir(exist_ok=True)
        room = int(share * self.dataset_bytes)
        mounted = mount(f"size={room}", disk)
        limit = None if mounted else lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room // 10, room // 10))
        try:
            line = self.start("--workers", 2, output=disk / "output", preexec_fn=limit).end(code=2, lines=1)
            if mounted:
                mount("remount,size=50%", disk)
            self.start("--resume", "--workers", 2, output=disk / "output").end()
            shutil.copytree(disk / "output", self.output)
            shutil.rmtree(disk / "output")
        finally:
            if mounted:
                subprocess.run(["umount", "-l", disk], check=True)
        return line.replace(f"{disk}/", "")


def mount(options: str, folder: Path) -> bool:
    """Mount a disk in memory; False where one may not: then a limit on the size of files stands in for a full disk."""
    try:
        return (
            subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True).returncode
            == 0
        )
    except OSError:
        return False


def hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file below, hidden ones too."""
    found = (p for p in folder.rglob("*") if p.is_file() and p.name not in EXEMPT)
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in found}


def lay_out(corpus: Path, source: str, n_bytes: int) -> None:
    """The corpus: generated, or the first bytes of a file."""
    if not source:
        demo_corpus.main(["--output", str(corpus), "--megabytes", str(n_bytes / 1e6)])
        return
    with open(source, "rb") as whole, open(corpus, "wb") as part:
        while n_bytes > 0 and (block := whole.read(min(n_bytes, 1 << 20))):
            n_bytes -= part.write(block)


def main(argv: list[str] | None = None) -> int:
    """Run every way. Returns 1 when one differs or fails."""
    args, _ = flags.parse(SoakFlags, argv, prog="soak_prep.py", description=__doc__.split("\n")[0])
    if args.input and not Path(args.input).is_file():
        raise UserError(f"--input {args.input}: not a file")
    with tempfile.TemporaryDirectory(prefix="soak-", dir=args.folder or None) as folder:
        soak = Soak(Path(folder), shlex.split(args.prep), random.Random(args.seed))
        lay_out(soak.corpus, args.input, args.megabytes * 10**6)
        print(f"{count(soak.corpus.stat().st_size)}B; prep {args.prep}\n")
        print(f"{'way':<25} {'time':>6}  {'files':>5}  {'sha256 of all':<16}  bytes")
        soak.way("1 worker", lambda: soak.workers(1))
        for n in args.workers:
            soak.way(f"{n} workers", lambda n=n: soak.workers(n))
        if args.ray and importlib.util.find_spec("ray"):
            soak.way("Ray", soak.ray)
        soak.way(f"{args.num_tasks} separate commands", lambda: soak.shares(args.num_tasks))
        soak.way(f"{args.kills} times kill -9", lambda: soak.kills(args.kills))
        if args.faults:
            soak.way("SIGTERM", soak.stopped)
            soak.way("source gone", soak.source_gone)
            soak.way("full disk", lambda: soak.full_disk(0.3))
            soak.way("full disk, later", lambda: soak.full_disk(1.2))
    return int(soak.failed)


if __name__ == "__main__":
    flags.run(main)
