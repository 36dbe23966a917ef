"""Look into a token dataset: figures, documents as the model will see them, and with --verify the proof of every byte.

python scripts/inspect_data.py --data corpus-tokens --verify
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # Python put this file's folder first in sys.path: the project's root belongs there
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import contextlib
import json
from dataclasses import dataclass
from typing import Literal

import numpy as np

from cli import flags
from cli.errors import UserError
from cli.flags import flag
from cli.progress import Meter, count
from gpt.tokenizer import Tokenizer
from store import fs
from store.errors import NotFound
from store.shards import Shard, TokenShards

LOOK_TOKENS = 1 << 20


@dataclass(frozen=True)
class InspectFlags:
    """Flags of scripts/inspect_data.py."""

    data: str = flag("data", "folder or URL of a token dataset", env="PERENNIAL_DATA")
    split: Literal["train", "val"] = flag("train", "which split to look into")
    samples: int = flag(3, "documents to show")
    chars: int = flag(600, "characters to show of each")
    seed: int = flag(0, "which documents")
    verify: bool = flag(False, "read every file and compare every hash")


def main(argv: list[str] | None = None) -> int:
    """Print what is in the dataset. Remote shards are read in parts, not fetched."""
    args, _ = flags.parse(InspectFlags, argv, prog="inspect_data.py", description=__doc__.split("\n")[0])
    data = TokenShards(args.data)
    tokenizer = Tokenizer(data.tokenizer_json())
    data.check_sizes()
    show_figures(data, tokenizer)
    shards = data.split(args.split)
    if not shards:
        raise UserError(f"{fs.redact(args.data)}: has no {args.split} split")
    rng = np.random.Generator(np.random.PCG64(args.seed))
    shard = shards[int(rng.integers(len(shards)))]
    show_tokens(data, tokenizer, shard, rng, args)
    if args.verify:
        with Meter("verify", sum(s.tokens for s in data.shards) * data.dtype.itemsize, "B") as meter:
            data.verify(meter.add)
        print(f"verified   {len(data.shards)} shards and the tokenizer: every hash is right")
    return 0


def show_figures(data: TokenShards, tokenizer: Tokenizer) -> None:
    """Totals per split, and what preparation counted."""
    special = ", ".join(f"{t} {i}" for t, i in tokenizer.special_ids.items())
    print(f"dataset    {fs.redact(data.url)}: vocabulary {data.vocab_size}, {data.dtype.name} ids; {special}")
    for split in ("train", "val"):
        shards = data.split(split)
        tokens, stored = sum(s.tokens for s in shards), sum(s.stored_bytes for s in shards)
        documents = sum(s.documents for s in shards)
        print(f"{split:<10} {tokens:,} tokens, {documents:,} documents ({tokens / max(documents, 1):.0f} tokens each), "
              f"{len(shards)} shards, {count(stored)}B stored")  # fmt: skip
    counts = data.metadata.get("counts", {})
    if counts:
        print("prepared   " + ", ".join(f"{name} {n:,}" for name, n in counts.items()))
    with contextlib.suppress(NotFound):  # a dataset may come from elsewhere
        verdict = json.loads(fs.read_bytes(fs.join(data.url, "report.json")))["verdict"]
        print(f"report     {verdict['headline']} ({fs.redact(fs.join(data.url, 'report.html'))})")
        for finding in verdict["findings"]:
            # some name tokens of the corpus, which may be a terminal's control sequences
            print(f"{finding['level']:<10} {''.join(c if c.isprintable() else '�' for c in finding['what'])}")


def show_tokens(
    data: TokenShards, tokenizer: Tokenizer, shard: Shard, rng: np.random.Generator, args: InspectFlags
) -> None:
    """Frequent tokens of a stretch of one shard, and some of its documents decoded."""
    begin = int(rng.integers(max(shard.tokens - LOOK_TOKENS, 0) + 1))
    ids = data.read(shard, begin, min(begin + LOOK_TOKENS, shard.tokens))
    found, times = np.unique(ids, return_counts=True)
    frequent = found[np.argsort(-times, kind="stable")[:12]]
    print(f"frequent   {' '.join(repr(tokenizer.decode([i])) for i in frequent)}")
    print(f"used       {len(found):,} of {data.vocab_size:,} ids occur in {len(ids):,} tokens of {shard.name}")
    starts = np.flatnonzero(ids == tokenizer.end_of_text)
    for start in rng.choice(starts, min(args.samples, len(starts)), replace=False).tolist():
        end = starts[starts > start].min(initial=len(ids))
        text = tokenizer.decode(ids[start:end])
        shown = text[: args.chars] + (" …" if len(text) > args.chars else "")
        print(f"\n--- document at token {begin + start} of {shard.name}, {end - start} tokens\n{shown}")
    print()


if __name__ == "__main__":
    flags.run(main)
