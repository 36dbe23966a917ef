"""Cleaning rules for the turns of a conversation: each a pure function from a document to a document."""

import itertools
import operator

from prep.formats import Document
from prep.look import Look

REPEATED_LINES = 4  # a refrain may come three times


def empty_turns(document: Document) -> Document:
    """Leave out turns without text."""
    return [turn for turn in document if turn[1]]


def has_empty_turns(look: Look) -> bool:
    return "" in look.texts


def repeated_turns(document: Document) -> Document:
    """Of equal turns of one speaker in a row, the first."""
    return [turn for turn, _ in itertools.groupby(document)]


def has_repeated_turns(look: Look) -> bool:
    return has_same_role(look) and any(map(operator.eq, look.texts, look.texts[1:]))


def same_role(document: Document) -> Document:
    """Turns of one speaker in a row -> one turn of several lines."""
    together = itertools.groupby(document, key=lambda turn: turn[0])
    return [(role, "\n".join(text for _, text in turns)) for role, turns in together]


def has_same_role(look: Look) -> bool:
    return any(map(operator.eq, look.roles, look.roles[1:]))


def repeated_lines(document: Document) -> Document:
    """A line that comes four times in a row, or more often -> once."""
    return [(role, "\n".join(_each_once(text.split("\n")))) for role, text in document]


def has_repeated_lines(look: Look) -> bool:
    return look.lines - len(look.texts) >= REPEATED_LINES - 1


def _each_once(lines: list[str]) -> list[str]:
    kept: list[str] = []
    for _, run in itertools.groupby(lines, key=str.strip):
        run = list(run)
        kept += run[:1] if len(run) >= REPEATED_LINES else run
    return kept
