"""One look at a document: what every cleaning rule may ask before it works, in one scan each of its text.

Most text needs nothing. The rules' own expressions run at 10 to 50 MB/s in Python; these questions at 200 MB/s in all,
so that a rule sees only the documents in which it may have something to do.
"""

from collections.abc import Sequence

_NUMBER, _CONTROL = b"0" * 9, b"\1"  # no number that is anyone's is shorter, signs between its digits included
_CONTROLS = (*range(9), 11, 12, *range(14, 32), 127)
_SHAPE = bytes(48 if c in b"0123456789 ()+-./" else 1 if c in _CONTROLS else 120 for c in range(256))
_BLANKS = bytes(c in b" \n" for c in range(256))
_ASCII_TO_BLANK = b" " * 128 + bytes(range(128, 256))


def has_number(text: str) -> bool:
    """Whether nine digits, or signs that stand between digits, come in a row."""
    return _NUMBER in text.encode().translate(_SHAPE)


def _has_run(raw: bytes, n: int) -> bool:
    """Whether a byte stands `n` times in a row: x ^ (x >> 8) is zero where neighbours are equal; 540 MB/s, `re` 40."""
    number = int.from_bytes(raw, "little")
    return bytes(n - 1) in (number ^ (number >> 8)).to_bytes(len(raw), "little")


class Look:
    """A document's turns as one text, each between line ends, with what can be seen of it cheaply."""

    __slots__ = (
        "ascii",
        "blanks",
        "chat",
        "has_control",
        "has_number",
        "lines",
        "raw",
        "roles",
        "text",
        "texts",
        "wide",
    )

    def __init__(self, roles: Sequence[str | None], texts: Sequence[str]) -> None:
        self.roles, self.texts = roles, texts
        self.chat = bool(roles) and roles[0] is not None
        self.text = "\n".join(("", *texts, ""))
        self.ascii = self.text.isascii()
        self.raw = self.text.encode()
        shape = self.raw.translate(_SHAPE)
        self.has_number = _NUMBER in shape
        self.has_control = _CONTROL in shape
        self.blanks = self.raw.translate(_BLANKS)
        self.lines = self.raw.count(b"\n") - 1  # empty ones too
        # the other characters alone, a blank where any ASCII stood between them: a fiftieth of an English text
        self.wide = "" if self.ascii else b" ".join(self.raw.translate(_ASCII_TO_BLANK).split()).decode()

    def has_blanks(self) -> bool:
        """Whether two blanks or line ends come in a row: every turn has a line end at either side."""
        number = int.from_bytes(self.blanks, "little")  # three times faster than to search "\1\1"
        return number & (number >> 8) != 0

    def has_word_of(self, n: int) -> bool:
        """Whether `n` bytes come without a blank."""
        return bytes(n) in self.blanks

    def has_repeats(self, n: int) -> bool:
        """Whether any ASCII character stands `n` times in a row."""
        return _has_run(self.raw[::2], n // 2) and _has_run(self.raw, n)  # every second byte settles it for most
