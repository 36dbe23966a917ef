"""Measure a restart: from process start to the first step, with the dataset behind a network line of a given rate.

python scripts/bench_restart.py

A web server on loopback, with the latency of an object store and one line for all connections, serves a dataset to the
real trainer, twice: to a new machine, and to the same one after a kill, whose cache holds what had arrived.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # Python put this file's folder first in sys.path: the project's root belongs there
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import dataclasses
import re
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np

from cli import flags
from cli.errors import UserError
from cli.flags import flag
from cli.progress import count
from store.shards import ShardWriter, TokenShards, write_metadata
from train.folder import read_lines

ROOT = Path(__file__).resolve().parent.parent
LATENCY_S = 0.05  # to the first byte, as from a bucket of the same region
VOCAB = 512  # random ids of so many take 9 of 16 bits, about what zstd leaves of real ones
PIECE_BYTES = 1 << 18
PARTS = {  # what ends a part of the start: a line of the trainer, or the first request it makes
    "imports": None,
    "data and model": "load data ",  # the first shard comes while the model is made
    "run folder": "out  ",
    "first step": "step ",
}


@dataclass(frozen=True)
class RestartFlags:
    """Flags of scripts/bench_restart.py."""

    size: int = flag(2_000_000_000, "stored bytes of the dataset")
    rate: int = flag(100_000_000, "bytes a second of the line, all connections together")
    shard_tokens: int = flag(32_000_000, "tokens per shard")
    model: str = flag("tiny", "preset; a larger one costs no more than its weights and its first step")
    loading: str = flag("memmap", "memmap or preload")
    scratch: str = flag("", "folder for the dataset's one shard, cache and run (default: the system's)")


def main(argv: list[str] | None = None) -> int:
    """Print how long each part of two starts took."""
    args, _ = flags.parse(RestartFlags, argv, prog="bench_restart.py", description=__doc__.split("\n")[0])
    with tempfile.TemporaryDirectory(prefix="bench-restart-", dir=args.scratch or None) as scratch:
        folder = Path(scratch)
        n_shards, stored_bytes = make_dataset(folder / "data", args)
        with Line(folder / "data", args.rate) as line:
            print(f"dataset    {n_shards} shards, {count(stored_bytes)}B stored, behind {count(args.rate)}B/s and "
                  f"{1000 * LATENCY_S:.0f} ms", flush=True)  # fmt: skip
            for name in ("new machine", "same machine"):
                parts, data_s = measure(line, folder, args)
                shown = ", ".join(f"{part} {seconds:.1f}" for part, seconds in parts.items())
                print(f"{name:<14} first step after {sum(parts.values()):.1f} s: {shown}; "
                      f"{data_s:.1f} s of it waited for data alone", flush=True)  # fmt: skip
    return 0


def make_dataset(folder: Path, args: RestartFlags) -> tuple[int, int]:
    """(shards, stored bytes): one shard of random ids that metadata.json names under many names."""
    corpus = folder.parent / "corpus.txt"
    corpus.write_text("".join(f"User: What is {i}?\nAssistant: It is {i} again.\n\n" for i in range(5000)))
    prep = [sys.executable, ROOT / "prep/tokenize_bpe.py", "--input", corpus, "--output", folder]
    prep += ["--vocab-size", str(VOCAB), "--val-fraction", "0.1", "--compress"]
    done = subprocess.run(prep, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"no dataset could be made: {done.stderr.strip()}")
    made = TokenShards(str(folder))
    with ShardWriter(folder / "train-00000.bin.zst", args.shard_tokens, made.dtype, level=3) as w:
        w.write(np.random.default_rng(1).integers(0, VOCAB, args.shard_tokens, dtype=made.dtype))
    one = w.entry("train", 1)
    n = max(2, round(args.size / one.stored_bytes))
    train = [dataclasses.replace(one, name=f"train-{i:05}.bin.zst") for i in range(n)]
    about = {k: made.metadata[k] for k in ("vocab_size", "tokenizer_sha256")}
    write_metadata(str(folder), [*train, *made.split("val")], **about)
    return n, n * one.stored_bytes


def measure(line: "Line", folder: Path, args: RestartFlags) -> tuple[dict[str, float], float]:
    """(seconds of each part of one start, seconds in which there was only data to wait for).

    The trainer is killed after its first step.
    """
    line.first_request_s = None
    command = [
        sys.executable,
        ROOT / "train/run.py",
        "--data",
        line.url,
        "--out",
        folder / "out",
        "--cache",
        folder / "cache",
    ]
    command += ["--model", args.model, "--loading", args.loading, "--resume", "--log-every", "1", "--device", "cpu"]
    command += ["--batch", "8", "--steps", "1000000", "--warmup", "10", "--eval-every", "0", "--sample-every", "0"]
    begin_s = time.monotonic()
    process = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1
    )
    said, ends = "", []
    try:
        for text in process.stdout:
            said += text
            waited_for = list(PARTS.values())[len(ends) + 1]
            if text.startswith(waited_for):
                ends.append(time.monotonic())
            if len(ends) == len(PARTS) - 1:
                break
        else:
            raise UserError(f"the trainer ended before its first step: {said[-500:].strip()}")
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    data_s = next(e["data_s"] for e in read_lines(folder / "out" / "events.jsonl") if e["event"] == "start")
    shutil.rmtree(folder / "out")
    times = [begin_s, line.first_request_s, *ends]
    return {part: b - a for part, a, b in zip(PARTS, times, times[1:], strict=False)}, data_s


@dataclass
class Line:
    """`with Line(folder, rate) as line`: the folder at `line.url`, every train-*.bin.zst its first; ranges are served."""

    folder: Path
    bytes_per_s: float
    first_request_s: float | None = None
    free_s: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __enter__(self) -> "Line":
        line = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                line.first_request_s = line.first_request_s or time.monotonic()
                time.sleep(LATENCY_S)
                path = line.folder / re.sub(r"train-\d+", "train-00000", self.path.lstrip("/"))
                if path.parent != line.folder or not path.is_file():
                    self.send_response(404)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                size = path.stat().st_size
                m = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
                begin, end = (int(m[1]), min(int(m[2]) + 1, size)) if m else (0, size)
                self.send_response(206 if m else 200)
                self.send_header("Accept-Ranges", "bytes")
                self.send_header("Content-Length", str(end - begin))
                if m:
                    self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{size}")
                self.end_headers()
                if self.command == "GET":
                    line.send(path, begin, end, self.wfile.write)

            def log_message(self, *args: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            def handle_error(self, *args: object) -> None:
                pass  # the trainer was killed in the middle of an answer

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def send(self, path: Path, begin: int, end: int, write: object) -> None:
        """Bytes of a file, no faster than the line that all answers share."""
        with open(path, "rb") as f:
            f.seek(begin)
            while begin < end:
                piece = f.read(min(PIECE_BYTES, end - begin))
                begin += len(piece)
                with self.lock:
                    self.free_s = max(self.free_s, time.monotonic()) + len(piece) / self.bytes_per_s
                    wait_s = self.free_s - time.monotonic()
                time.sleep(max(wait_s, 0.0))
                write(piece)


if __name__ == "__main__":
    flags.run(main)
