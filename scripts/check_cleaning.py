"""Clean a corpus whose defects are known, and compare with the truth.

python scripts/check_cleaning.py --corpus dirty.txt --truth truth.jsonl

The truth has one line for each conversation, in order: {"kind": …, "clean": the conversation before a defect was put into
it, "inserted": […]}. Prints one line for each bar, and exits with 1 when one is missed.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # Python put this file's folder first in sys.path: the project's root belongs there
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import json
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from cli import flags
from cli.errors import UserError
from cli.flags import flag
from prep import clean, formats, labelled, private

REMOVED = ("email", "url", "phone", "ip", "card")  # what was inserted is no longer there
UNDONE = ("html", "html_double", "crlf", "spaces", "tabs", "nfd", "zero_width", "empty_turn", "rep_line", "base64",
          "lower_role", "no_role", "dup_space", "raw_latin1")  # fmt: skip  # as if it had never been
NOTHING_LEFT = {"ctrl": r"[\x00-\x08\x0b-\x1f\x7f]", "rep_char": r"(\S)\1{9}", "html_tags": r"</?(?:p|b|br|a)\b[^<>]*>",
                "truncated_utf8": "\ufffd", "raw_utf16_fragment": "[\ufffd\x00]"}  # fmt: skip
SURVIVES = ("code", "compat", "emoji")
DROPPED = ("gibberish", "one_turn", "same_role")
BARS = {
    "mojibake": 0.98, **dict.fromkeys(REMOVED, 0.99), **dict.fromkeys(UNDONE, 0.95), **dict.fromkeys(NOTHING_LEFT, 0.99),
    **dict.fromkeys(SURVIVES, 1.0), **dict.fromkeys(DROPPED, 0.98), "clean kept": 0.995, "clean not repaired": 1.0,
    "html_tags": 0.95,  # in conversations about markup tags stay
    "card": 0.95,  # one was put into the middle of another
}  # fmt: skip


@dataclass(frozen=True)
class CheckFlags:
    """Flags of scripts/check_cleaning.py."""

    corpus: str = flag("", "the conversations")
    truth: str = flag("", "one JSON line for each of them")
    clean: str = flag("standard", "set of cleaning rules")
    show: int = flag(2, "missed ones to print of each kind")


def main(argv: list[str] | None = None) -> int:
    """Clean, compare, print. 0 if every bar is met, else 1."""
    args, _ = flags.parse(CheckFlags, argv, prog="check_cleaning.py", description=__doc__.split("\n")[0])
    if not (args.corpus and args.truth):
        raise UserError("--corpus and --truth are needed: the conversations, and one JSON line for each")
    truth = [json.loads(line) for line in Path(args.truth).read_text("utf-8").splitlines()]
    text, _ = formats.decode(Path(args.corpus).read_bytes())
    documents = list(labelled.conversations(text.encode()))
    if len(documents) != len(truth):
        raise UserError(f"{args.truth}: has {len(truth)} lines for {len(documents)} conversations: "
                        "it belongs to another corpus")  # fmt: skip
    cleaner = clean.Cleaner(clean.Settings(clean.choose_rules(args.clean)))
    right, total, missed = Counter(), Counter(), {}
    for document, known in zip(documents, truth, strict=True):
        for bar, good, shown in judge(document, known, cleaner):
            total[bar] += 1
            right[bar] += good
            if not good:
                missed.setdefault(bar, []).append(shown)
    return report(right, total, missed, args.show)


def judge(document: formats.Document, known: dict[str, Any], cleaner: clean.Cleaner) -> list[tuple[str, bool, str]]:
    """(bar, whether it is met, what to show) for each thing that the truth says of a conversation."""
    kind, (cleaned, changes) = known["kind"], cleaner.clean(document)
    lost = isinstance(cleaned, str)
    text = cleaned if lost else "\n".join(said for _, said in cleaned)
    if kind == "clean":
        repaired = any(name == "mojibake" for name, _, _ in changes)
        return [("clean kept", not lost, f"dropped: {text}"), ("clean not repaired", not repaired, text[:200])]
    if kind in DROPPED:
        return [(kind, lost, text[:200])]
    if kind in NOTHING_LEFT:
        left = re.search(NOTHING_LEFT[kind], text)
        return [(kind, not left, text[max(left.start() - 50, 0) : left.end() + 50] if left else "")]
    if kind in SURVIVES:
        if lost or len(cleaned) != len(document):
            return [(kind, False, text[:200])]
        return [(kind, turn[1] == before[1], turn[1][:200]) for turn, before in zip(cleaned, document, strict=True)
                if re.search("`|[^\x00-\x7f]", before[1])]  # fmt: skip
    if kind not in (*UNDONE, *REMOVED) and not kind.startswith("moji"):
        return []  # dup and near are deduplication's; long_line is no defect
    original = next(iter(labelled.conversations(known["clean"].encode())))
    expected, _ = cleaner.clean(original)
    if kind in REMOVED:  # whole, and nothing with it
        rest = [[private.PLACEHOLDER.sub("", said).split() for _, said in d] for d in (cleaned, expected)]
        return [(kind, s not in text and rest[0] == rest[1], f"{s} in {text[:200]}") for s in known["inserted"]]
    if kind in UNDONE:
        return [(kind, cleaned == expected, text[:200])]
    if lost or not len(cleaned) == len(document) == len(original):
        return [("mojibake", cleaned == expected, text[:200])]
    turns = zip(document, original, cleaned, expected, strict=True)
    return [("mojibake", got == want, got[1][:200]) for dirty, before, got, want in turns if dirty != before]


def report(right: Counter, total: Counter, missed: dict[str, list[str]], show: int) -> int:
    """Print the table; 1 if a bar is missed."""
    failed = False
    print(f"{'bar':<20} {'right':>6} {'of':>6} {'share':>8} {'at least':>9}")
    for bar, least in BARS.items():
        if not total[bar]:
            continue
        share = right[bar] / total[bar]
        failed |= share < least
        mark = "" if share >= least else "  MISSED"
        print(f"{bar:<20} {right[bar]:>6} {total[bar]:>6} {share:>8.1%} {least:>9.1%}{mark}")
    for bar, texts in missed.items():
        for text in texts[:show]:
            print(f"  {bar}: {text!r}")
    return int(failed)


if __name__ == "__main__":
    flags.run(main)
