"""Which documents are kept, where each goes, and in what order: decided from hashes alone, never from arrival order."""

import numpy as np

from store.hashing import mix


def first_occurrences(doc_hash: np.ndarray) -> np.ndarray:
    """(documents,) bool: true for the earliest document of each hash; the rest are exact duplicates."""
    keep = np.zeros(len(doc_hash), bool)
    keep[np.unique(doc_hash, return_index=True)[1]] = True
    return keep


def below(doc_hash: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """(documents,) bool: the documents whose seeded hash falls in the first `fraction` of all values.

    A document's answer depends on its content alone: equal documents can never be on both sides.
    """
    if fraction >= 1:
        return np.ones(len(doc_hash), bool)
    return mix(doc_hash, seed) < np.uint64(int(fraction * 2**64))


def shuffle_key(doc_hash: np.ndarray, seed: int) -> np.ndarray:
    """(documents,) uint64: sorting by it is the shuffle. Different hashes have different keys."""
    return mix(doc_hash, seed + 2)


def validation_limit(key: np.ndarray, fraction: float, seed: int) -> int:
    """Below which value of its seeded hash a document validates, so that at least one does where any is asked for."""
    limit = int(fraction * 2**64)
    if limit and len(key) > 1:
        limit = max(limit, int(mix(key, seed + 1).min()) + 1)
    return limit


def validates(key: np.ndarray, limit: int, seed: int) -> np.ndarray:
    """(documents,) bool from shuffle keys: by content alone, so that equal documents are on one side."""
    return mix(key, seed + 1) < np.uint64(limit)


def place(key: np.ndarray, is_val: np.ndarray) -> np.ndarray:
    """(documents,) uint64: where documents stand in the dataset: those that validate first, each split shuffled."""
    return key >> np.uint64(1) | (~is_val).astype(np.uint64) << np.uint64(63)


def shard_limits(tokens: np.ndarray, shard_tokens: int) -> np.ndarray:
    """Cut documents, in order, into shards of about equal tokens: (shards + 1,) document positions.

    Every shard gets the documents whose first token falls in its share, and at least one document.
    """
    ends = np.cumsum(tokens, dtype=np.int64)
    total = int(ends[-1])
    n = min(max(1, -(-total // shard_tokens)), len(tokens))
    starts = ends - tokens
    limits = np.searchsorted(starts, np.arange(1, n) * (total / n), "left")
    return np.unique(np.concatenate(([0], limits, [len(tokens)])))
