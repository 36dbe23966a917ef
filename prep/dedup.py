"""Which documents are kept, where each goes, and in what order: decided from hashes alone, never from arrival order."""

import numpy as np

from store.hashing import mix


def group_equal(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(order, first): the places sorted by value, then place; for each of those, the first place of an equal value."""
    order = np.argsort(values, kind="stable")
    new = np.ones(len(values), bool)
    new[1:] = values[order[1:]] != values[order[:-1]]
    return order, order[np.maximum.accumulate(np.where(new, np.arange(len(values)), 0))]


def earliest_equal(doc_hash: np.ndarray) -> np.ndarray:
    """(documents,) int64: the place of the earliest document of the same hash, its own where it is the earliest.

    Two of 5 million different documents (12 GB) have one 64-bit hash with a probability of 7e-7.
    """
    earliest = np.arange(len(doc_hash))
    share = (doc_hash >> np.uint64(60)).astype(np.uint8)
    for value in range(16):  # one share at a time: sorting takes 40 bytes a document
        mine = np.flatnonzero(share == value)
        order, first = group_equal(doc_hash[mine])
        earliest[mine[order]] = mine[first]
    return earliest


def largest_groups(earliest: np.ndarray, n: int) -> list[tuple[int, int]]:
    """(place of the earliest document, documents) of the n largest groups of two or more; those of one size in order."""
    sizes = np.bincount(earliest)
    places = np.flatnonzero(sizes > 1)
    largest = places[np.argsort(-sizes[places], kind="stable")[:n]]
    return list(zip(largest.tolist(), sizes[largest].tolist(), strict=True))


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
