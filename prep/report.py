"""report.json: what went in, was dropped and came out, what it looks like, and what a person should look at.

`describe` gives all of it as one dictionary of plain values, equal for any workers, interruption and machine (times are
in timing.js). docs/report.md says what each field means; report_page.py shows them.
"""

import functools
from typing import Any

import numpy as np
from tokenizers.pre_tokenizers import ByteLevel

from gpt.tokenizer import ROLE_TOKENS, Tokenizer
from prep.corpus import Source
from prep.figures import EDGES, Counted, Figures, expected_documents
from prep.formats import ROLES
from prep.stages import Cleaned, Selection
from prep.verdict import verdict
from store import fs
from store.shards import Shard

EXCERPT_CHARS = 300
ODD_BITS = 3  # a token more than usual: a document of an English corpus then is in another language, or is none
LONG_TOKEN = 64  # bytes: no word is as long; a token of a run of signs can be as long as the run
RANKS_PER_DECADE = 16
SELDOM = 100  # a token used less often than this has hardly been learnt


def describe(
    *, settings: dict[str, Any], sources: list[Source], cleaned: Cleaned, selection: Selection, counted: Counted,
    seen: dict, shards: list[Shard], tokenizer: Tokenizer,
) -> dict[str, Any]:  # fmt: skip
    """The report. `settings` are those that the output depends on, `seen` is what the shards' watches saw."""
    total = counted.total
    report = {
        "counts": dict(sorted({**cleaned.counts, **selection.counts}.items())),
        "clusters": selection.clusters,
        "examples_dropped": cleaned.examples,
        "first_unusable": cleaned.first_unusable,
        "changes": cleaned.changes,
        "tokenizer_sample_bytes": selection.sample_bytes,
        "totals": {split: totals([s for s in shards if s.split == split]) for split in ("train", "val")},
        "sources": [
            source_figures([s for s in sources if s.group == group], encoded, counts)
            | {"fraction": selection.fractions[group] if selection.fractions else 1.0}
            for group, (encoded, counts) in enumerate(
                zip(counted.group_totals.tolist(), cleaned.group_counts, strict=True)
            )
            if counts["bytes"]
        ],
        "lengths": {
            "document_tokens": length_figures(total.doc_ids, seen["longest"]) | {"longest": seen["longest"]},
            "turn_tokens": length_figures(total.turns),
            "conversation_turns": length_figures(total.doc_turns),
        },
        "roles": {
            role or "plain": {"turns": int(turns), "tokens": int(ids)}
            for role, (turns, ids) in zip(ROLES, total.roles, strict=True)
            if turns
        },
        "vocabulary": vocabulary_figures(total, counted.suspects, seen, tokenizer),
        "surprise": surprise_figures(total, seen, tokenizer),
        "settings": settings,
    }
    return {"verdict": verdict(report), **report}


def totals(shards: list[Shard]) -> dict[str, int]:
    """Of one split."""
    return {name: sum(getattr(s, name) for s in shards) for name in ("tokens", "documents", "stored_bytes")}


def source_figures(files: list[Source], encoded: list[int], counts: dict[str, int]) -> dict[str, Any]:
    """One of the inputs, named by its first file; no folders, which differ between machines."""
    documents, tokens, text_bytes = encoded
    return {
        "name": fs.redact(files[0].url).rstrip("/").rsplit("/", 1)[-1],
        "files": len(files),
        "bytes": counts["bytes"],
        "read_documents": counts["documents"],
        "documents": documents,
        "tokens": tokens,
        "text_bytes": text_bytes,
    }


def length_figures(histogram: np.ndarray, longest: int = EDGES[-1]) -> dict[str, Any]:
    """Quantiles of a length, each the greatest that its bin holds, and the bins that are not empty: [[from, to, how many]…]."""
    upto = np.minimum(np.append(EDGES[1:] - 1, EDGES[-1]), longest)
    cumulative = np.cumsum(histogram)
    at = [int(np.searchsorted(cumulative, max(q * cumulative[-1], 1))) for q in (0.05, 0.5, 0.95)]
    used = np.flatnonzero(histogram)
    return {
        **dict(zip(("p5", "median", "p95"), upto[at].tolist() if len(used) else [0, 0, 0], strict=True)),
        "bins": np.stack([EDGES[used], upto[used], histogram[used]], axis=1).tolist(),
    }


# ---- tokens ---------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def token_bytes(tokenizer: Tokenizer) -> list[bytes]:
    """The bytes that each id stands for, as the byte-level alphabet spells them; a special token's own spelling."""
    letters = sorted(ByteLevel.alphabet())
    table = {c: ord(c) for c in letters if ord(c) < 256}
    table |= zip((c for c in letters if c not in table), (b for b in range(256) if chr(b) not in table), strict=True)
    spelled = dict.fromkeys(range(tokenizer.vocab_size), b"")
    for text, i in tokenizer.vocabulary.items():
        try:
            spelled[i] = bytes(map(table.__getitem__, text))
        except KeyError:  # not in that alphabet
            spelled[i] = text.encode()
    return list(spelled.values())


def vocabulary_figures(total: Figures, suspects: np.ndarray, seen: dict, tokenizer: Tokenizer) -> dict[str, Any]:
    """How the vocabulary is used, and what in it is suspicious."""
    count, spelled = total.ids, token_bytes(tokenizer)
    special = list(tokenizer.special_ids.values())
    text = np.delete(np.arange(len(count)), special)
    n_bytes = np.array([len(b) for b in spelled])
    ranked = np.sort(count[count > 0])[::-1]
    ranks = np.unique(np.round(10 ** (np.arange(RANKS_PER_DECADE * 8) / RANKS_PER_DECADE))).astype(np.int64)
    ranks = ranks[ranks <= len(ranked)]
    used_bytes = np.bincount(np.minimum(n_bytes[text], 16), count[text], 17).astype(np.int64)
    return {
        "size": len(count),
        "never_used": int((count[text] == 0).sum()),
        "seldom_used": int((count[text] < SELDOM).sum()),
        "rank_frequency": np.stack([ranks, ranked[ranks - 1]], axis=1).tolist(),
        "tokens_by_bytes": used_bytes.tolist(),
        "very_long": int((n_bytes[text] > LONG_TOKEN).sum()),
        "longest": [readable(spelled[i]) for i in text[np.argsort(-n_bytes[text], kind="stable")[:12]]],
        "most_frequent": [
            {"token": readable(spelled[i]), "count": int(count[i])}
            for i in text[np.argsort(-count[text], kind="stable")[:24]]
        ],
        "looked_at_documents": int(total.spread_docs[0].sum()),
        "suspicious": suspicious_tokens(total, suspects, seen, spelled, tokenizer),
    }


def suspicious_tokens(
    total: Figures, suspects: np.ndarray, seen: dict, spelled: list[bytes], tokenizer: Tokenizer
) -> list[dict[str, Any]]:
    """Each suspect with its counts in the documents looked at and the surroundings of one occurrence."""
    expected = expected_documents(total)
    listed = []
    for number, i in enumerate(suspects.tolist(), start=1):
        _, before, after = seen["suspects"].get(str(number), (0, [], []))
        count, holding = total.spread[:, i].tolist()
        listed.append(
            {
                "token": readable(spelled[i]),
                "count": int(total.ids[i]),
                "looked_at_count": count,
                "documents": holding,
                "expected_documents": round(float(expected[i])),
                "before": plain_text(before, tokenizer)[-EXCERPT_CHARS // 2 :],
                "after": plain_text(after, tokenizer)[: EXCERPT_CHARS // 2],
            }
        )
    return listed


def readable(token: bytes) -> str:
    """A token's bytes as text; those that are no whole character as \\xe2; of a very long one the beginning."""
    return token[:LONG_TOKEN].decode("utf-8", "backslashreplace")


def plain_text(ids: list[int], tokenizer: Tokenizer) -> str:
    """The text of ids, turns separated by line ends."""
    return "\n".join(text for _, text in turns_of(ids, tokenizer))


def turns_of(ids: list[int], tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """(role, text) of each turn in a stretch of ids; "" for plain text and for a turn whose beginning is missing."""
    role_of = {tokenizer.special_ids[t]: role for role, t in ROLE_TOKENS.items()}
    special = set(tokenizer.special_ids.values())
    turns: list[tuple[str, list[int]]] = [("", [])]
    for i in ids:
        if i in special:
            turns.append((role_of.get(i, ""), []))
        else:
            turns[-1][1].append(i)
    return [(role, tokenizer.decode(said)) for role, said in turns if said]


# ---- surprise -------------------------------------------------------------------------------------------------------


def surprise_figures(total: Figures, seen: dict, tokenizer: Tokenizer) -> dict[str, Any]:
    """How predictable documents are when only the frequency of each token is known: bits a token, mean of a document."""
    share = total.ids[total.ids > 0] / max(total.ids.sum(), 1)
    bins, usual = np.array(seen["bits"]), float(-(share * np.log2(share)).sum())
    return {
        "bits_per_token": round(usual, 3),
        "odd_from_bits": round(4 * (usual + ODD_BITS)) / 4,
        "documents_by_quarter_bit": bins[: np.flatnonzero(bins)[-1] + 1].tolist(),
        "most_likely": [extreme_document(*d, tokenizer=tokenizer) for d in seen["likely"]],
        "least_likely": [extreme_document(*d, tokenizer=tokenizer) for d in seen["unlikely"]],
    }


def extreme_document(bits: float, place: int, tokens: int, ids: list[int], *, tokenizer: Tokenizer) -> dict[str, Any]:
    """One of the most or least likely documents, as far as EXCERPT_CHARS go."""
    turns, left = [], EXCERPT_CHARS
    for role, text in turns_of(ids, tokenizer):
        if left > 0:
            turns.append([role, text[:left]])
        left -= len(text)
    return {"bits_per_token": round(bits, 2), "tokens": tokens, "turns": turns, "cut": left < 0 or tokens > len(ids)}
