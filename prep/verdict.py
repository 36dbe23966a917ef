"""Should one train on this? What in the report's figures a person should look at first, in plain words."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

Level = Literal["stop", "look", "note"]  # set this right first; look before you train; good to know
SEVERITY: dict[Level, int] = {"stop": 0, "look": 1, "note": 2}

# Reasons for which a record could not be read at all; the others are judgements of the cleaning rules.
LATE = "dropped_only_duplicate_exchanges"  # found when duplicates are, not by a cleaning rule
DUPLICATES = {"duplicates": "Duplicates", "near_duplicates": "Near-duplicates", LATE: "Nothing new said"}
UNREADABLE = ("broken_json", "broken_row", "bad_message", "unknown_role", "no_text_field")


@dataclass(frozen=True)
class Finding:
    """One thing a person should know, how grave it is, and what to do about it. `share` orders those of one level."""

    level: Level
    what: str
    do: str
    share: float = 0.0


def verdict(report: dict[str, Any]) -> dict[str, Any]:
    """{"level", "headline", "findings": [{"level", "what", "do", "section"}…]}, the worst first."""
    found = [(f, section) for rule, section in RULES.items() for f in rule(report)]
    found.sort(key=lambda pair: (SEVERITY[pair[0].level], -pair[0].share, pair[0].what))
    levels = [f.level for f, _ in found]
    serious = len(levels) - levels.count("note")
    if "stop" in levels:
        level, headline = "stop", "Do not train on this yet"
    elif serious:
        level, headline = "look", f"Look at {'one thing' if serious == 1 else f'{serious} things'} before you train"
    else:
        level, headline = "good", "Nothing suspicious found"
    listed = [{"level": f.level, "what": f.what, "do": f.do, "section": section} for f, section in found]
    return {"level": level, "headline": headline, "findings": listed}


def share_of(part: float, whole: float) -> float:
    """part / whole; 0 of nothing."""
    return part / whole if whole else 0.0


def percent(share: float) -> str:
    """0.1234 -> 12 %; 0.0012 -> 0.12 %; never 0 % of something nor 100 % of less than all."""
    if 0 < share < 0.00005:
        return "under 0.01 %"
    if 0.9999 < share < 1:
        return "over 99.99 %"
    digits = 0 if 0.1 <= share < 0.99 or share in (0, 1) else 1 if share >= 0.01 and share < 0.99 else 2
    return f"{100 * share:.{digits}f} %"


def named(rule: str) -> str:
    """dropped_few_letters -> few letters."""
    return rule.removeprefix("dropped_").replace("_", " ")


# ---- the rules ------------------------------------------------------------------------------------------------------


def undecodable(report: dict[str, Any]) -> Iterator[Finding]:
    """Bytes that are no UTF-8."""
    counts = report["counts"]
    n, share = counts.get("invalid_utf8", 0), share_of(counts.get("invalid_utf8", 0), counts["bytes"])
    if n:
        level = "stop" if share > 1e-3 else "look" if share > 1e-5 else "note"
        yield Finding(level, f"{n:,} byte sequences are not UTF-8, one in {1 / share:,.0f} bytes",
                      "Lone bytes were read as Windows-1252, the rest is lost. If a whole file is in another encoding, "
                      "convert it: iconv -f WINDOWS-1252 -t UTF-8", 1000 * share)  # fmt: skip


def drops(report: dict[str, Any]) -> Iterator[Finding]:
    """Much was dropped, by one rule or because records could not be read."""
    counts = report["counts"]
    for name, n in counts.items():
        if name == LATE:
            continue
        reason, share = name.removeprefix("dropped_"), share_of(n, counts["documents"])
        if name.startswith("dropped_") and reason in UNREADABLE and n:
            level = "stop" if share > 0.2 else "look" if share > 0.001 else "note"
            yield Finding(level, f"{n:,} records could not be read ({named(name)}), {percent(share)} of all",
                          "Compare the example below with the formats that --input takes", share)  # fmt: skip
        elif name.startswith("dropped_") and share > 0.05:
            yield Finding("stop" if share > 0.5 else "look",
                          f"{percent(share)} of the documents were dropped by one rule: {named(name)}",
                          "Read the examples below: if they are good text, use a gentler --clean", share)  # fmt: skip


def duplicates(report: dict[str, Any]) -> Iterator[Finding]:
    """Much of the corpus is there more than once."""
    counts = report["counts"]
    for name, word in DUPLICATES.items():
        share = share_of(counts.get(name, 0), counts["kept"])
        if share > 0.2:
            yield Finding("look", f"{word}: {percent(share)} of the documents; one of each was kept",
                          "Check that no file was given twice and that the collection did not repeat itself", share)  # fmt: skip


def too_little(report: dict[str, Any]) -> Iterator[Finding]:
    """Few tokens, a small validation split, one document that is most of it, documents that were cut."""
    train, val = report["totals"]["train"], report["totals"]["val"]
    if train["tokens"] < 1_000_000:
        yield Finding("look", f"Only {train['tokens']:,} tokens to train on",
                      "Any model will learn them by heart; expect the validation loss to rise early", 0.5)  # fmt: skip
    if not val["documents"]:
        yield Finding("look", "No document validates: overfitting could not be seen", "Give --val-fraction 0.01", 0.1)
    elif val["tokens"] < 50_000 or val["documents"] < 50:
        yield Finding("look", f"The validation split is tiny: {val['tokens']:,} tokens in {val['documents']:,} document{'s' * (val['documents'] > 1)}",
                      "Its loss will jump about by chance; give a higher --val-fraction", 0.1)  # fmt: skip
    longest, tokens = report["lengths"]["document_tokens"]["longest"], train["tokens"] + val["tokens"]
    if longest > 0.1 * tokens and train["documents"] > 20:
        yield Finding("look", f"One document alone holds {percent(longest / tokens)} of all tokens",
                      "Check that documents are separated as --input expects: chats by an empty line", 0.3)  # fmt: skip
    cut = report["counts"].get("cut", 0)
    if cut:
        yield Finding("look", f"Records that are too long to be held were cut, {cut:,} times",
                      "A whole file was taken for one record: check that --input is the format it seems", 0.2)  # fmt: skip


def short_documents(report: dict[str, Any]) -> Iterator[Finding]:
    """Documents too short to learn from, and conversations in which nobody answers."""
    lengths, roles = report["lengths"], report["roles"]
    median = lengths["document_tokens"]["median"]
    if median < 24:
        yield Finding("look", f"Very short documents: half of them have {median} tokens or fewer",
                      "Check that conversations were not cut apart: an empty line begins a new one", 0.3)  # fmt: skip
    bins = lengths["conversation_turns"]["bins"]
    share = share_of(sum(n for first, _, n in bins if first == 1), sum(n for _, _, n in bins))
    if share > 0.2:
        yield Finding("look", f"{percent(share)} of the conversations have a single turn: nobody answers",
                      "Check the labels of the turns (User:, Assistant:)", share)  # fmt: skip
    spoken = sum(r["tokens"] for name, r in roles.items() if name != "plain")
    answered = share_of(roles.get("assistant", {}).get("tokens", 0), spoken)
    if spoken and answered < 0.15:
        yield Finding("look", f"Only {percent(answered)} of what is said in conversations is the assistant's",
                      "Check the labels of the turns: is the assistant called something else?", 1 - answered)  # fmt: skip


def sources(report: dict[str, Any]) -> Iterator[Finding]:
    """One source outweighs the rest, or is of another kind than the tokenizer was made for."""
    listed, tokens = report["sources"], sum(s["tokens"] for s in report["sources"])
    per_token = share_of(sum(s["text_bytes"] for s in listed), tokens)
    for source in listed:
        share, own = share_of(source["tokens"], tokens), share_of(source["text_bytes"], source["tokens"])
        if len(listed) > 1 and share > 0.9:
            yield Finding("look", f"{source['name']} alone gives {percent(share)} of the tokens",
                          "The others will hardly be learnt: give each its share with --mix", share - 0.5)  # fmt: skip
        if not source["tokens"]:
            yield Finding("look", f"Nothing of {source['name']} was kept", "See below why it was dropped", 0.5)
        elif len(listed) > 1 and own < 0.65 * per_token:
            yield Finding("look", f"{source['name']} gives {own:.2f} bytes of text a token, the whole {per_token:.2f}",
                          "It is text of another kind: another language, code, or garbage; look at it", share)  # fmt: skip


def vocabulary(report: dict[str, Any]) -> Iterator[Finding]:
    """Tokens nobody uses, tokens of one kind of document only, text that costs many tokens."""
    words = report["vocabulary"]
    for name, limit, says in (("never_used", 0.02, "occur nowhere"), ("seldom_used", 0.5, "occur under 100 times")):
        share = share_of(words[name], words["size"])
        if share > limit:
            yield Finding("note", f"{words[name]:,} of {words['size']:,} tokens {says} in the text",
                          "Their embeddings stay as they were drawn: a smaller --vocab-size serves as well", share / 10)  # fmt: skip
    if words["very_long"]:
        yield Finding("look", f"{words['very_long']:,} tokens are longer than any word: “{words['longest'][0][:24]}…”",
                      "They are learnt from runs of signs or endless words; --clean standard shortens runs", 0.2)  # fmt: skip
    found = words["suspicious"]
    if found:
        share = share_of(sum(t["count"] for t in found), sum(s["tokens"] for s in report["sources"]))
        names = ", ".join(f"“{t['token'].strip() or repr(t['token'])[1:-1]}”" for t in found[:4])
        yield Finding("look", f"Frequent tokens sit in few documents: {names}; {percent(share)} of all tokens",
                      "Often markup, tables or machine output that came from one source: see the excerpts below", 0.2 + share)  # fmt: skip


def surprise(report: dict[str, Any]) -> Iterator[Finding]:
    """A second population of documents, far from the others."""
    bins = report["surprise"]["documents_by_quarter_bit"]
    odd = sum(bins[round(4 * report["surprise"]["odd_from_bits"]) :])
    share = share_of(odd, sum(bins))
    if share > 0.005:
        yield Finding("look", f"{percent(share)} of the documents are made of tokens that are rare elsewhere",
                      "Another language, code or garbage: see the least likely documents below", share)  # fmt: skip


# each with the section of the page that tells more
RULES = {undecodable: "flow", drops: "flow", duplicates: "flow", too_little: "shape", short_documents: "shape",
         sources: "sources", vocabulary: "tokens", surprise: "documents"}  # fmt: skip
