"""Cleaning rules for single characters and blanks: each a pure function from text to text."""

import re
import unicodedata

from prep import quality
from prep.look import Look
from prep.markup import outside_code

REPEATS = (
    10  # "soooooo" and "!!!!" are how people write; a character ten times in a row is a line drawn, or a stuck key
)

_ODD = re.compile(
    "[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\u00ad\u200b\u202a-\u202e\u2060\u2066-\u2069\ufeff\ufff9-\ufffb]"
    # joiners belong between letters or emoji that are not ASCII
    "|(?<![^\x00-\x7f])[\u200c\u200d]+|[\u200c\u200d]+(?![^\x00-\x7f])"
)
# what terminals and IRC make colours of: ESC [ 31 m, and Ctrl-C 04,01
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|\x03\d{1,2}(?:,\d{1,2})?")
_ODD_BLANKS = "\u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000"
_ODD_BLANK = re.compile(f"[{_ODD_BLANKS}]")
_LINE_SEPARATORS = re.compile("[\u0085\u2028\u2029]")
_BLANKS = re.compile(r"(?<=\S)[ \t]+")  # not at the beginning of a line: there they are a poem's or a program's
_LINE_END = re.compile(r"(?<![ \t])[ \t]+\n")
_REPEAT = re.compile(r"([^\s\d])\1{" + str(REPEATS - 1) + ",}")  # digits are amounts
_WIDE_REPEAT = re.compile(r"([^ ])\1{" + str(REPEATS - 1) + ",}")
_LOST = re.compile("\ufffd+")
_LOST_QUOTE = re.compile("(“[^“”\n\ufffd]{1,200})\ufffd")
_LOST_APOSTROPHE = re.compile(r"(?<=[A-Za-z])\ufffd+(?=(?:s|t|re|ve|ll|d|m)\b)")

# Latin letters with their combining marks, and the punctuation, currencies, arrows and mathematics that go with them
_LATIN = "\x00-\u024f\u0300-\u036f\u1e00-\u1eff\u2010-\u2027\u2030-\u205e\u2070-\u22ff\u2c60-\u2c7f\ua720-\ua7ff\ufb00-\ufb06"
_NOT_LATIN = re.compile(f"[^{_LATIN}]")
_ASCII = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201a": "'", "\u201c": '"', "\u201d": '"', "\u201e": '"',
                        "\u2013": "-", "\u2014": "-", "\u2212": "-", "\u2026": "...", "\u00a0": " ", "\u2022": "*",
                        "\u00ab": '"', "\u00bb": '"', "\u00d7": "x", "ß": "ss", "æ": "ae", "Æ": "AE", "œ": "oe", "Œ": "OE",
                        "ø": "o", "Ø": "O", "ł": "l", "Ł": "L", "đ": "d", "Đ": "D", "ð": "d", "þ": "th", "ı": "i"})  # fmt: skip


def line_ends(text: str) -> str:
    """CRLF, CR and the Unicode line separators -> LF."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return _LINE_SEPARATORS.sub("\n", text)


def has_line_ends(look: Look) -> bool:
    return "\r" in look.text or _LINE_SEPARATORS.search(look.wide) is not None


def nfc(text: str) -> str:
    """Unicode NFC: one way to write é."""
    return unicodedata.normalize("NFC", text)


def not_nfc(look: Look) -> bool:
    return not look.ascii and not unicodedata.is_normalized("NFC", look.text)


def controls(text: str) -> str:
    """Remove control, zero-width, soft-hyphen, direction and byte-order characters; joiners within scripts and emoji stay."""
    return _ODD.sub("", _ESCAPES.sub("", text).replace("\x0b", " ").replace("\x0c", " "))


def has_controls(look: Look) -> bool:
    return look.has_control or _ODD.search(look.wide) is not None


def lost(text: str) -> str:
    """Remove U+FFFD, which stands for a character lost before; apostrophes and closing quotes are put back."""
    return _LOST.sub("", _LOST_QUOTE.sub(r"\1”", _LOST_APOSTROPHE.sub("'", text)))


def has_lost(look: Look) -> bool:
    """A text that has lost too much is no longer to be mended: `undecodable` finds it as it is."""
    return "\ufffd" in look.wide and not quality.undecodable(look)


@outside_code
def _collapse(text: str) -> str:
    return _BLANKS.sub(" ", text) if "  " in text or "\t" in text else text


def spaces(text: str) -> str:
    """One plain space between words, none at line ends, at most one empty line, none around the whole.

    Blanks that begin a line stay, and those within code: there they carry meaning.
    """
    if not text.isascii():
        text = _ODD_BLANK.sub(" ", text)
    text = _collapse(text)
    if " \n" in text or "\t\n" in text:
        text = _LINE_END.sub("\n", text)
    while "\n\n\n" in text:
        text = text.replace("\n\n\n", "\n\n")
    return text.strip(" \t\n")


def has_spaces(look: Look) -> bool:
    return look.has_blanks() or "\t" in look.text or _ODD_BLANK.search(look.wide) is not None


@outside_code
def repeats(text: str) -> str:
    """A letter or sign ten times or more in a row -> three times; digits and code stay."""
    return _REPEAT.sub(r"\1\1\1", text)


def has_repeats(look: Look) -> bool:
    return look.has_repeats(REPEATS) or _WIDE_REPEAT.search(look.wide) is not None


def latin(text: str) -> str:
    """Keep the Latin script and its punctuation only; a text mostly in another script becomes empty."""
    kept = _NOT_LATIN.sub("", text)
    return text if kept == text else _keep(text, nfc(kept))


def not_latin(look: Look) -> bool:
    return _NOT_LATIN.search(look.wide) is not None


def to_ascii(text: str) -> str:
    """Typographic quotes, dashes and accents -> ASCII; what has no ASCII form goes, and with it a text mostly made of it."""
    plain = unicodedata.normalize("NFKD", text.translate(_ASCII))
    return _keep(text, plain.encode("ascii", "ignore").decode())


def not_ascii(look: Look) -> bool:
    return not look.ascii


def _keep(before: str, after: str) -> str:
    """`after`, or nothing when less than half of the letters are left: rags of a sentence teach nothing."""
    return after if 2 * sum(map(str.isalpha, after)) >= sum(map(str.isalpha, before)) else ""
