"""Encoded parts -> shuffled shards: since parts are sorted by shuffle key, a shard is one slice of every part."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from prep.dedup import shard_limits, validates
from prep.parts import load_encoded
from store.shards import Shard, ShardWriter, Split

GATHER_TOKENS = 1 << 20  # ids joined per write: bounds memory, amortises the call


@dataclass(frozen=True)
class ShardPlan:
    """One shard to write: the documents whose shuffle key is in [first, last]."""

    split: Split
    index: int
    first: int
    last: int
    documents: int
    tokens: int

    def file_name(self, compressed: bool) -> str:
        """`train-00000.bin`, with `.zst` when compressed."""
        return f"{self.split}-{self.index:05d}.bin" + (".zst" if compressed else "")


def plan_shards(split: Split, key: np.ndarray, tokens: np.ndarray, shard_tokens: int) -> list[ShardPlan]:
    """Plans for one split from all its documents' keys and token counts, each (documents,).

    Documents of one key (kept duplicates) stay in one shard.
    """
    if not len(key):
        return []
    order = np.argsort(key, kind="stable")
    key, tokens = key[order], tokens[order].astype(np.int64)
    starts = np.unique(np.searchsorted(key, key[shard_limits(tokens, shard_tokens)[:-1]], "left"))
    ends = np.append(starts[1:], len(key))
    return [
        ShardPlan(split, i, int(key[a]), int(key[b - 1]), int(b - a), int(tokens[a:b].sum()))
        for i, (a, b) in enumerate(zip(starts, ends, strict=True))
    ]


def write_shard(
    plan: ShardPlan, parts: list[Path], path: Path, *, val_limit: int, seed: int, level: int | None
) -> Shard:
    """Gather a shard's documents from all parts, in key order, and write it to the local `path`."""
    keys, where, lengths, sources, arrays = [], [], [], [], []
    for number, part in enumerate(parts):
        encoded = load_encoded(part)
        arrays.append(encoded.ids)
        a = int(np.searchsorted(encoded.key, np.uint64(plan.first), "left"))
        b = int(np.searchsorted(encoded.key, np.uint64(plan.last), "right"))
        mine = validates(encoded.key[a:b], val_limit, seed) == (plan.split == "val")
        tokens = encoded.tokens[a:b].astype(np.int64)
        begins = int(encoded.tokens[:a].sum(dtype=np.int64)) + np.cumsum(tokens) - tokens
        keys.append(encoded.key[a:b][mine])
        where.append(begins[mine])
        lengths.append(tokens[mine])
        sources.append(np.full(int(mine.sum()), number, np.int64))
    key, at, length, source = map(np.concatenate, (keys, where, lengths, sources))
    order = np.argsort(key, kind="stable")
    with ShardWriter(path, plan.tokens, arrays[0].dtype, level=level) as writer:
        pending, n = [], 0
        for s, a, k in zip(source[order].tolist(), at[order].tolist(), length[order].tolist(), strict=True):
            pending.append(arrays[s][a : a + k])
            n += k
            if n >= GATHER_TOKENS:
                writer.write(np.concatenate(pending))
                pending, n = [], 0
        if pending:
            writer.write(np.concatenate(pending))
    return writer.entry(plan.split, plan.documents)
