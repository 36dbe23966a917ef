"""What a person reads on the terminal at the beginning and at the end of a run."""

import shlex
import sys
from collections import Counter
from typing import Any

from cli.progress import count, duration
from prep import corpus, reading
from prep.pool import Executor
from store import fs


def show_input(sources: list[corpus.Source], tasks: list[corpus.Task], pool: Executor) -> None:
    """The first line: what will be read, by how many."""
    kinds = Counter(s.kind for s in sources)
    print(f"input      {len(sources)} file{'s' * (len(sources) != 1)}, {count(sum(t.size for t in tasks))}B "
          f"({', '.join(f'{n} {k}' for k, n in kinds.items())}); {pool.workers} workers", flush=True)  # fmt: skip


def show_summary(output: str, report: dict[str, Any], elapsed_s: float, peak_memory: int) -> None:
    """The closing lines: what was made and what to do next."""
    counts, train, val = Counter(report["counts"]), report["totals"]["train"], report["totals"]["val"]
    tokens, stored = train["tokens"] + val["tokens"], train["stored_bytes"] + val["stored_bytes"]
    found = [
        f"{counts[k]} {k.replace('_', ' ')}"
        for k in ("near_duplicates", "duplicate_exchanges", "left_out_of_mix")
        if k in counts
    ]
    print(f"documents  {counts['encoded']} kept of {counts['documents']}; "
          + ", ".join(filter(None, [f"{counts['duplicates']} duplicates", *found, dropped(counts)])))  # fmt: skip
    if counts["invalid_utf8"]:
        print(f"warning: {counts['invalid_utf8']} invalid UTF-8 sequences: "
              "lone bytes read as Windows-1252, the rest lost", file=sys.stderr)  # fmt: skip
    if counts["cut"]:
        print(f"warning: records of more than {reading.CUT_BYTES >> 20} MiB were cut, "
              f"{counts['cut']} times", file=sys.stderr)  # fmt: skip
    if report["first_unusable"]:
        print(f"warning: the first record that is no document: {report['first_unusable']}", file=sys.stderr)
    for source in report["sources"] if len(report["sources"]) > 1 else ():
        part = f", {source['fraction']:.1%} of what it has" if "left_out_of_mix" in counts else ""
        print(f"source     {source['name']}: {source['documents']} documents, {count(source['text_bytes'])}B of text"
              f" ({source['text_bytes'] / counts['encoded_bytes']:.1%}){part}, {count(source['tokens'])} tokens")  # fmt: skip
    print(f"tokens     {train['tokens']:,} train, {val['tokens']:,} val in {count(stored)}B "
          f"({stored / max(tokens, 1):.2f} bytes each); "
          f"{counts['encoded_bytes'] / max(tokens, 1):.2f} bytes of text per token")  # fmt: skip
    print(f"done       in {duration(elapsed_s)}, {count(counts['bytes'] / elapsed_s)}B/s; "
          f"at most {count(peak_memory)}B of memory, all processes together")  # fmt: skip
    print(f"report     {fs.redact(fs.join(output, 'report.html'))}")
    print(f"next       python train/run.py --data {shlex.quote(fs.redact(output))} --resume", flush=True)


def dropped(counts: Counter) -> str:
    """ "12 empty, 3 few_letters"."""
    return ", ".join(
        f"{n} {k.removeprefix('dropped_')}" for k, n in sorted(counts.items()) if n and k.startswith("dropped_")
    )


def little_left(counts: Counter) -> str:
    """ "only 3 of 4000 documents are left, most were dropped as language (3990): "; "" where half of them are."""
    if 2 * counts["encoded"] >= counts["documents"]:
        return ""
    lost = {
        k: n
        for k, n in counts.items()
        if k.startswith("dropped_") or k in ("duplicates", "near_duplicates", "left_out_of_mix")
    }
    reason = max(lost, key=lambda name: (lost[name], name))
    return (f"only {counts['encoded']} of {counts['documents']} documents are left, most were dropped as "
            f"{reason.removeprefix('dropped_')} ({lost[reason]}): ")  # fmt: skip
