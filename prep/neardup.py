"""Near-duplicates of a whole corpus: bands of MinHash give candidate pairs, their Jaccard index links them to components.

Of a component the earliest document is kept, and every one that is not itself alike to one kept: links alone would have
a chain of small differences end in another text. Memory holds some tens of bytes a document. Bands and shingles lie in
files made by pure tasks, one for each part, and are looked at one band, then one block of pairs at a time.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from cli.progress import Meter
from prep import minhash, parts
from prep.dedup import group_equal
from prep.pool import Executor

MAX_LEADERS = 100  # of a component: what is like none of them is kept, or a vast one would take quadratic time
BLOCK_SHINGLES = 4_000_000  # of candidate pairs, compared at once: about 200 MB


def find(cleaned: list[Path], keep: list[np.ndarray], threshold: float, work: Path, pool: Executor) -> np.ndarray:
    """(documents,) int64: the place of an earlier document, to be kept, at least `threshold` alike; else its own.

    Only documents where `keep`, (documents,) bool of each part, is true take part.
    """
    decided, marker = work / "near-duplicates.npy", work / "near-duplicates.json"
    if not parts.load_marker(marker):
        places = np.flatnonzero(np.concatenate(keep))
        kept_one = np.arange(sum(map(len, keep)))
        kept_one[places] = places[_find_kept(cleaned, keep, threshold, pool)]
        parts.save_marker(marker, {}, parts.save_array(decided, kept_one))
    for pattern in ("bands-*", "shingles-*"):  # the encoded parts need the room
        for path in work.glob(pattern):
            path.unlink()
    return np.load(decided, allow_pickle=False)


def _find_kept(cleaned: list[Path], keep: list[np.ndarray], threshold: float, pool: Executor) -> np.ndarray:
    """`find` among the documents that take part."""
    n = sum(int(k.sum()) for k in keep)
    with Meter("signatures", n, " documents") as meter:
        jobs = ((path, kept, threshold) for path, kept in zip(cleaned, keep, strict=True))
        for marker in pool.run(bands_task, jobs):
            meter.add(marker["documents"])
    bands = range(minhash.band_shape(threshold)[0])
    candidate = np.zeros(n, bool)
    with Meter("candidates", len(bands), " bands") as meter:
        for band in bands:
            key = _band(cleaned, keep, band)
            order = np.argsort(key)
            same = key[order[1:]] == key[order[:-1]]
            candidate[order[1:][same]] = candidate[order[:-1][same]] = True
            meter.add(1)
    sets = _collect_sets(cleaned, keep, candidate, pool)
    root = np.arange(len(sets.count))
    with Meter("compare", len(bands), " bands") as meter:
        for band in bands:
            a, b = equal_pairs(_band(cleaned, keep, band)[candidate])
            apart = root[a] != root[b]
            alike = sets.jaccard(a[apart], b[apart]) >= threshold
            join(root, a[apart][alike], b[apart][alike])
            meter.add(1)
    places = np.flatnonzero(candidate)
    kept_one = np.arange(n)
    kept_one[places] = places[leaders(root, lambda a, b: sets.jaccard(a, b) >= threshold)]
    return kept_one


def bands_task(path: Path, keep: np.ndarray, threshold: float) -> dict:
    """One cleaned part -> the band keys of its kept documents."""
    out = _part_file(path, "bands")
    if marker := parts.load_marker(out.with_suffix(".json")):
        return marker
    keys = minhash.band_keys(parts.load_documents(path).select(keep), threshold)
    return parts.save_marker(out.with_suffix(".json"), {"documents": keys.shape[1]}, parts.save_array(out, keys))


def _band(cleaned: list[Path], keep: list[np.ndarray], band: int) -> np.ndarray:
    """(kept documents,) uint32: one band's keys."""
    counts = [int(k.sum()) for k in keep]
    keys = np.empty(sum(counts), np.uint32)
    for path, n, mine in zip(cleaned, counts, np.split(keys, np.cumsum(counts)[:-1]), strict=True):
        if n:
            parts.read_slice(_part_file(path, "bands"), band * n, mine)
    return keys


def _part_file(path: Path, name: str) -> Path:
    return path.with_name(path.name.replace("clean-", f"{name}-")).with_suffix(".npy")


def equal_pairs(key: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places (earlier, later) with an equal key: each such place with the first one, and with the one before it."""
    order, first = group_equal(key)
    later = np.flatnonzero(order != first)
    far = later[first[later] != order[later - 1]]
    return np.concatenate([order[later - 1], first[far]]), np.concatenate([order[later], order[far]])


# ---- candidates -----------------------------------------------------------------------------------------------------


class Sets:
    """The shingles of the candidate documents, in files that tasks have made."""

    def __init__(self, paths: list[Path], counts: list[np.ndarray]) -> None:
        self.paths = paths
        self.part = np.repeat(np.arange(len(paths)), [len(c) for c in counts])
        self.start = np.concatenate([np.cumsum(c) - c for c in counts])  # in the part's file
        self.count = np.concatenate(counts)

    def _read(self, number: int) -> np.ndarray:
        out = np.empty(self.count[number], np.uint32)
        parts.read_slice(self.paths[self.part[number]], int(self.start[number]), out)
        return out

    def jaccard(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """(pairs,) float: how alike the candidates a[i] and b[i] are."""
        if not len(a):
            return np.zeros(0)
        block = np.cumsum(self.count[a] + self.count[b]) // BLOCK_SHINGLES
        found = []
        for mine in np.split(np.arange(len(a)), np.flatnonzero(np.diff(block)) + 1):
            numbers, at = np.unique(np.concatenate([a[mine], b[mine]]), return_inverse=True)
            found.append(minhash.jaccard([self._read(i) for i in numbers.tolist()], *np.split(at, 2)))
        return np.concatenate(found)


def _collect_sets(cleaned: list[Path], keep: list[np.ndarray], candidate: np.ndarray, pool: Executor) -> Sets:
    """Have the shingles of the candidates, (kept documents,) bool, written to files."""
    cuts = np.cumsum([int(k.sum()) for k in keep])[:-1]
    wanted = []
    for kept, mine in zip(keep, np.split(candidate, cuts), strict=True):
        wanted.append(np.zeros(len(kept), bool))
        wanted[-1][np.flatnonzero(kept)[mine]] = True
    with Meter("shingles", int(candidate.sum()), " documents") as meter:
        counts = []
        for marker in pool.run(shingles_task, zip(cleaned, wanted, strict=True)):
            counts.append(np.array(marker["counts"], np.int64))
            meter.add(len(counts[-1]))
    return Sets([_part_file(p, "shingles") for p in cleaned], counts)


def shingles_task(path: Path, wanted: np.ndarray) -> dict:
    """One cleaned part -> the different shingles of its candidate documents, and how many each has."""
    out = _part_file(path, "shingles")
    if marker := parts.load_marker(out.with_suffix(".json")):
        return marker
    if not wanted.any():
        return {"counts": []}
    hashes, counts = minhash.shingle_sets(parts.load_documents(path).select(wanted))
    return parts.save_marker(out.with_suffix(".json"), {"counts": counts.tolist()}, parts.save_array(out, hashes))


# ---- components -----------------------------------------------------------------------------------------------------


def join(root: np.ndarray, a: np.ndarray, b: np.ndarray) -> None:
    """Unite the components of a[i] and b[i] in `root`, (documents,) int: the earliest document of each one's component."""
    while True:
        low, high = np.minimum(root[a], root[b]), np.maximum(root[a], root[b])
        apart = low < high
        if not apart.any():
            return
        np.minimum.at(root, high[apart], low[apart])
        while not np.array_equal(above := root[root], root):
            root[:] = above


def leaders(root: np.ndarray, alike: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> np.ndarray:
    """(documents,) int: the first document of its component that is kept and `alike` to each; itself for one kept.

    In every round the earliest open document of each component is kept and takes those alike to it.
    """
    kept_one = np.arange(len(root))
    open_ = np.flatnonzero(np.bincount(root, minlength=len(root))[root] > 1)
    for _ in range(MAX_LEADERS):
        _, first, component = np.unique(root[open_], return_index=True, return_inverse=True)
        leader = open_[first][component]
        rest = leader != open_
        leader, open_ = leader[rest], open_[rest]
        taken = alike(leader, open_)
        kept_one[open_[taken]] = leader[taken]
        open_ = open_[~taken]
        if not len(open_):
            break
    return kept_one
