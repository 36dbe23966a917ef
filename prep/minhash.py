"""How alike documents are: word shingles, MinHash signatures, bands of those, and the true Jaccard index. Arrays only.

Broder 1997, "On the resemblance and containment of documents"; Leskovec, Rajaraman & Ullman, "Mining of Massive
Datasets", chapter 3. numpy reads 47 MB/s a core; docs/dedup.md compares it with libraries.
"""

import functools
import sys
import unicodedata

import numpy as np

from prep.parts import Documents
from store.hashing import mix

# A changed word costs three shingles of three, five of five: with five, one word in fifty leaves 0.81 of a copy, with
# three 0.88. Two would take texts that merely speak of the same for copies.
SHINGLE_WORDS = 3
PERMUTATIONS = 128  # at most; those of whole bands are used
RECALL = 0.99  # of pairs that are exactly as alike as the threshold; 0.9999 of those a little above it
BLOCK_BYTES = 1 << 18  # of text at once: its arrays, 10 MB, stay in the cache
_ODD = np.uint64(0x9E3779B97F4A7C15)
_POSITIONS = 4096  # letters of a word that have a factor of their own


def band_shape(threshold: float) -> tuple[int, int]:
    """(bands, rows): the longest bands with which a pair of `threshold` shares at least one with RECALL probability."""
    fits = [r for r in range(1, PERMUTATIONS + 1) if 1 - (1 - threshold**r) ** (PERMUTATIONS // r) >= RECALL]
    rows = max(fits, default=1)
    return PERMUTATIONS // rows, rows


# ---- words and shingles ---------------------------------------------------------------------------------------------


@functools.cache
def _alphabet() -> tuple[np.ndarray, np.ndarray]:
    """For each code point: its lower case, or 0 where it is part of no word (uint32); whether it is a word alone."""
    lower = np.zeros(sys.maxunicode + 1, np.uint32)
    for code in (*range(0xD800), *range(0xE000, 0x32000)):  # no letters in surrogates, none assigned above
        c = chr(code)
        if c.isalnum() or unicodedata.category(c)[0] == "M":  # marks belong to the letter before them
            lower[code] = ord(c.lower()[0])
    alone = np.zeros(sys.maxunicode + 1, bool)
    # scripts without spaces: Thai and Lao, Burmese, Khmer, kana, Chinese
    for first, last in ((0xE00, 0xEFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x3040, 0x30FF), (0x3400, 0x9FFF),
                        (0xF900, 0xFAFF), (0x20000, 0x31FFF)):  # fmt: skip
        alone[first : last + 1] = lower[first : last + 1] > 0
    return lower, alone


@functools.cache
def _factors() -> np.ndarray:
    return np.cumprod(np.full(_POSITIONS, _ODD))


def words(text: str) -> tuple[np.ndarray, np.ndarray]:
    """(64-bit hash of each word, index of its first letter), both (words,), whatever its case; signs are no words."""
    lower, alone = _alphabet()
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    letters = lower[codes]
    begins = letters > 0
    begins[1:] &= (letters[:-1] == 0) | alone[codes[1:]]
    starts = np.flatnonzero(begins)
    if not len(starts):
        return np.zeros(0, np.uint64), starts
    position = np.arange(len(codes) - starts[0]) - np.repeat(starts - starts[0], np.diff(starts, append=len(codes)))
    factor = _factors()[position & (_POSITIONS - 1)]
    return np.add.reduceat(letters[starts[0] :] * factor, starts - starts[0]), starts


def shingles(documents: Documents) -> tuple[np.ndarray, np.ndarray]:
    """(32-bit hash of each shingle, shingles of each document): as many as it has words, those at its end shorter.

    A document without words is one shingle of its own, like its equal alone.
    """
    turns = documents.turns()
    turn_ends = np.cumsum(np.fromiter(map(len, turns), np.int64, len(turns)) + 1)
    hashes, starts = words("\n".join(turns))
    ends = np.searchsorted(starts, turn_ends[np.cumsum(documents.doc_turns, dtype=np.int64) - 1])
    counts = np.diff(ends, prepend=0)
    if not counts.all():
        mute = counts == 0
        hashes, counts = np.insert(hashes, ends[mute], documents.doc_hash[mute]), np.maximum(counts, 1)
    gaps = np.repeat(np.arange(len(counts)) * (SHINGLE_WORDS - 1), counts)
    at = np.arange(len(hashes)) + gaps  # after each document two words that are none
    spaced = np.zeros(len(hashes) + len(counts) * (SHINGLE_WORDS - 1), np.uint64)
    spaced[at] = hashes
    joined = np.zeros(len(hashes), np.uint64)
    for step in range(SHINGLE_WORDS):
        joined = joined * _ODD + spaced[at + step]
    return (mix(joined, 0) >> np.uint64(32)).astype(np.uint32), counts


# ---- signatures -----------------------------------------------------------------------------------------------------


def signatures(hashes: np.ndarray, counts: np.ndarray, n: int) -> np.ndarray:
    """(n, documents) uint32: the least value of each document's shingles under each of n permutations a h + b."""
    offsets = np.cumsum(counts) - counts
    a = mix(np.arange(n), 1).astype(np.uint32) | np.uint32(1)
    b = mix(np.arange(n), 2).astype(np.uint32)
    out, permuted = np.empty((n, len(counts)), np.uint32), np.empty_like(hashes)
    for row in range(n):
        np.multiply(hashes, a[row], out=permuted)
        permuted += b[row]
        np.minimum.reduceat(permuted, offsets, out=out[row])
    return out


def band_keys(documents: Documents, threshold: float) -> np.ndarray:
    """(bands, documents) uint32: two documents with an equal key in any band are candidates."""
    n_bands, rows = band_shape(threshold)
    columns = [np.zeros((n_bands, 0), np.uint32)]
    for block in documents.blocks(BLOCK_BYTES):
        rows_of_bands = signatures(*shingles(block), n_bands * rows).reshape(n_bands, rows, -1)
        key = np.zeros((n_bands, rows_of_bands.shape[2]), np.uint64)
        for row in range(rows):
            key = key * _ODD + rows_of_bands[:, row]
        columns.append((mix(key, 3) >> np.uint64(32)).astype(np.uint32))
    return np.concatenate(columns, axis=1)


def shingle_sets(documents: Documents) -> tuple[np.ndarray, np.ndarray]:
    """(different shingles of all documents, ascending within each; number of each document)."""
    found, counts = [np.zeros(0, np.uint32)], [np.zeros(0, np.int64)]
    for block in documents.blocks(BLOCK_BYTES):
        hashes, n = shingles(block)
        keyed = np.sort(np.repeat(np.arange(len(n), dtype=np.uint64) << np.uint64(32), n) | hashes)
        keyed = keyed[np.append(True, keyed[1:] != keyed[:-1])]
        found.append(keyed.astype(np.uint32))
        counts.append(np.bincount((keyed >> np.uint64(32)).astype(np.int64), minlength=len(n)))
    return np.concatenate(found), np.concatenate(counts)


def jaccard(sets: list[np.ndarray], a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(pairs,) float: what the sets a[i] and b[i], each ascending uint32, share, of all that they hold together."""
    counts = np.fromiter(map(len, sets), np.int64, len(sets))
    pair = np.arange(len(a), dtype=np.uint64) << np.uint64(32)
    keyed = [np.repeat(pair, counts[side]) | np.concatenate([sets[i] for i in side.tolist()]) for side in (a, b)]
    both = np.sort(np.concatenate(keyed), kind="stable")  # two ascending runs, which a stable sort merges
    shared = (both[1:][both[1:] == both[:-1]] >> np.uint64(32)).astype(np.int64)
    n_shared = np.bincount(shared, minlength=len(a))
    return n_shared / (counts[a] + counts[b] - n_shared)
