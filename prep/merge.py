"""Encoded parts -> shuffled shards: since parts are sorted by place, a shard is one slice of every part."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from prep import parts
from prep.dedup import shard_limits
from store.shards import Shard, ShardWriter, Split

BUCKETS = 1 << 20  # of places; shards begin at their edges: 12 GB have about ten documents in each
PLACES_BITS = 64 - (BUCKETS.bit_length() - 1)  # of a place, within a bucket
GATHER_TOKENS = 1 << 20  # ids joined per write: amortises the call


@dataclass(frozen=True)
class ShardPlan:
    """One shard to write: the documents whose place is in [first, last]."""

    split: Split
    index: int
    first: int
    last: int
    documents: int
    tokens: int

    def file_name(self, compressed: bool) -> str:
        """`train-00000.bin`, with `.zst` when compressed."""
        return f"{self.split}-{self.index:05d}.bin" + (".zst" if compressed else "")


class Places:
    """How many tokens and documents have their place where, of encoded parts added one by one."""

    def __init__(self) -> None:
        self.tokens, self.documents = np.zeros(BUCKETS, np.int64), np.zeros(BUCKETS, np.int64)

    def add(self, encoded: Path) -> None:
        """Count another part."""
        place, n = parts.load_places(encoded)
        bucket = (place >> np.uint64(PLACES_BITS)).astype(np.int64)
        np.add.at(self.tokens, bucket, n)
        np.add.at(self.documents, bucket, 1)


def plan_shards(places: Places, shard_tokens: int) -> list[ShardPlan]:
    """Shards of about equal tokens, at most `shard_tokens` or a little more, of both splits; train first."""
    tokens, documents = places.tokens, places.documents
    used = np.flatnonzero(documents)
    plans = []
    for split, mine in (("train", used[used >= BUCKETS // 2]), ("val", used[used < BUCKETS // 2])):
        limits = shard_limits(tokens[mine], shard_tokens) if len(mine) else [0]
        for i, (a, b) in enumerate(itertools.pairwise(limits)):
            buckets = mine[a:b]
            first, last = int(buckets[0]) << PLACES_BITS, (int(buckets[-1]) + 1 << PLACES_BITS) - 1
            plans.append(ShardPlan(split, i, first, last, int(documents[buckets].sum()), int(tokens[buckets].sum())))
    return plans


def write_shard(
    plan: ShardPlan, encoded: list[Path], path: Path, *,
    dtype: np.dtype, level: int | None, look: Callable[[np.ndarray, np.ndarray, np.ndarray], object],
) -> Shard:  # fmt: skip
    """Gather a shard's documents from all parts, in the order of their places, and write it to the local `path`.

    `look(places, lengths, ids)` is shown every document that is written, many at a time, end to end.
    """
    ids = np.empty(plan.tokens, dtype)
    places, lengths, filled = [], [], 0
    for part in encoded:
        place, n = parts.load_places(part)
        a = int(np.searchsorted(place, np.uint64(plan.first), "left"))
        b = int(np.searchsorted(place, np.uint64(plan.last), "right"))
        slice_tokens = int(n[a:b].sum(dtype=np.int64))
        parts.read_ids(part, int(n[:a].sum(dtype=np.int64)), ids[filled : filled + slice_tokens])
        filled += slice_tokens
        places.append(place[a:b])
        lengths.append(n[a:b])
    place, length = np.concatenate(places), np.concatenate(lengths).astype(np.int64)
    order = np.argsort(place, kind="stable")
    begin, place, length = (np.cumsum(length) - length)[order], place[order], length[order]
    cuts = np.flatnonzero(np.diff((np.cumsum(length) - length) // GATHER_TOKENS)) + 1
    with ShardWriter(path, plan.tokens, dtype, level=level) as writer:
        for first, last in itertools.pairwise([0, *cuts.tolist(), len(order)]):
            here = slice(first, last)
            documents = zip(begin[here].tolist(), length[here].tolist(), strict=True)
            gathered = np.concatenate([ids[a : a + k] for a, k in documents])
            writer.write(gathered)
            look(place[here], length[here], gathered)
    return writer.entry(plan.split, plan.documents)
