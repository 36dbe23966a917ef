"""Measure the choices in docs/tokenizer.md on your own text: split pattern, trainer, sample, numbering, compression.

python scripts/bench_tokenizer.py --corpus corpus.txt
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # Python put this file's folder first in sys.path: the project's root belongs there
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import itertools
import random
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import zstandard

from cli import flags
from cli.errors import UserError
from cli.flags import flag
from gpt.tokenizer import SPLIT_PATTERNS, Tokenizer
from prep import bpe, corpus, encode, reading
from prep.formats import Unusable
from store.shards import FRAME_BYTES, dtype_for, make_compressor

HELD_OUT = 10  # every tenth document teaches no tokenizer and is what bytes per token are measured on
BATCH_TURNS = 50_000


@dataclass(frozen=True)
class BenchFlags:
    """Flags of scripts/bench_tokenizer.py."""

    corpus: tuple[str, ...] = flag((), "text files of conversations; they are held in memory")
    part: Literal["all", "quality", "storage"] = flag("all", "what to measure")
    limit: int | None = flag(None, "use only the first bytes of the text")
    vocab_size: int = flag(32000, "tokens in the vocabulary")


def main(argv: list[str] | None = None) -> int:
    """Print two tables."""
    args, _ = flags.parse(BenchFlags, argv, prog="bench_tokenizer.py", description=__doc__.split("\n")[0])
    if not args.corpus:
        raise UserError("--corpus is missing: name text files of conversations")
    documents = read_documents(args.corpus, args.limit)
    if args.part != "storage":
        taught = [d for i, d in enumerate(documents) if i % HELD_OUT]
        show_quality(flat(taught), flat(documents[::HELD_OUT]), args.vocab_size)
    if args.part != "quality":
        random.Random(0).shuffle(documents)  # as in the shards: neighbours resemble each other
        show_storage(flat(documents), args.vocab_size)
    return 0


def read_documents(files: tuple[str, ...], limit: int | None) -> list[list[str]]:
    """The turns of each document, as they stand in the files."""
    found = []
    for task in corpus.plan(corpus.find_sources(files), limit):
        for batch in (b for piece in task.pieces for b in reading.read(piece)):
            found += [[text for _, text in d] for d in batch.documents if not isinstance(d, Unusable)]
    return found


def flat(documents: list[list[str]]) -> list[str]:
    """All turns."""
    return list(itertools.chain.from_iterable(documents))


def train(turns: list[str], trainer: str, split: str, vocab_size: int) -> str:
    """tokenizer.json, not yet renumbered."""
    batches = (turns[i : i + BATCH_TURNS] for i in range(0, len(turns), BATCH_TURNS))
    limits = {"vocab_size": vocab_size, "min_frequency": 2, "split": split}
    if trainer == "tokenizers":
        return bpe.train_on_texts(batches, **limits)
    return bpe.train_on_words(bpe.sum_counts(bpe.count_words(batch, split) for batch in batches), **limits)


# ---- quality --------------------------------------------------------------------------------------------------------


def show_quality(taught: list[str], held_out: list[str], vocab_size: int) -> None:
    """Bytes of held-out text per token, by pattern and trainer, then by size of the sample."""
    n_bytes = sum(len(t.encode()) for t in held_out)
    print(f"\n{vocab_size:,} tokens; bytes per token on {n_bytes / 1e6:.1f} MB held out\n\n"
          "| pattern | trainer | learnt from | CPU time to train | bytes per token |\n|---|---|---|---|---|")  # fmt: skip
    cases = [(split, trainer, 1) for split in SPLIT_PATTERNS for trainer in ("ffbpe", "tokenizers")]
    cases += [("o200k", "ffbpe", share) for share in (2, 4, 8)]
    for split, trainer, share in cases:
        turns = taught[::share]
        start_s = time.process_time()
        tokenizer = Tokenizer(train(turns, trainer, split, vocab_size))
        took_s = time.process_time() - start_s
        n_tokens = len(encode.Encoder(tokenizer.json_text, "fastokens").encode_batch(held_out)[0])
        learnt = sum(len(t.encode()) for t in turns) / 1e6
        print(f"| {split} | {trainer} | {learnt:.0f} MB | {took_s:.1f} s | {n_bytes / n_tokens:.4f} |", flush=True)


# ---- storage --------------------------------------------------------------------------------------------------------


def show_storage(turns: list[str], vocab_size: int) -> None:
    """Stored bytes per id of the same text, by numbering and by level; speed of one core."""
    counts = bpe.sum_counts(
        bpe.count_words(turns[i : i + BATCH_TURNS], "o200k") for i in range(0, len(turns), BATCH_TURNS)
    )
    merged = bpe.train_on_words(counts, vocab_size=vocab_size, min_frequency=2, split="o200k")
    print("\n| ids | stored with | bytes per id | below gzip -6 | MB/s |\n|---|---|---|---|---|")
    gzip_first = None
    for name, text in (("in order of merges", merged), ("numbered", bpe.number_by_frequency(merged, counts))):
        ids, _ = encode.Encoder(text, "fastokens").encode_batch(turns)
        raw = ids.astype(dtype_for(vocab_size)).tobytes()
        ways: dict[str, Callable[[], int]] = {"gzip -6": partial(gzip_size, raw)}
        for level in (3, 9):
            ways[f"zstd -{level}, 4 MiB"] = partial(zstd_size, zstandard.ZstdCompressor(level=level), raw, 4 << 20)
        for level in (3, 4, 5, 6, 9, 10, 11):
            ways[f"--level {level}"] = partial(zstd_size, make_compressor(level), raw, FRAME_BYTES)
        gzipped = None
        for way, size_of in ways.items():
            start_s = time.process_time()
            size = size_of()
            took_s = time.process_time() - start_s
            gzipped = gzipped or size
            gzip_first = gzip_first or size
            below = f"{100 * (1 - size / gzipped):.1f} %"
            if gzipped != gzip_first:
                below += f"; {100 * (1 - size / gzip_first):.1f} % of merges' order"
            print(f"| {name} | {way} | {size / len(ids):.4f} | {below} | {len(raw) / took_s / 1e6:.0f} |", flush=True)


def gzip_size(raw: bytes) -> int:
    """Bytes of one gzip stream, as `gzip -6` makes it."""
    return len(zlib.compress(raw, 6))


def zstd_size(compressor: zstandard.ZstdCompressor, raw: bytes, frame_bytes: int) -> int:
    """Bytes of independent frames."""
    return sum(len(compressor.compress(raw[i : i + frame_bytes])) for i in range(0, len(raw), frame_bytes))


if __name__ == "__main__":
    flags.run(main)
