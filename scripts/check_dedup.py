"""Check what preparation takes for duplicates against a corpus whose duplicates are known.

python scripts/check_dedup.py --corpus dirty.txt --truth truth.jsonl

The corpus holds conversations with an empty line between. The truth has one JSON line for each, in order: its `kind`
and, for a copy, `of`: the number of what it copies. Kinds `dup…` are copies that may differ in letter case and in what
cleaning removes, `near` have words changed. Exits with 1 when a bar is missed.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # Python put this file's folder first in sys.path: the project's root belongs there
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import json
import re
import tempfile
from dataclasses import dataclass

import numpy as np

from cli import flags
from cli.errors import UserError
from cli.flags import flag
from prep import clean, dedup, formats, labelled, neardup, parts
from prep.pool import Pool

RECALL, PRECISION = 0.95, 0.98  # of near-duplicates; exact ones are all found, none falsely


@dataclass(frozen=True)
class CheckFlags:
    """Flags of scripts/check_dedup.py."""

    corpus: str = flag("", "the conversations")
    truth: str = flag("", "one JSON line for each of them")
    near_dup: float = flag(0.8, "threshold of near-duplicates")
    clean: str = flag("standard", "cleaning rules")
    show: int = flag(3, "missed and false ones to print of each kind")


def main(argv: list[str] | None = None) -> int:
    """Run the passes up to deduplication and compare. 0 if the bars are met, else 1."""
    args, _ = flags.parse(CheckFlags, argv, prog="check_dedup.py", description=__doc__.split("\n")[0])
    if not (args.corpus and args.truth):
        raise UserError("--corpus and --truth are needed: the conversations, and one JSON line for each")
    truth = [json.loads(line) for line in Path(args.truth).read_text("utf-8").splitlines()]
    text, equal, alike = find_duplicates(args, len(truth))
    copies = {i: t["of"] for i, t in enumerate(truth) if i in text and t.get("of") in text}
    # cleaning decides what is equal: it mends white space, and may leave a trace of what it replaced
    exact = {i: of for i, of in copies.items() if text[i] == text[of]}
    near = {i: of for i, of in copies.items() if i not in exact}

    missed = [i for i, of in exact.items() if equal[i] != equal[of]]
    found = [i for i, root in equal.items() if i != root]
    false = [i for i in found if text[i] != text[equal[i]]]
    print(f"exact  {len(found)} found, {len(exact)} in the truth; {len(missed)} missed, {len(false)} false")
    show("missed", missed[: args.show], exact, text)
    show("false", false[: args.show], equal, text)
    good = not missed and not false

    missed = [i for i, of in near.items() if alike[equal[i]] != alike[equal[of]]]
    found = [i for i, root in alike.items() if i != root]
    # one that the truth does not name is right where its words, counted another way, say so
    unnamed = [i for i in found if i not in near]
    false = [i for i in unnamed if likeness(text[i], text[alike[i]]) < args.near_dup]
    recall, precision = 1 - len(missed) / max(len(near), 1), 1 - len(false) / max(len(found), 1)
    print(f"near   {len(found)} found, {len(near)} in the truth; {len(missed)} missed, {len(false)} false, "
          f"{len(unnamed) - len(false)} right without being in it: recall {recall:.1%}, precision {precision:.1%}")  # fmt: skip
    show("missed", missed[: args.show], near, text)
    show("false", false[: args.show], alike, text)
    return 0 if good and recall >= RECALL and precision >= PRECISION else 1


def find_duplicates(args: CheckFlags, n: int) -> tuple[dict[int, str], dict[int, int], dict[int, int]]:
    """For each conversation that cleaning kept, by number: its text, its earliest equal one, its earliest near one."""
    text, _ = formats.decode(Path(args.corpus).read_bytes())
    records = list(labelled.conversations(text.encode()))
    if len(records) != n:
        raise UserError(f"{args.truth}: has {n} lines for {len(records)} conversations: it belongs to another corpus")
    cleaner = clean.Cleaner(clean.Settings(clean.choose_rules(args.clean)))
    cleaned = {i: cleaner.clean(record)[0] for i, record in enumerate(records)}
    kept = {i: document for i, document in cleaned.items() if isinstance(document, list)}
    documents, numbers = parts.Documents.build(list(kept.values())), list(kept)
    earliest = dedup.earliest_equal(documents.doc_hash)
    keep = earliest == np.arange(len(earliest))
    with tempfile.TemporaryDirectory() as work, Pool(1) as pool:
        path = Path(work) / "clean-000000-0000.docs"
        parts.save_documents(path, documents)
        near = neardup.find([path], [keep], args.near_dup, Path(work), pool)
    return (
        {i: "\n".join(said for _, said in document) for i, document in kept.items()},
        {i: numbers[of] for i, of in zip(numbers, earliest.tolist(), strict=True)},
        {i: numbers[of] for i, of in zip(numbers, near.tolist(), strict=True)},
    )


def likeness(a: str, b: str) -> float:
    """The Jaccard index of two texts' words, each with the two after it, by plain Python: nothing of what it judges is used."""
    words = [[*re.findall(r"[^\W_]+", text.lower()), "", ""] for text in (a, b)]
    left, right = ({tuple(w[i : i + 3]) for i in range(len(w) - 2)} for w in words)
    return len(left & right) / len(left | right)


def show(what: str, numbers: list[int], of: dict[int, int], text: dict[int, str]) -> None:
    """Print some of them, with what they are compared to."""
    for i in numbers:
        print(f"  {what} {i} of {of[i]} ({likeness(text[i], text[of[i]]):.2f} alike)")
        print(f"    {text[of[i]][:150]!r}\n    {text[i][:150]!r}")


if __name__ == "__main__":
    flags.run(main)
