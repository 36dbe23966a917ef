"""Measure preparation: a whole run against its bars, and its speed and stored size against how others do it.

    python scripts/bench_prep.py --corpus big.txt --part scale
    python scripts/bench_prep.py --corpus big.txt --part peers --limit 200MB

`scale` runs prep/tokenize_bpe.py as a user would, samples the memory of all its processes and the size of its work
folder, and shows time and peaks. `peers` turns the same text into stored ids with the same tokenizer four ways; one of
them, which gives `tokenizers` a whole chunk as one string, for two such chunks: with --string-bytes 100MB all of 200 MB.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # Python put this file's folder first in sys.path: the project's root belongs there
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import contextlib
import gzip
import itertools
import json
import multiprocessing
import os
import platform
import shutil
import subprocess
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, TextIO

import numpy as np
import psutil
import tokenizers

from cli import flags
from cli.errors import UserError
from cli.flags import flag, number
from cli.progress import Meter, count, duration, resident
from prep import corpus, reading
from prep.pool import usable_cpus
from store.shards import TokenShards

OURS = "this project without cleaning and deduplication"
LINES = "`encode_batch` of lines, 100 MB at a time, gzip -6"
ROOT = Path(__file__).resolve().parent.parent
CHUNK_BYTES = 100_000_000


@dataclass(frozen=True)
class BenchFlags:
    """Flags of scripts/bench_prep.py."""

    corpus: str = flag("", "a local text file of conversations")
    part: Literal["scale", "peers"] = flag("scale", "what to measure")
    limit: int | None = flag(None, "use only the first bytes of the corpus", parse=number)
    string_bytes: int = flag(
        10_000_000,
        "chunk given to encode_batch as one string: 100MB, as many do, takes 15 GB of memory and 3 minutes each",
        parse=number,
    )
    extra: str = flag("", "further flags of prep/tokenize_bpe.py, in one string: '--near-dup 0.8'")
    folder: str = flag("", "where to work (default: a temporary folder beside the corpus)")
    max_minutes: float | None = flag(None, "fail when a whole run takes longer")
    max_gb: float | None = flag(None, "fail when all processes together ever hold more memory (GB)")


def main(argv: list[str] | None = None) -> int:
    """Print a table; exit code 1 when a bar that was asked for is missed."""
    args, _ = flags.parse(BenchFlags, argv, prog="bench_prep.py", description=__doc__.split("\n")[0])
    path = Path(args.corpus).expanduser()
    if not args.corpus or not path.is_file():
        raise UserError(f"--corpus {args.corpus or 'is missing'}: name a local text file")
    size = min(path.stat().st_size, args.limit or 1 << 62)
    print(f"machine    {machine()}\ncorpus     {path.name}, {count(size)}B")
    folder = Path(tempfile.mkdtemp(prefix="bench-prep-", dir=args.folder or path.resolve().parent))
    try:
        return (measure_scale if args.part == "scale" else measure_peers)(args, path, size, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def machine() -> str:
    """CPU, cores, memory and versions, for the table's heading."""
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    memory = count(psutil.virtual_memory().total)
    return f"{model}, {usable_cpus()} cores, {memory}B, Python {platform.python_version()}, {platform.system()}"


# ---- a whole run ----------------------------------------------------------------------------------------------------


@dataclass
class Peaks:
    """The most that was ever seen."""

    memory: int = 0  # bytes resident in all processes; shared pages count once for each
    largest_process: int = 0
    disk: int = 0  # bytes of temporary files


def prep_command(corpus_path: Path, output: Path, arguments: list[str]) -> list[str]:
    """What a user would type."""
    command = [sys.executable, str(ROOT / "prep/tokenize_bpe.py"), "--input", str(corpus_path), "--output", str(output)]
    return [*command, *arguments]


def run_prep(corpus_path: Path, output: Path, arguments: list[str]) -> tuple[float, Peaks]:
    """(seconds, peaks) of one real run, looked at every 0.1 s. Raises UserError when it fails."""
    peaks, start_s = Peaks(), time.monotonic()
    process = psutil.Popen(prep_command(corpus_path, output, arguments))
    ticks = 0
    while process.poll() is None:
        sizes = resident(process)
        peaks.memory = max(peaks.memory, sum(sizes))
        peaks.largest_process = max(peaks.largest_process, max(sizes, default=0))
        if ticks % 20 == 0:
            peaks.disk = max(peaks.disk, folder_bytes(output / ".prep"))
        ticks += 1
        time.sleep(0.1)
    if process.returncode:
        raise UserError(f"prep/tokenize_bpe.py ended with {process.returncode}: see its message above")
    return time.monotonic() - start_s, peaks


def folder_bytes(folder: Path) -> int:
    """Bytes of the files in a folder, which may change while it is read."""
    total = 0
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):  # it was moved just now; the others count
                total += entry.stat().st_size
    return total


def measure_scale(args: BenchFlags, path: Path, size: int, folder: Path) -> int:
    """The whole command, its time and its peaks."""
    arguments = ["--compress", *args.extra.split(), *(["--limit", str(args.limit)] if args.limit else [])]
    print(f"command    prep/tokenize_bpe.py --input {path.name} {' '.join(arguments)}\n", flush=True)
    seconds, peaks = run_prep(path, folder / "tokens", arguments)
    shards = TokenShards(str(folder / "tokens")).shards
    tokens, stored = sum(s.tokens for s in shards), sum(s.stored_bytes for s in shards)
    print(f"\n| {count(size)}B of text | |\n|---|---|\n"
          f"| whole command | {duration(seconds)}, {count(size / seconds)}B/s |\n"
          f"| peak memory of all processes | {peaks.memory / 1e9:.2f} GB (largest {peaks.largest_process / 1e9:.2f}) |\n"
          f"| peak temporary disk | {count(peaks.disk)}B, {peaks.disk / size:.2f}x the text |\n"
          f"| stored | {count(tokens)} tokens in {count(stored)}B, {stored / tokens:.3f} bytes each |")  # fmt: skip
    missed = []
    if args.max_minutes and seconds > 60 * args.max_minutes:
        missed.append(f"took {duration(seconds)}, expected at most {args.max_minutes:g} minutes")
    if args.max_gb and peaks.memory > 1e9 * args.max_gb:
        missed.append(f"held {peaks.memory / 1e9:.2f} GB, expected at most {args.max_gb:g}")
    if peaks.disk > size:
        missed.append(f"used {peaks.disk / size:.2f}x the text of temporary disk, expected less than 1x")
    for line in missed:
        print(f"missed: {line}")
    return int(bool(missed))


# ---- against others -------------------------------------------------------------------------------------------------


def measure_peers(args: BenchFlags, path: Path, size: int, folder: Path) -> int:
    """The same text and merges -> stored ids, four ways. Training the tokenizer is in none of the times."""
    text, beginning = folder / "corpus.txt", folder / "beginning.txt"
    copy_beginning(path, text, size)
    copy_beginning(path, beginning, min(size, 2 * args.string_bytes))
    trained = folder / "trained"
    run_prep(text, trained, ["--limit", str(min(size, 100_000_000))])
    tokenizer, usual = trained / "tokenizer.json", folder / "usual.json"
    usual.write_text(numbered_by_merges(tokenizer.read_text("utf-8")), "utf-8")
    lines = folder / "corpus.jsonl"
    write_jsonl(text, lines)

    # what the others do not do is left out of ours, then shown with it
    # each time into a new folder: to remove what was there is nobody's work here
    outputs = (folder / f"plain-{n}" for n in itertools.count())

    def plain() -> int:
        return ours(text, next(outputs), tokenizer, ["--clean", "off", "--dedup", "off"])

    ways: dict[str, tuple[int, Callable[[], int]]] = {
        "this project, all of it": (size, lambda: ours(text, folder / "all", tokenizer, [])),
        LINES: (
            size,
            lambda: encode_batch_gzip(text, usual, folder / "lines.bin.gz", lambda f: f.readlines(CHUNK_BYTES)),
        ),
        f"`encode_batch`, {count(args.string_bytes)}B as one string, gzip -6, two of them": (
            beginning.stat().st_size,
            lambda: encode_batch_gzip(
                beginning, usual, folder / "strings.bin.gz", lambda f: [*filter(None, [f.read(args.string_bytes)])]
            ),
        ),
        "Megatron-LM's way, one document per call in a pool": (
            size, lambda: megatron(lines, usual, folder / "megatron.bin"),
        ),
    }  # fmt: skip
    # ours is over in a tenth of the time: between the others, again and again, it sees the same moods of the machine
    mine, timed = [Timed.of(plain)], {}
    for name, (n_bytes, way) in ways.items():
        timed[name] = n_bytes, Timed.of(way)
        mine += [Timed.of(plain) for _ in range(2)]
    mine.sort(key=lambda it: it.elapsed_s)
    print(f"\nours took {', '.join(f'{it.elapsed_s:.1f}' for it in mine)} s; the middle one counts")
    middle = mine[len(mine) // 2]
    timed = {OURS: (size, middle), **timed}
    print(
        "\n| 1 run, same text, same merges | time | CPU | MB/s | ours in so many times less | of CPU | stored |\n|---|---|---|---|---|---|---|"
    )
    for name, (n_bytes, it) in timed.items():
        print(f"| {name} | {it.elapsed_s:.1f} s | {it.cpu_s:.1f} s | {n_bytes / it.elapsed_s / 1e6:.1f} | "
              f"{it.elapsed_s / n_bytes * size / middle.elapsed_s:.1f}x | "
              f"{it.cpu_s / n_bytes * size / middle.cpu_s:.1f}x | {count(it.stored_bytes)}B |")  # fmt: skip
    usual_bytes, same_bytes = timed[LINES][1].stored_bytes, gzip_bytes(TokenShards(str(folder / "plain-0")))
    print(f"\nstored size: {100 * (1 - middle.stored_bytes / usual_bytes):.1f} % below gzip -6 of uint16; "
          f"{100 * (1 - middle.stored_bytes / same_bytes):.1f} % below gzip -6 of these very ids, which are "
          "numbered so that they pack better")  # fmt: skip
    return 0


@dataclass(frozen=True)
class Timed:
    """What one way took: by the clock, and of all cores' time, which tells more where others work too."""

    elapsed_s: float
    cpu_s: float
    stored_bytes: int

    @classmethod
    def of(cls, way: Callable[[], int]) -> "Timed":
        """Time `way()`, which returns the bytes it stored. No way pays for writing out what was written before it."""
        os.sync()
        start_s, start_cpu_s = time.monotonic(), cpu_seconds()
        stored_bytes = way()
        return cls(time.monotonic() - start_s, cpu_seconds() - start_cpu_s, stored_bytes)


def cpu_seconds() -> float:
    """User and system time of this process and of its children that have ended."""
    return sum(os.times()[:4])


def copy_beginning(path: Path, out: Path, size: int) -> None:
    """The first `size` bytes of a file."""
    with open(path, "rb") as source, open(out, "wb") as target:
        while size and (block := source.read(min(size, 1 << 24))):
            target.write(block)
            size -= len(block)


def ours(text: Path, output: Path, tokenizer: Path, arguments: list[str]) -> int:
    """The real command, which nothing looks at meanwhile; stored bytes."""
    subprocess.run(prep_command(text, output, ["--tokenizer", str(tokenizer), "--compress", *arguments]), check=True)
    return sum(s.stored_bytes for s in TokenShards(str(output)).shards)


def encode_batch_gzip(text: Path, tokenizer_path: Path, out: Path, next_chunk: Callable[[TextIO], list[str]]) -> int:
    """The usual notebook: chunks of strings through `encode_batch`, ids as uint16, gzip -6; stored bytes."""
    tokenizer = load_plain(tokenizer_path)
    with (
        Meter("chunks", text.stat().st_size, "B") as meter,
        open(text, encoding="utf-8", errors="replace") as f,
        gzip.open(out, "wb", compresslevel=6) as stored,
    ):
        while chunk := next_chunk(f):
            for encoding in tokenizer.encode_batch(chunk):
                stored.write(np.array(encoding.ids, np.uint16).tobytes())
            meter.add(sum(map(len, chunk)))
    return out.stat().st_size


def megatron(lines: Path, tokenizer_path: Path, out: Path) -> int:
    """tools/preprocess_data.py of Megatron-LM: a pool of processes, each encoding one JSON line; stored bytes."""
    context = multiprocessing.get_context("spawn")
    with (
        Meter("megatron", lines.stat().st_size, "B") as meter,
        context.Pool(usable_cpus(), _load_in_worker, (str(tokenizer_path),)) as pool,
        open(lines, encoding="utf-8") as f, open(out, "wb") as stored,
    ):  # fmt: skip
        for ids, n_bytes in pool.imap(_encode_line, f, 32):
            stored.write(np.array(ids, np.uint16).tobytes())
            meter.add(n_bytes)
    return out.stat().st_size


def _load_in_worker(path: str) -> None:
    global _tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _tokenizer = load_plain(Path(path))


def _encode_line(line: str) -> tuple[list[int], int]:
    return _tokenizer.encode(json.loads(line)["text"]).ids, len(line)


def numbered_by_merges(tokenizer_json: str) -> str:
    """The same tokenizer with ids as trainers give them: special tokens, bytes, then what each merge makes, in order."""
    data = json.loads(tokenizer_json)
    special = [token["content"] for token in data["added_tokens"]]
    merged = ["".join(pair) for pair in data["model"]["merges"]]
    letters = sorted(set(data["model"]["vocab"]).difference(special, merged))
    data["model"]["vocab"] = {token: i for i, token in enumerate([*special, *letters, *merged])}
    return json.dumps(data)


def gzip_bytes(dataset: TokenShards) -> int:
    """What gzip -6 makes of the ids of all shards."""
    packer, size = zlib.compressobj(6), 0
    for shard in dataset.shards:
        size += len(packer.compress(dataset.load(shard, preload=True).tobytes()))
    return size + len(packer.flush())


def load_plain(path: Path) -> tokenizers.Tokenizer:
    """The tokenizer as anyone would load it."""
    return tokenizers.Tokenizer.from_file(str(path))


def write_jsonl(text: Path, out: Path) -> None:
    """Conversations as Megatron wants them: {"text": …} lines."""
    with open(out, "w", encoding="utf-8") as f:
        for document in _documents(text):
            f.write(json.dumps({"text": document}, ensure_ascii=False) + "\n")


def _documents(text: Path) -> Iterator[str]:
    for task in corpus.plan(corpus.find_sources((str(text),))):
        for piece in task.pieces:
            for document in (d for batch in reading.read(piece) for d in batch.documents):
                yield "\n".join(f"{role.title()}: {said}" if role else said for role, said in document)


if __name__ == "__main__":
    flags.run(main)
