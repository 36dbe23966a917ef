"""Cleaning: named rules, sets of them, and the pure function that applies a set to one document. No I/O.

A rule mends characters of a text, mends the turns of a document, or drops it. A set is a tuple of names. `--list-rules`
prints what stands here; docs/cleaning.md tells why.
"""

import difflib
import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from cli.errors import UserError
from prep import characters, conversation, markup, mojibake, private, quality
from prep.formats import Document
from prep.look import Look
from prep.parts import Gathered


class Rule(NamedTuple):
    """`mend` is applied to a document for which `when` is true; in any other it would find nothing to do."""

    mend: Callable
    when: Callable[[Look], bool]


# in the order in which they are applied: what an earlier rule uncovers, a later one sees
# each of type (text) -> text
TEXT_RULES: dict[str, Rule] = {
    "line_ends": Rule(characters.line_ends, characters.has_line_ends),
    "entities": Rule(markup.entities, markup.has_entities),
    "tags": Rule(markup.tags, markup.has_tags),
    "mojibake": Rule(mojibake.mojibake, mojibake.may_be_mojibake),
    "controls": Rule(characters.controls, characters.has_controls),
    "lost": Rule(characters.lost, characters.has_lost),
    "nfc": Rule(characters.nfc, characters.not_nfc),
    "urls": Rule(private.urls, private.has_urls),
    "emails": Rule(private.emails, private.has_emails),
    "blobs": Rule(markup.blobs, markup.has_blobs),
    "latin": Rule(characters.latin, characters.not_latin),
    "ascii": Rule(characters.to_ascii, characters.not_ascii),
    "repeats": Rule(characters.repeats, characters.has_repeats),
    "spaces": Rule(characters.spaces, characters.has_spaces),
    "ips": Rule(private.ips, private.has_ips),
    "cards": Rule(private.cards, private.has_numbers),
    "phones": Rule(private.phones, private.has_numbers),
}
# (document) -> document
TURN_RULES: dict[str, Rule] = {
    "empty_turns": Rule(conversation.empty_turns, conversation.has_empty_turns),
    "repeated_lines": Rule(conversation.repeated_lines, conversation.has_repeated_lines),
    "repeated_turns": Rule(conversation.repeated_turns, conversation.has_repeated_turns),
    "same_role": Rule(conversation.same_role, conversation.has_same_role),
}
DROP_RULES: dict[str, Callable[[Look], bool]] = {
    "too_short": quality.too_short,
    "too_long": quality.too_long,
    "one_sided": quality.one_sided,
    "undecodable": quality.undecodable,
    "few_letters": quality.few_letters,
    "many_scripts": quality.many_scripts,
    "few_lines": quality.few_lines,
    "few_phrases": quality.few_phrases,
}
RULES = (*TEXT_RULES, *TURN_RULES, *DROP_RULES)

_LIGHT = ("line_ends", "mojibake", "controls", "nfc", "spaces", "empty_turns")
_LENIENT = tuple(r for r in (*TEXT_RULES, *TURN_RULES) if r not in ("latin", "ascii"))
_STANDARD = (*_LENIENT, *DROP_RULES)
SETS: dict[str, tuple[str, ...]] = {
    "off": (),
    "light": _LIGHT,
    "lenient": _LENIENT,
    "standard": _STANDARD,
    "balanced": (*_STANDARD, "latin"),
    "strict": (*_STANDARD, "ascii"),
}
SET_HELP = {
    "off": "nothing is changed; documents without any text are left out",
    "light": "mends characters and changes no words",
    "lenient": "also web debris, private data and repetitions; every script, and every document that has text, stays",
    "standard": "also drops what is not language or no conversation",
    "balanced": "standard, in Latin script and its punctuation only",
    "strict": "standard, in ASCII only; refuses invalid UTF-8",
}


@dataclass(frozen=True)
class Settings:
    """What cleaning depends on, besides the text."""

    rules: tuple[str, ...]
    languages: tuple[str, ...] = ()
    blocklist: tuple[str, ...] = ()

    @property
    def blocklist_sha256(self) -> str:
        """What a job is known by: phrases that are blocked are often private themselves."""
        return hashlib.sha256("\n".join(self.blocklist).encode()).hexdigest() if self.blocklist else ""


def choose_rules(rule_set: str, skip: tuple[str, ...] = (), add: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The rules of a set without `skip` and with `add`. Raises UserError for a name that no rule has."""
    for name in (*skip, *add):
        if name not in RULES:
            near = difflib.get_close_matches(name, RULES, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else "see --list-rules"
            raise UserError(f"no cleaning rule is called {name}; {hint}")
    return tuple(name for name in RULES if name in (*SETS[rule_set], *add) and name not in skip)


def check_languages(languages: tuple[str, ...]) -> tuple[str, ...]:
    """Language codes in lower case. Raises UserError for what is none, or where the detector is not installed."""
    codes = tuple(code.lower() for code in languages)
    for code in codes:
        if code not in quality.known_languages():
            raise UserError(f"--language {code}: expected codes such as en,de; "
                            f"known are {' '.join(quality.known_languages())}")  # fmt: skip
    return codes


def read_blocklist(name: str, text: str) -> tuple[str, ...]:
    """The words and phrases of a blocklist, one a line; empty lines and lines that begin with # do not count."""
    lines = (" ".join(line.split()) for line in text.removeprefix("\ufeff").splitlines())
    phrases = tuple(dict.fromkeys(line.casefold() for line in lines if line and not line.startswith("#")))
    if not phrases:
        raise UserError(f"--blocklist {name}: holds no word; expected one word or phrase a line")
    return phrases


Change = tuple[str, Sequence[str], Sequence[str]]  # rule, texts before, texts after


class Cleaner:
    """`Cleaner(settings).clean(document)`: the rules looked up once, not for every document."""

    def __init__(self, settings: Settings) -> None:
        rules = settings.rules
        self.text_rules = [(name, *rule) for name, rule in TEXT_RULES.items() if name in rules]
        self.turn_rules = [(name, *rule) for name, rule in TURN_RULES.items() if name in rules]
        self.drop_rules = [(name, rule) for name, rule in DROP_RULES.items() if name in rules]
        self.drops_long = "too_long" in rules
        if settings.blocklist:
            self.drop_rules.append(("blocklist", quality.Blocklist(settings.blocklist)))
        if settings.languages:
            self.drop_rules.append(("language", lambda look: quality.other_language(settings.languages, look)))
        self.looks = bool(self.text_rules or self.turn_rules or self.drop_rules)
        if "mojibake" in rules:
            mojibake.mojibake("é")  # where ftfy is not installed, that is said before anything is read

    def settles(self, gathered: Gathered) -> np.ndarray:
        """(documents,) bool: those that `clean` would give back as they are, as far as all can be seen at once."""
        if self.looks:
            return np.zeros(len(gathered.doc_turns), bool)
        has_text = np.fromiter(map(bool, gathered.said), bool, len(gathered.said))
        return np.logical_or.reduceat(has_text, gathered.first_turns())

    def clean(self, document: Document) -> tuple[Document | str, list[Change]]:
        """(the cleaned document, or the reason why it is dropped; what each rule changed)."""
        if not document:
            return "empty", []
        changes: list[Change] = []
        if not self.looks:
            return (document if any(text for _, text in document) else "empty"), changes
        roles, texts = zip(*document, strict=True)
        if self.drops_long and sum(map(len, texts)) > quality.MAX_CHARS:  # before it costs ten times its size
            return "too_long", changes
        look = Look(roles, texts)
        for name, mend, when in self.text_rules:
            if when(look):
                before, texts = texts, tuple(map(mend, texts))
                if texts != before:
                    changes.append((name, before, texts))
                    look = Look(roles, texts)
        if changes:
            document = list(zip(roles, texts, strict=True))
        for name, mend, when in self.turn_rules:
            if when(look):
                before, document = document, mend(document)
                if not document:
                    return "empty", changes
                if document != before:
                    changes.append((name, look.texts, [text for _, text in document]))
                    look = Look(*zip(*document, strict=True))
        if not any(look.texts):
            return "empty", changes
        for name, drops in self.drop_rules:
            if drops(look):
                return name, changes
        return document, changes


EXAMPLES = 3  # of each reason to drop, and of each rule that changed something
EXCERPT_CHARS = 60  # each side of where a change begins


def tally(changed: list[Change], counts: Counter, examples: dict[str, list[list[str]]]) -> None:
    """Count what `Cleaner.clean` changed, and keep the first examples of each rule as [before, after]."""
    for name, before, after in changed:
        counts[f"changed_{name}"] += 1
        if kind := private.KIND_OF_RULE.get(name):
            placeholder = private.PLACEHOLDERS[kind]
            counts[f"replaced_{kind}"] += sum(t.count(placeholder) for t in after) - sum(
                t.count(placeholder) for t in before
            )
        if len(examples.setdefault(name, [])) < EXAMPLES:
            examples[name].append(_excerpt("\n".join(before), "\n".join(after)))


def _excerpt(before: str, after: str) -> list[str]:
    pairs = enumerate(zip(before, after, strict=False))
    start = next((i for i, (a, b) in pairs if a != b), min(len(before), len(after)))
    window = slice(max(start - EXCERPT_CHARS, 0), start + EXCERPT_CHARS)
    return [private.mask(before[window]), private.mask(after[window])]


def describe_rules() -> str:
    """What --list-rules prints: every set, and every rule with one line of explanation."""
    rules = {name: rule.mend.__doc__ for name, rule in (*TEXT_RULES.items(), *TURN_RULES.items())}
    rules |= {name: rule.__doc__ for name, rule in DROP_RULES.items()}
    lines = ["--clean SET", *(f"  {name:<15} {text}" for name, text in SET_HELP.items())]
    lines += ["", "rules, in the order in which they are applied; the sets that hold each"]
    for name in RULES:
        in_sets = " ".join(s for s, held in SETS.items() if name in held)
        lines.append(f"  {name:<15} {(rules[name] or '').strip().splitlines()[0]}  [{in_sets}]")
    lines += ["", "options", "  language        With --language en,de: documents in other languages are dropped.",
              "  blocklist       With --blocklist FILE: documents that hold one of its words or phrases are dropped."]  # fmt: skip
    return "\n".join(lines)
