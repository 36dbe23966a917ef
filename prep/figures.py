"""What is counted about the encoded documents, for the report.

Integers only: sums of them do not depend on the order, so that any workers and any interruption give the same report.
"""

import heapq
from collections.abc import Iterable
from dataclasses import dataclass, fields

import numpy as np

from prep.formats import ROLES
from prep.parts import Documents, Encoded

SPREAD_BYTES = 32_000_000  # text on which dispersion is measured: of all of it, that is a tenth of the encode pass
BITMAP_BYTES = 2 << 20  # documents x vocabulary at once, small enough for the cache: 4 times faster than sorting
EDGES = np.array(sorted({round(2 ** (i / 8)) for i in range(8 * 34 + 1)}))  # of length bins: 8 to a doubling
BIT = 1024  # surprise is counted in 1/1024 bits
EXTREMES, EXTREME_TOKENS = 10, 32  # documents shown at either end; shorter ones say too little to be judged
EXCERPT_TOKENS = 120
# Of 2,775 frequent tokens of 217 MB of real conversation half score below 1.4 and 99 % below 4 (words of one topic:
# "cancer" 6.4, "chemotherapy" 4.9); above 8 there were five: blockquote, <!--, option, =" and a line end.
SUSPICIOUS, MAX_SUSPECTS = 8, 12
MIN_EXPECTED = 30  # documents: below, chance alone gives such scores


def bins(lengths: np.ndarray) -> np.ndarray:
    """The bin in EDGES of each length."""
    return np.searchsorted(EDGES, lengths, "right") - 1


def histogram(lengths: np.ndarray) -> np.ndarray:
    """(len(EDGES),) int64: how many lengths fall in each bin."""
    return np.bincount(bins(lengths), minlength=len(EDGES))


@dataclass
class Figures:
    """Counts about encoded documents; those of several parts are added."""

    totals: np.ndarray  # (3,) documents, ids, bytes of text
    ids: np.ndarray  # (vocab_size,) how often each id occurs
    turns: np.ndarray  # (bins,) turns by the ids of their text
    doc_turns: np.ndarray  # (bins,) conversations by turns
    doc_ids: np.ndarray  # (bins,) documents by ids
    roles: np.ndarray  # (roles, 2) turns, and ids of their text, by role
    spread: np.ndarray  # (2, vocab_size) how often each id occurs in the spread sample, and in how many documents
    spread_docs: np.ndarray  # (2, bins) documents of the spread sample by length in ids, and their ids

    @classmethod
    def empty(cls, vocab_size: int) -> "Figures":
        """All counts zero."""
        n = len(EDGES)
        shapes = ((3,), (vocab_size,), (n,), (n,), (n,), (len(ROLES), 2), (2, vocab_size), (2, n))
        return cls(*(np.zeros(shape, np.int64) for shape in shapes))

    def add(self, other: "Figures") -> None:
        """Add what was counted elsewhere."""
        for field in fields(self):
            getattr(self, field.name)[...] += getattr(other, field.name)


def spread_limit(text_bytes: int) -> int:
    """Training documents whose place is at most this are the spread sample: chosen by content, as the shuffle is."""
    return 2**63 + int(min(SPREAD_BYTES / max(text_bytes, 1), 1) * (2**63 - 1))


def measure(
    documents: Documents, turn_ids: np.ndarray, encoded: Encoded, *, vocab_size: int, spread_limit: int
) -> Figures:
    """Figures of one encoded part; `turn_ids` (turns,) are the ids of each turn's text, `spread_limit` from above."""
    role = documents.turn_role
    by_role = np.bincount(role, minlength=len(ROLES)), np.bincount(role, turn_ids, len(ROLES))
    first, last = np.searchsorted(encoded.place, np.array([2**63 - 1, spread_limit], np.uint64), "right")
    lengths = encoded.tokens[first:last].astype(np.int64)
    begin = encoded.tokens[:first].sum(dtype=np.int64)
    # counting by what numpy has an index as takes half the time of counting by uint16
    before, sampled, after = np.split(encoded.ids.astype(np.intp), [begin, begin + lengths.sum()])
    in_before, in_sampled, in_after = (np.bincount(ids, minlength=vocab_size) for ids in (before, sampled, after))
    at = bins(lengths)
    return Figures(
        np.array([len(encoded.tokens), len(encoded.ids), documents.text_bytes()]),
        in_before + in_sampled + in_after,
        histogram(turn_ids[turn_ids > 0]),
        histogram(documents.doc_turns[role[_first_turns(documents)] > 0]),
        histogram(encoded.tokens),
        np.stack(by_role, axis=1).astype(np.int64),
        np.stack([in_sampled, _documents_holding(sampled, lengths, vocab_size)]),
        np.stack([np.bincount(at, minlength=len(EDGES)), np.bincount(at, lengths, len(EDGES)).astype(np.int64)]),
    )


def _first_turns(documents: Documents) -> np.ndarray:
    return np.cumsum(documents.doc_turns, dtype=np.int64) - documents.doc_turns


def _documents_holding(ids: np.ndarray, lengths: np.ndarray, vocab_size: int) -> np.ndarray:
    """(vocab_size,) int64: in how many documents each id occurs."""
    holding = np.zeros(vocab_size, np.int64)
    step = min(max(BITMAP_BYTES // vocab_size, 1), 255)  # documents whose sum fits a byte
    ends = np.append(0, np.cumsum(lengths))
    for first in range(0, len(lengths), step):
        here = lengths[first : first + step]
        seen = np.zeros(len(here) * vocab_size, np.uint8)
        rows = np.repeat(np.arange(len(here)) * vocab_size, here)
        seen[rows + ids[ends[first] : ends[first + len(here)]]] = 1
        holding += seen.reshape(len(here), vocab_size).sum(0, dtype=np.uint8)
    return holding


# ---- what follows from the counts -----------------------------------------------------------------------------------


def expected_documents(figures: Figures) -> np.ndarray:
    """(vocab_size,) float: how many documents of the spread sample would hold each id if it fell by chance.

    By chance a document of n ids misses one that occurs c times among N with probability exp(-c n / N).
    """
    count = figures.spread[0]
    documents, ids = figures.spread_docs
    used = documents > 0
    mean_length = ids[used] / documents[used]
    expected = np.zeros(len(count))
    for n, length in zip(documents[used], mean_length, strict=True):
        expected -= n * np.expm1(count * (-length / max(count.sum(), 1)))
    return expected


def suspects(figures: Figures, special_ids: Iterable[int]) -> np.ndarray:
    """Ids that are used more than most and sit in SUSPICIOUS times fewer documents than by chance, the worst first."""
    _, holding = figures.spread
    expected = expected_documents(figures)
    score = np.round(expected / np.maximum(holding, 1), 1)
    seldom = figures.ids * len(figures.ids) < figures.ids.sum()
    score[seldom | (expected < MIN_EXPECTED) | (score < SUSPICIOUS)] = 0
    score[list(special_ids)] = 0
    return np.argsort(-score, kind="stable")[: min(np.count_nonzero(score), MAX_SUSPECTS)]


def surprise(ids: np.ndarray) -> np.ndarray:
    """(vocab_size,) int64: -log2 of each id's share of all, in 1/BIT bits; 0 where it never occurs."""
    share = np.maximum(ids, 1) / max(ids.sum(), 1)
    return np.where(ids > 0, np.round(-np.log2(share) * BIT), 0).astype(np.int64)


@dataclass(frozen=True)
class Counted:
    """The figures of a whole corpus, its `suspects`, and what is told of each of the inputs."""

    group_totals: np.ndarray  # (inputs, 3): a vocabulary's counts for each of ten thousand inputs would be gigabytes
    total: Figures
    suspects: np.ndarray

    @classmethod
    def of(cls, measured: Iterable[tuple[int, Figures]], n_groups: int, *, special_ids: Iterable[int]) -> "Counted":
        """What follows from the figures of at least one part, each with the number of the input it came from."""
        group_totals, total = np.zeros((n_groups, 3), np.int64), None
        for group, figures in measured:
            total = total or Figures.empty(len(figures.ids))
            total.add(figures)
            group_totals[group] += figures.totals
        return cls(group_totals, total, suspects(total, special_ids))


def watch_table(counted: Counted) -> np.ndarray:
    """(2, vocab_size) int32: the surprise of each id, and the number (from 1) of those that are suspects."""
    table = np.zeros((2, len(counted.total.ids)), np.int32)
    table[0] = surprise(counted.total.ids)
    table[1, counted.suspects] = np.arange(1, len(counted.suspects) + 1)
    return table


class Watch:
    """Looks at documents while they are written: the least and the most surprising, and the first that holds a suspect.

    `table` is a `watch_table`.
    """

    def __init__(self, table: np.ndarray) -> None:
        self.surprise, self.suspects = table[0], table[1].copy()
        self.seen: dict = {"bits": [0] * 128, "likely": [], "unlikely": [], "suspects": {}, "longest": 0}

    def look(self, place: np.ndarray, lengths: np.ndarray, ids: np.ndarray) -> None:
        """Look at whole documents end to end: `place` and `lengths` (documents,), `ids` (sum of lengths,)."""
        begins = np.cumsum(lengths) - lengths
        # integers: a sum of floats would depend on how numpy groups them
        bits = np.add.reduceat(_look_up(self.surprise, ids), begins, dtype=np.int64) / (lengths * BIT)
        quarter = np.bincount(np.minimum(bits * 4, 127).astype(np.int64), minlength=128)
        self.seen["bits"] = (quarter + self.seen["bits"]).tolist()
        self.seen["longest"] = max(self.seen["longest"], int(lengths.max()))
        judged = np.flatnonzero(lengths >= EXTREME_TOKENS)
        order = judged[np.lexsort((place[judged], bits[judged]))]
        for name, chosen in (("likely", order[:EXTREMES]), ("unlikely", order[-EXTREMES:])):
            self.seen[name] += [
                [float(bits[i]), int(place[i]), int(lengths[i]), ids[begins[i] : begins[i] + lengths[i]][:EXCERPT_TOKENS].tolist()]
                for i in chosen
            ]  # fmt: skip
        self.seen = join([self.seen])
        if self.suspects.any():
            self._find_suspects(place, begins, lengths, ids)

    def _find_suspects(self, place: np.ndarray, begins: np.ndarray, lengths: np.ndarray, ids: np.ndarray) -> None:
        number = _look_up(self.suspects, ids)
        hits = np.flatnonzero(number)
        for suspect, first in zip(*np.unique(number[hits], return_index=True), strict=True):
            at = int(hits[first])
            document = int(np.searchsorted(begins, at, "right")) - 1
            begin, end = int(begins[document]), int(begins[document] + lengths[document])
            before = ids[max(begin, at - EXCERPT_TOKENS // 3) : at]
            after = ids[at + 1 : min(end, at + EXCERPT_TOKENS // 2)]
            self.seen["suspects"][str(suspect)] = [int(place[document]), before.tolist(), after.tolist()]
            self.suspects[self.suspects == suspect] = 0  # found: no need to look for it again


def _look_up(table: np.ndarray, ids: np.ndarray) -> np.ndarray:
    # every id is in the table: not to ask that takes less than half of the time
    return np.take(table, ids, mode="clip")


def join(seen: Iterable[dict]) -> dict:
    """What several watches have seen, as one."""
    seen = list(seen)
    found = sorted((item for s in seen for item in s["suspects"].items()), key=lambda item: item[1][0], reverse=True)
    return {
        "bits": np.sum([s["bits"] for s in seen], axis=0).tolist(),
        "likely": heapq.nsmallest(EXTREMES, (d for s in seen for d in s["likely"])),
        "unlikely": heapq.nlargest(EXTREMES, (d for s in seen for d in s["unlikely"])),
        "longest": max(s["longest"] for s in seen),
        "suspects": dict(found),  # of each the one with the smallest place: the last to be set
    }
