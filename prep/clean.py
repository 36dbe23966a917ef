"""Cleaning as pure functions: clean(text) -> text, drop_reason(turns) -> str | None. No I/O, no state.

A set is a list of rules. `light` mends characters and changes no words; `standard` also undoes web debris and drops
what is not language; `strict` also keeps ASCII only. Most text needs nothing: each rule first asks a question that
costs a memory scan, so that clean text passes at hundreds of MB/s.
"""

import html
import html.entities
import re
import unicodedata
from collections.abc import Callable

RULES: dict[str, tuple[str, ...]] = {
    "off": (),
    "light": ("line_ends", "nfc", "controls", "spaces"),
    "standard": ("line_ends", "html", "nfc", "controls", "spaces", "runs", "drop_not_language"),
    "strict": ("line_ends", "html", "nfc", "controls", "ascii", "spaces", "runs", "drop_not_language"),
}

_CONTROLS = bytes([*range(9), 11, 12, *range(14, 32), 127])
_NOT_LETTERS = bytes(c for c in range(128) if not chr(c).isalpha())  # every byte of a non-ASCII character counts
_ODD = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\u00ad\u200b\u2060\ufeff\ufff9-\ufffb]")
_TAG_NAMES = "a|b|i|u|p|br|div|span|em|strong|ul|ol|li|code|pre|font|table|tr|td|h[1-6]|img"
# attributes need a value: "a<b and c>d" is arithmetic
_ATTRIBUTE = r"""\s+[\w-]+\s*=\s*(?:"[^"<>]*"|'[^'<>]*'|[^\s"'<>]+)"""
_TAG = re.compile(rf"</?(?:{_TAG_NAMES})(?:{_ATTRIBUTE}){{0,20}}\s*/?>", re.IGNORECASE)
_BREAK = re.compile(r"<(?:br|/p|/div|/li|/tr)\s*/?>", re.IGNORECASE)
_ENTITY = re.compile(r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,30});")
_ODD_BLANKS = "\u00a0\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u3000"
_ODD_BLANK = re.compile(f"[{_ODD_BLANKS}]")
_BLANKS = re.compile(r"(?<=\S)[ \t]+")  # not at the beginning of a line: there they are a poem's or a program's
_LINE_END = re.compile(r"[ \t]+\n")
_SIGNS = bytes(c for c in range(33, 127) if not chr(c).isalnum())
_RUN = re.compile("([" + re.escape(_SIGNS.decode()) + r"])\1{9,}")
_IS_SIGN = bytes(c in _SIGNS for c in range(256))  # a table for bytes.translate
_ASCII = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201a": "'", "\u201c": '"', "\u201d": '"', "\u201e": '"',
                        "\u2013": "-", "\u2014": "-", "\u2212": "-", "\u2026": "...", "\u00a0": " ", "\u2022": "*",
                        "\u00ab": '"', "\u00bb": '"', "\u00d7": "x"})  # fmt: skip


def line_ends(text: str) -> str:
    """CRLF, CR and the Unicode line separators -> LF."""
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    if text.isascii():
        return text
    return text.replace("\u2028", "\n").replace("\u2029", "\n").replace("\u0085", "\n")


def nfc(text: str) -> str:
    """Unicode NFC: one way to write é."""
    return text if text.isascii() or unicodedata.is_normalized("NFC", text) else unicodedata.normalize("NFC", text)


def controls(text: str) -> str:
    """Remove control, zero-width-space, soft-hyphen and byte-order characters; joiners that scripts and emoji need stay."""
    if text.isascii():
        raw = text.encode()
        kept = raw.translate(None, _CONTROLS)
        return text if len(kept) == len(raw) else kept.decode()
    return _ODD.sub("", text)


def undo_html(text: str) -> str:
    """Entities -> characters (also escaped twice), common tags -> nothing or a line break; a lone < or & stays."""
    if "&" in text:
        text = _ENTITY.sub(_character, _ENTITY.sub(_character, text))
    if "<" in text and ">" in text:
        text = _TAG.sub("", _BREAK.sub("\n", text))
    return text


def _character(entity: re.Match[str]) -> str:
    # html.unescape alone also takes prefixes: "&notanentity;" would become "¬anentity;"
    known = entity[0][1] == "#" or entity[0][1:] in html.entities.html5
    return html.unescape(entity[0]) if known else entity[0]


def spaces(text: str) -> str:
    """One plain space between words, none at line ends, at most one empty line, none around the whole.

    Blanks that begin a line stay: they carry the meaning of code and lists.
    """
    if not text.isascii() and any(b in text for b in _ODD_BLANKS):
        text = _ODD_BLANK.sub(" ", text)
    if "  " in text or "\t" in text:
        text = _BLANKS.sub(" ", text)
    if " \n" in text or "\t\n" in text:
        text = _LINE_END.sub("\n", text)
    while "\n\n\n" in text:
        text = text.replace("\n\n\n", "\n\n")
    return text.strip()


def runs(text: str) -> str:
    """A sign repeated ten times or more -> three: "-----------" is a line drawn, not language."""
    # whether any ten signs stand together is asked of the bytes: ten times faster than a back-reference
    return _RUN.sub(r"\1\1\1", text) if b"\1" * 10 in text.encode().translate(_IS_SIGN) else text


def to_ascii(text: str) -> str:
    """Typographic quotes, dashes and the like -> ASCII, accents dropped; what has no ASCII form goes."""
    if text.isascii():
        return text
    text = unicodedata.normalize("NFKD", text.translate(_ASCII))
    return text.encode("ascii", "ignore").decode()


CLEANERS: dict[str, Callable[[str], str]] = {
    "line_ends": line_ends, "html": undo_html, "nfc": nfc, "controls": controls,
    "ascii": to_ascii, "spaces": spaces, "runs": runs,
}  # fmt: skip


def clean(text: str, rules: tuple[str, ...]) -> str:
    """The text after the rules of a set, in the set's order."""
    for rule in rules:
        if rule in CLEANERS:
            text = CLEANERS[rule](text)
    return text


def clean_turns(turns: list[str], rules: tuple[str, ...]) -> list[str]:
    """`clean` of each turn of a conversation."""
    joined = "\n\n".join(turns)  # white space at either end of a turn then stands where `spaces` removes it
    # text that is clean as a whole is clean in every turn, but for blanks at a turn's beginning: most conversations take
    # one pass instead of one per turn
    whole = clean(joined, rules) == joined and "\n\n " not in joined and "\n\n\t" not in joined
    return turns if whole else [clean(t, rules) for t in turns]


def drop_reason(turns: list[str], rules: tuple[str, ...]) -> str | None:
    """Why a cleaned document should not be kept, or None. `turns` are its non-empty texts."""
    if not turns:
        return "empty"
    if "drop_not_language" not in rules:
        return None
    text = "\n".join(turns) if len(turns) > 1 else turns[0]
    sample = text[:1000].encode()
    if len(sample) >= 100 and len(sample.translate(None, _NOT_LETTERS)) < 0.25 * len(sample):
        return "few_letters"
    lines = text.split("\n")
    if len(lines) >= 20 and len(set(lines)) < 0.2 * len(lines):
        return "repeated_lines"
    if 3 * sample.count(b"\xef\xbf\xbd") > 0.1 * len(sample):  # U+FFFD
        return "undecodable"
    return None
