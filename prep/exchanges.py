"""Exchanges: a user's turn with the answers to it, the unit in which conversations repeat each other."""

from pathlib import Path

import numpy as np
import xxhash

from cli.progress import Meter
from prep import parts
from prep.dedup import group_equal
from prep.formats import ROLES
from prep.parts import Documents
from prep.pool import Executor

# Shorter ones are courtesies that people really repeat. Of 157,000 exchanges of real conversation 6 % of those below 80
# bytes had been said before ("No, thank you." / "Have a great day.") and 0.2 % of those of 80 to 200: from there on a
# repetition is a copy, and a conversation would lose its goodbye if less were asked.
MIN_BYTES = 100

PARTITION = 4_000_000  # exchanges sorted at once: about 200 MB
RECORD = np.dtype([("hash", "<u8"), ("doc", "<u4"), ("bytes", "<u4")])


def locate(documents: Documents) -> tuple[np.ndarray, np.ndarray]:
    """(records of RECORD, (exchanges, 2) first turn and turn after the last) of the exchanges of MIN_BYTES or more.

    Turns before the first user's, plain text and turns without an answer belong to none.
    """
    turns = len(documents.turn_role)
    if not turns:
        return np.zeros(0, RECORD), np.zeros((0, 2), np.int64)
    doc_first = np.cumsum(documents.doc_turns, dtype=np.int64) - documents.doc_turns
    asks = documents.turn_role == ROLES.index("user")
    begins = asks.copy()
    begins[doc_first] = True
    first = np.flatnonzero(begins)
    last = np.append(first[1:], turns)
    n_bytes = np.add.reduceat(documents.turn_bytes, first, dtype=np.int64)
    found = asks[first] & (last - first > 1) & (n_bytes >= MIN_BYTES)
    first, last, n_bytes = first[found], last[found], n_bytes[found]

    records = np.zeros(len(first), RECORD)
    records["doc"] = np.searchsorted(doc_first, first, "right") - 1
    records["bytes"] = n_bytes
    # equal text cut into other turns is another exchange
    shape = documents.turn_bytes.astype(np.uint64) * len(ROLES) + documents.turn_role
    text, text_at = documents.text.tobytes(), documents.turn_at()
    hashes = (
        xxhash.xxh3_64_intdigest(text[text_at[a] : text_at[b]] + shape[a:b].tobytes())
        for a, b in zip(first.tolist(), last.tolist(), strict=True)
    )
    records["hash"] = np.fromiter(hashes, np.uint64, len(first))
    return records, np.stack([first, last], axis=1)


def without(documents: Documents, repeated: np.ndarray) -> Documents:
    """The documents without the exchanges where `repeated`, (exchanges,) bool in the order of `locate`, is true."""
    if not repeated.any():
        return documents
    _, spans = locate(documents)
    change = np.zeros(len(documents.turn_role) + 1, np.int64)
    change[spans[repeated, 0]] += 1
    change[spans[repeated, 1]] -= 1
    turns = np.cumsum(change[:-1]) == 0
    return documents.select_turns(turns)


# ---- the whole corpus -----------------------------------------------------------------------------------------------


def find_repeated(cleaned: list[Path], keep: list[np.ndarray], pool: Executor) -> list[np.ndarray]:
    """(exchanges,) bool of each part: true where an earlier exchange of a kept document is equal."""
    with Meter("exchanges", sum(map(len, keep)), " documents") as meter:
        counts = []
        for marker, kept in zip(pool.run(exchanges_task, ((p,) for p in cleaned)), keep, strict=True):
            counts.append(marker["exchanges"])
            meter.add(len(kept))
    starts = np.cumsum(counts) - counts
    repeated = np.zeros(sum(counts), bool)
    partitions = -(-len(repeated) // PARTITION)
    for partition in range(partitions):
        hashes, places = [], []
        for path, kept, start in zip(cleaned, keep, starts.tolist(), strict=True):
            records = np.load(_records_path(path), mmap_mode="r", allow_pickle=False)
            mine = np.flatnonzero((records["hash"] % np.uint64(partitions) == partition) & kept[records["doc"]])
            hashes.append(records["hash"][mine])
            places.append(mine + start)
        order, first = group_equal(np.concatenate(hashes))
        repeated[np.concatenate(places)[order[order != first]]] = True
    return np.split(repeated, starts[1:])


def exchanges_task(path: Path) -> dict:
    """One cleaned part -> the records of its exchanges."""
    out = _records_path(path)
    if marker := parts.load_marker(out.with_suffix(".json")):
        return marker
    records, _ = locate(parts.load_documents(path))
    return parts.save_marker(out.with_suffix(".json"), {"exchanges": len(records)}, parts.save_array(out, records))


def losses(path: Path, repeated: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """((documents,) bool: loses all its exchanges; (documents,) uint32: bytes it loses) of a cleaned part."""
    n, records = parts.load_index(path).shape[1], np.load(_records_path(path), allow_pickle=False)
    left = np.bincount(records["doc"][~repeated], minlength=n)
    lost_bytes = np.bincount(records["doc"][repeated], records["bytes"][repeated], n).astype(np.uint32)
    return (lost_bytes > 0) & (left == 0), lost_bytes


def _records_path(path: Path) -> Path:
    return path.with_name(path.name.replace("clean-", "exchanges-")).with_suffix(".npy")
