"""Prove on whole files that the fast engine gives the reference's ids: every line, with its line end, in both.

python scripts/check_ids.py --corpus corpus.txt more/*.txt --tokenizer corpus-tokens
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # Python put this file's folder first in sys.path: the project's root belongs there
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from cli import flags
from cli.errors import UserError
from cli.flags import flag
from cli.progress import Meter
from gpt.tokenizer import Tokenizer
from prep import encode, given
from store import fs

BLOCK_BYTES = 2 << 10  # lines are compared in blocks of about this: what stands across a line end counts too
BATCH_BYTES = 8 << 20


@dataclass(frozen=True)
class CheckFlags:
    """Flags of scripts/check_ids.py."""

    corpus: tuple[str, ...] = flag((), "text files")
    tokenizer: str = flag("", "what --tokenizer of prep/tokenize_bpe.py takes, or a dataset's folder")
    limit: int | None = flag(None, "use only the first bytes of each file")


def main(argv: list[str] | None = None) -> int:
    """Print the count of differing blocks of each file; exit code 1 when there is one."""
    args, _ = flags.parse(CheckFlags, argv, prog="check_ids.py", description=__doc__.split("\n")[0])
    if not args.corpus or not args.tokenizer:
        raise UserError("--corpus and --tokenizer are needed: text files, and the tokenizer to encode them with")
    tokenizer, _ = given.load(args.tokenizer)
    engine, warning = encode.fastest(tokenizer)
    if warning:
        raise UserError(f"there is nothing to compare: {warning}")
    fast = encode.Encoder(tokenizer.json_text, engine)
    wrong = sum(check_file(url, tokenizer, fast, args.limit) for url in args.corpus)
    print(f"{wrong} blocks differ" if wrong else "every id is equal")
    return int(wrong > 0)


def check_file(url: str, tokenizer: Tokenizer, fast: encode.Encoder, limit: int | None) -> int:
    """How many of the file's blocks differ; the first is shown."""
    size = min(fs.size(url) or 0, limit or 1 << 62)
    n_ids = n_blocks = wrong = 0
    with Meter("check", size, "B") as meter:
        for blocks in batches(url, size):
            ids, lengths = fast.encode_batch(blocks)
            expected, expected_lengths = tokenizer.encode_batch(blocks)
            n_ids, n_blocks = n_ids + len(expected), n_blocks + len(blocks)
            if not (np.array_equal(ids, expected) and np.array_equal(lengths, expected_lengths)):
                different = [b for b in blocks if fast.encode_batch([b])[0].tolist() != tokenizer.encode(b)]
                if not wrong:
                    print(f"first difference in {url}: {different[0]!r}")
                wrong += len(different)
            meter.add(sum(len(b.encode()) for b in blocks))
    print(f"{url}: {n_ids:,} ids in {n_blocks:,} blocks, {wrong} blocks differ", flush=True)
    return wrong


def batches(url: str, size: int) -> Iterator[list[str]]:
    """The file as lists of blocks of whole lines; bytes that are no UTF-8 become U+FFFD."""
    blocks: list[str] = []
    with fs.open_stream(url) as f:
        left = size
        while left > 0 and (lines := f.readlines(min(left, BLOCK_BYTES))):
            block = b"".join(lines)[:left]
            left -= len(block)
            blocks.append(block.decode("utf-8", "replace"))
            if len(blocks) * BLOCK_BYTES >= BATCH_BYTES:
                yield blocks
                blocks = []
    if blocks:
        yield blocks


if __name__ == "__main__":
    flags.run(main)
