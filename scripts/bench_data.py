"""How fast batches come from token shards: memory-mapped and preloaded, from a warm and a cold page cache.

    python scripts/bench_data.py
    python scripts/bench_data.py --tokens 2G --folder /mnt/disk     # a dataset larger than the page cache, on that disk

Beside nanoGPT's get_batch over one file of the same ids. The last line is what a training loop would notice: the share of
its time that it waits for data while a device, played by a clock, takes 500,000 tokens a second.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # Python put this file's folder first in sys.path: the project's root belongs there
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from cli import flags
from cli.flags import flag
from scripts.benchmark import machine_facts, settings_of, write_json
from store.shards import HEADER_BYTES, ShardWriter, TokenShards, write_metadata
from train.batches import Batches
from train.precision import choose_machine
from train.step import to_device


@dataclass(frozen=True)
class BenchFlags:
    """Flags of scripts/bench_data.py."""

    tokens: int = flag(256_000_000, "size of the dataset")
    shard_tokens: int = flag(32_000_000, "tokens per shard; prep's default")
    block_size: int = flag(512, "context length in tokens")
    batch: int = flag(512, "sequences per step")
    rounds: int = flag(3, "turns of each contestant")
    seconds: float = flag(2.0, "length of a turn")
    demand: int = flag(500_000, "tokens per second of the device in the last line")
    device: str = flag("cpu", "cuda or cpu: where the last line's batches go")
    folder: str = flag("", "where to put the dataset for the time being (default: the system's temporary folder)")
    json: str = flag("", "file for the figures")


def main(argv: list[str] | None = None) -> int:
    """Print a table; write the figures as JSON. Returns 0."""
    args, _ = flags.parse(BenchFlags, argv, prog="bench_data.py", description=__doc__.split("\n")[0])
    with tempfile.TemporaryDirectory(dir=args.folder or None) as place:
        tokens = make_dataset(Path(place), args)
        preloaded = [tokens.load(s, preload=True) for s in tokens.shards]
        files = [Path(place) / s.name for s in tokens.shards]
        one_file = Path(place) / "train.bin"
        with open(one_file, "wb") as f:
            for array in preloaded:
                f.write(array)
            os.fsync(f.fileno())

        def ours(arrays: list[np.ndarray]) -> Callable[[int], object]:
            return Batches(arrays, block_size=args.block_size, batch=args.batch, seed=1).batch_at

        def mapped() -> Callable[[int], object]:
            return ours([np.memmap(path, np.uint16, mode="r", offset=HEADER_BYTES) for path in files])

        def get_batch() -> Callable[[int], object]:
            return nanogpt(np.memmap(one_file, np.uint16, mode="r"), args)

        contestants = {
            "ours, memory-mapped, warm": (mapped, []),
            "ours, preloaded": (lambda: ours(preloaded), []),
            "ours, memory-mapped, cold": (mapped, files),
            "nanoGPT's get_batch, warm": (get_batch, []),
            "nanoGPT's get_batch, cold": (get_batch, [one_file]),
        }
        rates = {name: [] for name in contestants}
        for _ in range(args.rounds):
            for name, (open_, dropped) in contestants.items():
                if not dropped:
                    touch(files if open_ is mapped else [one_file])
                rates[name].append(rate(open_, dropped, args))
        waits = waiting(mapped(), args)
    facts = machine_facts(args.device)
    print(f"{args.tokens:,} tokens in shards of {args.shard_tokens:,}, batches of {args.batch} x {args.block_size}; "
          f"{facts['machine']}, {facts['date']}")  # fmt: skip
    medians = {name: statistics.median(of) for name, of in rates.items()}
    for name, median in medians.items():
        print(
            f"{name:30}{median / 1e6:9.2f} M tokens/s   ({min(rates[name]) / 1e6:.2f} to {max(rates[name]) / 1e6:.2f})"
        )
    print(f"at {args.demand:,} tokens/s a step waits for data for {waits:.2%} of its time")
    if args.json:
        results = {
            "tokens_per_s": {n: [round(r) for r in of] for n, of in rates.items()},
            "waiting_share": round(waits, 5),
        }
        write_json(args.json, {"benchmark": "data", **facts, "settings": settings_of(args), "results": results})
    return 0


def make_dataset(folder: Path, args: BenchFlags) -> TokenShards:
    """Random ids in raw shards."""
    rng, entries = np.random.default_rng(0), []
    for i, begin in enumerate(range(0, args.tokens, args.shard_tokens)):
        n = min(args.shard_tokens, args.tokens - begin)
        with ShardWriter(folder / f"train-{i:05d}.bin", n, np.dtype("<u2"), level=None) as writer:
            writer.write(rng.integers(0, 32000, n, np.uint16))
        entries.append(writer.entry("train", 1))
    write_metadata(str(folder), entries, vocab_size=32000, tokenizer_sha256="0" * 64)
    return TokenShards(str(folder))


def nanogpt(ids: np.memmap, args: BenchFlags) -> Callable[[int], object]:
    """Its get_batch: windows drawn from anywhere in one file, each widened and stacked."""
    T = args.block_size

    def get_batch(_: int) -> tuple[torch.Tensor, torch.Tensor]:
        ix = torch.randint(len(ids) - T, (args.batch,))
        x = torch.stack([torch.from_numpy(ids[i : i + T].astype(np.int64)) for i in ix])
        y = torch.stack([torch.from_numpy(ids[i + 1 : i + 1 + T].astype(np.int64)) for i in ix])
        return x, y

    return get_batch


def rate(open_: Callable[[], Callable[[int], object]], dropped: list[Path], args: BenchFlags) -> float:
    """Tokens per second of one turn; the page cache is cold for the files `dropped`."""
    for path in dropped:
        drop_from_page_cache(path)
    make = open_()
    if not dropped:
        make(0)
    done, start_s = 0, time.perf_counter()
    while (elapsed_s := time.perf_counter() - start_s) < args.seconds:
        make(done)
        done += 1
        if dropped and (done + 1) * args.batch * args.block_size > args.tokens:
            break  # from here on it would be warm
    elapsed_s = time.perf_counter() - start_s
    return done * args.batch * args.block_size / elapsed_s


def touch(files: list[Path]) -> None:
    """Bring files into the page cache."""
    for path in files:
        with open(path, "rb") as f:
            while f.read(1 << 22):
                pass


def drop_from_page_cache(path: Path) -> None:
    """Nothing may have it mapped; Linux only."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def waiting(batch_at: Callable[[int], np.ndarray], args: BenchFlags, steps: int = 12) -> float:
    """The share of a training loop's time in which its device has nothing to do."""
    machine = choose_machine(args.device, "auto", "off")
    batches, step_s, waited_s = batch_at.__self__, args.batch * args.block_size / args.demand, 0.0
    feed = batches.ahead(0, steps)
    to_device(next(feed), machine)  # the first batch is waited for in any case
    for _ in range(1, steps):
        time.sleep(step_s)
        start_s = time.perf_counter()
        to_device(next(feed), machine)
        machine.synchronize()
        waited_s += time.perf_counter() - start_s
    return waited_s / (waited_s + (steps - 1) * step_s)


if __name__ == "__main__":
    flags.run(main)
