"""Preparation's passes. Each is a list of pure tasks: inputs -> files and a marker, skipped when the marker proves them.

Between passes, what is global (duplicates, sample, split, order) is decided from small arrays.
"""

import functools
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cli.progress import Meter
from gpt.tokenizer import Tokenizer
from prep import clean as cleaning
from prep import corpus, dedup, encode, exchanges, figures, merge, mixing, neardup, parts, private, reading
from prep.formats import Document, Fields, Unusable
from prep.pool import Executor, in_threads
from store import fs
from store.shards import Shard

UPLOADS = 4  # shards on their way to the output at once, beside the work: as many wait on this disk at most
PACK_FROM = 1 << 30  # bytes of input: of fewer, all of it fits any disk once more, and packing is a tenth of the work
PROOFS, PROOF_BYTES = 16, 256 << 10  # places in the corpus, and text from all of them, that engines are compared on
LARGEST_CLUSTERS, CLUSTER_EXCERPT = 20, 200  # in the report; characters


@dataclass(frozen=True)
class Cleaned:
    """What the clean pass gives: its parts in the order of the corpus, and what it counted."""

    parts: list[Path]
    groups: list[int]  # of each part: which of the inputs it came from
    counts: Counter
    group_counts: list[Counter]  # of each of the inputs
    examples: dict[str, list[str]]  # reason: dropped texts
    changes: dict[str, list[list[str]]]  # rule: [before, after] excerpts
    first_unusable: str  # where the first record is that is no document, and how it begins; "" where there is none


# ---- clean ----------------------------------------------------------------------------------------------------------


def clean_corpus(
    tasks: list[corpus.Task], work: Path, *, rules: cleaning.Settings, fields: Fields, pool: Executor
) -> Cleaned:
    """Read, cut into documents, clean, drop, hash."""
    counts, examples, changes, done, groups = Counter(), {}, {}, [], []
    group_counts = [Counter() for _ in range(max((t.group for t in tasks), default=-1) + 1)]
    lines, first_unusable = Counter(), ""
    size = sum(t.size for t in tasks)
    level = parts.PACKED if size > PACK_FROM else None
    with Meter("clean", size, "B") as meter:
        jobs = ((task, work, rules, fields, level) for task in tasks)
        for task, marker in zip(tasks, pool.run(clean_task, jobs), strict=True):
            counts.update(marker["counts"])
            group_counts[task.group].update(marker["counts"])
            for shown, new in ((examples, marker["examples"]), (changes, marker["changes"])):
                for name, found in new.items():
                    known = shown.setdefault(name, [])
                    known += found[: cleaning.EXAMPLES - len(known)]
            first_unusable = first_unusable or _first_unusable(task, marker, lines)
            lines.update({p.source.url: n for p, n in zip(task.pieces, marker["lines"], strict=True)})
            done += [work / name for name in marker["files"] if name.endswith(".docs")]
            groups += [task.group] * (len(done) - len(groups))
            meter.add(task.size, f"{counts['kept']} documents kept")
    return Cleaned(done, groups, counts, group_counts, examples, changes, first_unusable)


def _first_unusable(task: corpus.Task, marker: dict, lines: Counter) -> str:
    """Where the task's first unusable record is, given the `lines` of each source that earlier tasks have read."""
    if not marker["first_unusable"]:
        return ""
    piece, reason, line, excerpt = marker["first_unusable"]
    url = task.pieces[piece].source.url
    return f"{fs.redact(url).rsplit('/', 1)[-1]}, line {lines[url] + line} ({reason}): {excerpt[:100]!r}"


def clean_marker(task: corpus.Task, work: Path) -> Path:
    """Where a task of the clean pass says that it is done."""
    return work / f"clean-{task.index:06d}.json"


def clean_task(task: corpus.Task, work: Path, rules: cleaning.Settings, fields: Fields, level: int | None) -> dict:
    """One task -> cleaned parts, packed with zstd's `level`, and their marker."""
    marker_path = clean_marker(task, work)
    if marker := parts.load_marker(marker_path):
        return marker
    cleaner, strict = cleaning.Cleaner(rules), "ascii" in rules.rules
    counts, examples, changes, files = Counter(), {}, {}, {}
    lines, first_unusable = [0] * len(task.pieces), None
    waiting, waiting_bytes = parts.Gathered(), 0

    def write() -> None:
        nonlocal waiting, waiting_bytes
        documents = waiting.documents()
        counts.update(kept=len(waiting), kept_bytes=documents.text_bytes(), turns=len(documents.turn_role))
        counts["chat"] += int(np.count_nonzero(documents.turn_role[waiting.first_turns()]))
        path = work / f"clean-{task.index:06d}-{len(files) // 2:04d}.docs"
        files.update(parts.save_documents(path, documents, level))
        waiting, waiting_bytes = parts.Gathered(), 0

    def drop(reason: str, text: str) -> None:
        counts[f"dropped_{reason}"] += 1
        if len(examples.setdefault(reason, [])) < cleaning.EXAMPLES:
            examples[reason].append(private.mask(text[:200]))

    def clean(document: Document) -> None:
        cleaned, changed = cleaner.clean(document)
        if changed:
            cleaning.tally(changed, counts, changes)
        if isinstance(cleaned, list):
            waiting.add(cleaned)
        else:
            drop(cleaned, "\n".join(said for _, said in document))

    for number, batch in ((n, b) for n, p in enumerate(task.pieces) for b in reading.read(p, fields, strict=strict)):
        for record in batch.records:
            if isinstance(record, parts.Gathered):
                counts["documents"] += len(record)
                for settled, run in record.runs(cleaner.settles(record)):
                    if settled:
                        waiting.extend(run)
                    else:
                        for document in run:
                            clean(document)
                continue
            counts["documents"] += 1
            if isinstance(record, Unusable):
                drop(record.reason, record.excerpt)
                first_unusable = first_unusable or (number, record.reason, record.line, private.mask(record.excerpt))
            else:
                clean(record)
        counts.update(bytes=batch.text_bytes, invalid_utf8=batch.invalid_utf8, cut=batch.cut)
        lines[number] += batch.lines
        waiting_bytes += batch.text_bytes
        if waiting and waiting_bytes >= corpus.TASK_BYTES:  # a compressed file is one task and many parts
            write()
    if waiting:
        write()
    figures = {"counts": dict(counts), "examples": examples, "changes": changes, "lines": lines}
    return parts.save_marker(marker_path, figures | {"first_unusable": first_unusable}, files)


# ---- select ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Selection:
    """What is kept of each part, in the order of the parts, and what was found on the way."""

    keep: list[np.ndarray]  # (documents,) bool
    sample: list[np.ndarray]  # (documents,) bool: those kept that teach the tokenizer
    repeated: list[np.ndarray] | None  # (exchanges,) bool: those that documents lose
    val_limit: int
    sample_bytes: int
    fractions: list[float] | None  # of each input's text: what a mixture uses
    counts: Counter  # of what was found, and what is left: `encoded` documents with `encoded_bytes` of text
    clusters: list[dict[str, Any]]  # the largest: size, kind, document (its number among the cleaned), text


def select(
    cleaned: Cleaned, work: Path, *,
    deduplicate: Literal["exact", "turns", "off"], near_dup: float | None, mix: mixing.Mix | None,
    val_fraction: float, sample_bytes: int | None, seed: int, pool: Executor,
) -> Selection:  # fmt: skip
    """Decide duplicates, validation and the tokenizer's sample from the parts' indexes: about 60 bytes a document."""
    doc_hash = np.concatenate([parts.load_index(p)[0] for p in cleaned.parts])
    n_bytes = [parts.load_index(p)[1].astype(np.uint32) for p in cleaned.parts]
    cuts, doc_bytes = np.cumsum([len(n) for n in n_bytes])[:-1], np.concatenate(n_bytes)
    earliest = dedup.earliest_equal(doc_hash) if deduplicate != "off" else np.arange(len(doc_hash))
    keep, counts, clusters = unite_near(cleaned, cuts, earliest, near_dup, work, pool)

    repeated = None
    if deduplicate == "turns":
        repeated = exchanges.find_repeated(cleaned.parts, np.split(keep, cuts), pool)
        losses = [exchanges.losses(p, again) for p, again in zip(cleaned.parts, repeated, strict=True)]
        emptied, lost_bytes = map(np.concatenate, zip(*losses, strict=True))
        counts["duplicate_exchanges"] = int(sum(again.sum() for again in repeated))
        counts["dropped_only_duplicate_exchanges"] = int(emptied.sum())
        keep &= ~emptied
        doc_bytes -= lost_bytes

    fractions = None
    if mix:
        group = np.repeat(np.array(cleaned.groups, np.uint16), [len(n) for n in n_bytes])
        fractions = mixing.fractions(mix, np.bincount(group[keep], doc_bytes[keep], len(mix.inputs)))
        left_out = keep & ~mixing.choose(fractions, group, doc_hash, doc_bytes * keep, seed + 4)
        counts["left_out_of_mix"] = int(left_out.sum())
        keep &= ~left_out

    counts.update(encoded=int(keep.sum()), encoded_bytes=int(doc_bytes[keep].sum()))
    key = dedup.shuffle_key(doc_hash, seed)
    val_limit = dedup.validation_limit(key[keep], val_fraction, seed)
    usable = keep & ~dedup.validates(key, val_limit, seed)
    share = 1 if sample_bytes is None else sample_bytes / max(int(doc_bytes[usable].sum()), 1)
    sample = usable & dedup.below(doc_hash, share, seed + 3)
    return Selection(np.split(keep, cuts), np.split(sample, cuts), repeated, val_limit, int(doc_bytes[sample].sum()),
                     fractions, counts, clusters)  # fmt: skip


def unite_near(
    cleaned: Cleaned, cuts: np.ndarray, earliest: np.ndarray, near_dup: float | None, work: Path, pool: Executor
) -> tuple[np.ndarray, Counter, list[dict[str, Any]]]:
    """((documents,) bool: kept; counts; largest clusters), from the place of each document's earliest equal."""
    own = np.arange(len(earliest))
    alike, keep = own, earliest == own
    counts = Counter(duplicates=int((~keep).sum()))
    if near_dup is not None:
        alike = neardup.find(cleaned.parts, np.split(keep, cuts), near_dup, work, pool)
        counts["near_duplicates"] = int((alike != own).sum())
        keep &= alike == own
    return keep, counts, describe_clusters(cleaned, cuts, alike[earliest], alike)


def describe_clusters(
    cleaned: Cleaned, cuts: np.ndarray, earliest: np.ndarray, alike: np.ndarray
) -> list[dict[str, Any]]:
    """The largest clusters, from the place of each document's earliest equal and earliest near one."""
    has_near = np.bincount(alike) > 1
    clusters = []
    for place, size in dedup.largest_groups(earliest, LARGEST_CLUSTERS):
        part = int(np.searchsorted(cuts, place, "right"))
        documents = parts.load_documents(cleaned.parts[part])
        mine = np.arange(len(documents.doc_hash)) == place - (cuts[part - 1] if part else 0)
        text = "\n".join(documents.select(mine).turns())[:CLUSTER_EXCERPT]
        clusters.append({"size": size, "kind": "near" if has_near[place] else "exact", "document": place, "text": text})
    return clusters


def kept_documents(path: Path, chosen: np.ndarray, repeated: np.ndarray | None) -> parts.Documents:
    """The chosen documents of a cleaned part without the exchanges they lose."""
    documents = parts.load_documents(path)
    return (documents if repeated is None else exchanges.without(documents, repeated)).select(chosen)


# ---- encode ---------------------------------------------------------------------------------------------------------


def choose_engine(
    cleaned: Cleaned, work: Path, tokenizer: Tokenizer, pool: Executor
) -> tuple[encode.Engine, str | None]:  # fmt: skip
    """(engine, warning): the fastest that proves equal to the reference on texts spread over the corpus."""
    engine, warning = encode.fastest(tokenizer)
    if warning is None:
        spread = cleaned.parts[:: -(-len(cleaned.parts) // PROOFS)]
        n_bytes = PROOF_BYTES // len(spread)
        made = pool.run(proof_task, ((path, work / "tokenizer.json", engine, n_bytes) for path in spread))
        # while workers load the engine, this process does what the reference does: neither needs both
        expected = [tokenizer.encode_batch(proof_sample(path, n_bytes)) for path in spread]
        warning = next(filter(None, list(map(encode.disproof, made, expected))), None)
    return ("tokenizers" if warning else engine), warning


def proof_sample(path: Path, n_bytes: int) -> list[str]:
    """The first turns of a cleaned part."""
    return [text[:n_bytes] for text in next(parts.load_documents(path).blocks(n_bytes)).turns()]


def proof_task(path: Path, tokenizer: Path, engine: encode.Engine, n_bytes: int) -> encode.Batch | str:
    """What the engine makes of a part's sample, or why it makes nothing."""
    return encode.attempt(lambda: _encoder(str(tokenizer), engine), proof_sample(path, n_bytes))


@dataclass(frozen=True)
class EncodedParts:
    """What the encode pass gives: its parts in the order of the corpus, and what was counted about them."""

    parts: list[Path]
    counted: figures.Counted
    places: merge.Places


def encode_parts(
    cleaned: Cleaned, selection: Selection, work: Path, tokenizer: Tokenizer, *,
    engine: encode.Engine, dtype: np.dtype, seed: int, pool: Executor,
) -> EncodedParts:  # fmt: skip
    """Cleaned parts -> encoded parts, duplicates left out, validation documents first."""
    tokenizer_path = work / "tokenizer.json"
    repeated = selection.repeated or [None] * len(cleaned.parts)
    spread_limit = figures.spread_limit(selection.counts["encoded_bytes"])
    done, places = [], merge.Places()

    def count_each() -> Iterator[tuple[int, figures.Figures]]:
        """Figures of each part, taken in while workers encode the next ones."""
        jobs = (
            (
                path,
                keep,
                again,
                tokenizer_path,
                tokenizer.vocab_size,
                engine,
                str(dtype),
                selection.val_limit,
                seed,
                spread_limit,
            )
            for path, keep, again in zip(cleaned.parts, selection.keep, repeated, strict=True)
        )
        made = pool.run(encode_task, jobs)
        for path, group, marker in zip(cleaned.parts, cleaned.groups, made, strict=True):
            done.append(_encoded_part(path))
            places.add(done[-1])
            meter.add(marker["bytes"])
            yield group, parts.load_arrays(figures.Figures, _figures_path(done[-1]))

    with Meter("encode", selection.counts["encoded_bytes"], "B") as meter:
        counted = figures.Counted.of(
            count_each(), len(cleaned.group_counts), special_ids=tokenizer.special_ids.values()
        )
    return EncodedParts(done, counted, places)


def encode_task(
    path: Path, keep: np.ndarray, repeated: np.ndarray | None, tokenizer: Path, vocab_size: int, engine: encode.Engine, dtype: str,
    val_limit: int, seed: int, spread_limit: int,
) -> dict:  # fmt: skip
    """One cleaned part -> one encoded part, the figures about it and their marker."""
    out = _encoded_part(path)
    marker_path = out.with_suffix(".json")
    if marker := parts.load_marker(marker_path):
        return marker
    documents = kept_documents(path, keep, repeated)
    encoder = _encoder(str(tokenizer), engine)
    encoded, turn_ids = encode.encode_documents(
        documents, encoder, val_limit=val_limit, seed=seed, dtype=np.dtype(dtype)
    )
    about = figures.measure(documents, turn_ids, encoded, vocab_size=vocab_size, spread_limit=spread_limit)
    narrow = figures.Figures(*(counts.astype(np.uint32) for counts in vars(about).values()))
    files = parts.save_encoded(out, encoded) | parts.save_arrays(_figures_path(out), narrow)
    return parts.save_marker(marker_path, {"bytes": documents.text_bytes()}, files)


def _encoded_part(cleaned: Path) -> Path:
    return cleaned.with_name(cleaned.stem.replace("clean-", "ids-"))


def _figures_path(encoded: Path) -> Path:
    return encoded.with_suffix(".figures.zst")


@functools.lru_cache(maxsize=1)
def _encoder(tokenizer_path: str, engine: encode.Engine) -> encode.Encoder:
    return encode.Encoder(Path(tokenizer_path).read_text("utf-8"), engine)


# ---- shards ---------------------------------------------------------------------------------------------------------


def write_shards(
    plans: list[merge.ShardPlan], encoded: EncodedParts, output: str, work: Path, *,
    dtype: np.dtype, level: int | None, pool: Executor,
) -> tuple[list[Shard], dict]:  # fmt: skip
    """Write every planned shard and publish it at the output, any URL, while the next ones are made.

    Those that an earlier run published, and that are unchanged, are kept. Returns the shards and what a `figures.Watch`
    has seen in all of them.
    """
    watch_path = work / "watch.npy"
    parts.save_array(watch_path, figures.watch_table(encoded.counted))
    names = [p.file_name(level is not None) for p in plans]
    with Meter("write", sum(p.tokens for p in plans), " tokens") as meter:
        found = in_threads(lambda name: published_shard(name, output, work), names, threads=UPLOADS)
        shards = {name: shard for name, shard in zip(names, found, strict=True) if shard}
        meter.add(sum(s.tokens for s in shards.values()))
        todo = [(plan, work / name) for plan, name in zip(plans, names, strict=True) if name not in shards]
        made = pool.run(shard_task, ((plan, encoded.parts, path, str(dtype), level, watch_path) for plan, path in todo))
        for shard in in_threads(lambda shard: publish_shard(shard, output, work), made, threads=UPLOADS):
            shards[shard.name] = shard
            meter.add(shard.tokens)
    return [shards[name] for name in names], figures.join(json.loads(_seen_path(work / n).read_bytes()) for n in names)


def shard_task(
    plan: merge.ShardPlan, encoded: list[Path], path: Path, dtype: str, level: int | None, watch_path: Path
) -> Shard:
    """Gather one shard into the work folder, which goes when all is done: no half of one ever stands in the dataset."""
    watch = figures.Watch(np.load(watch_path, allow_pickle=False))
    shard = merge.write_shard(plan, encoded, path, dtype=np.dtype(dtype), level=level, look=watch.look)
    fs.put_bytes(str(_seen_path(path)), json.dumps(watch.seen).encode())
    return shard


def _seen_path(shard: Path) -> Path:
    return shard.with_name(f"{shard.name}.seen.json")


def publish_shard(shard: Shard, output: str, work: Path) -> Shard:
    """Move a shard from the work folder to the output, verified, and only then mark it as done."""
    fs.move_file(fs.join(output, shard.name), work / shard.name)
    parts.save_marker(work / f"{shard.name}.json", {"shard": vars(shard)}, parts.prove(_seen_path(work / shard.name)))
    return shard


def published_shard(name: str, output: str, work: Path) -> Shard | None:
    """The shard of that name if an earlier run published it and the output still has it unchanged."""
    marker, url = parts.load_marker(work / f"{name}.json"), fs.join(output, name)
    if marker is None or fs.size(url) != marker["shard"]["stored_bytes"]:
        return None
    shard = Shard(**marker["shard"])
    return shard if not fs.is_local(url) or fs.sha256_file(fs.local_path(url)) == shard.sha256 else None
