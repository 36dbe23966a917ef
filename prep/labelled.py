"""Conversations in the text of a chat, with numpy: a text of 200 MB has 600,000 turns, and Python takes a second for them.

Blocks of labelled turns stand between blank lines. A block without any label goes on with the turn before it: replies of
several paragraphs are common. A block whose first line alone lacks a label has lost it: the line was said by whoever does
not speak next. An assistant's block goes on with the conversation of the question before it.
"""

import codecs
import itertools

import numpy as np

from prep.formats import ROLE_INDEX, role_and_text
from prep.parts import Gathered

_SPACE, _LINE_END = b" \n"
_USER, _ASSISTANT = ROLE_INDEX["user"], ROLE_INDEX["assistant"]
_LABEL_BYTES = 16  # hold any label with its colon
_LARGE = np.uint64(0x20)  # the bit between a large letter and a small one, in the first of eight bytes
# labels as nearly all are written, "User:" or "user:"; others are read one by one
_LABELS = (
    (b"user:", "user"),
    (b"human:", "user"),
    (b"assistant:", "assistant"),
    (b"bot:", "assistant"),
    (b"system:", "system"),
)
_INITIALS = np.array([chr(c).lower() in "uhabs" for c in range(256)])
# bytes that a character of white space, as str.isspace has it, may begin or end with
_WHITE = [chr(c).encode() for c in range(0x3001) if chr(c).isspace()]
_MAY_BEGIN, _MAY_END = np.zeros(256, bool), np.zeros(256, bool)
_MAY_BEGIN[[c[0] for c in _WHITE]] = True
_MAY_END[[c[-1] for c in _WHITE]] = True
_BLANK = np.zeros(256, bool)
_BLANK[list(b" \t\r")] = True


def conversations(raw: bytes) -> Gathered:
    """The conversations of a text, valid UTF-8."""
    raw = raw.removeprefix(codecs.BOM_UTF8)
    buffer = np.frombuffer(raw, np.uint8)
    begin, end, leads = _lines(raw, buffer)
    if not len(begin):
        return Gathered()
    role, text_begin = _labels(raw, buffer, begin)

    # turns: from a label, or the beginning of a block, to the next of either
    opens = np.flatnonzero(leads | (role > 0))
    last = np.append(opens[1:], len(begin)) - 1
    begin, end, role, leads = text_begin[opens], end[last], role[opens], leads[opens]
    _strip(raw, buffer, begin, end)

    alone = leads & np.append(leads[1:], True)[: len(leads)]  # the only turn of its block
    follows = alone & (role == 0)  # and without a label: part of the turn before
    follows[:1] = False
    lost = np.flatnonzero(leads & (role == 0) & ~alone)
    said_role = role.copy()
    said_role[lost] = np.where(role[lost + 1] == _USER, _ASSISTANT, _USER)

    turn = np.flatnonzero(~follows)
    said = _texts(raw, begin, end, turn, follows)
    label, role, leads = role[turn], said_role[turn], leads[turn]
    answers = (label == _ASSISTANT) & (np.append(0, role)[: len(role)] == _USER)
    first = np.flatnonzero(leads & ~answers)
    return Gathered(said, bytearray(role.tobytes()), np.diff(first, append=len(role)).tolist())


def _lines(raw: bytes, buffer: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(begin, end, leads a block) of each line that is not blank, as blocks without white space around them have them."""
    ends = np.flatnonzero(buffer == _LINE_END)
    begin, end = np.append(0, ends + 1), np.append(ends, len(raw))
    text = end > begin
    odd = np.flatnonzero(text)
    odd = odd[_BLANK[buffer[begin[odd]]] & _BLANK[buffer[end[odd] - 1]]]
    text[[i for i in odd.tolist() if not raw[begin[i] : end[i]].strip(b" \t\r")]] = False
    leads = text & ~np.append(False, text[:-1])
    begin, end, leads = begin[text], end[text], leads[text]

    # blocks that begin with white space, which belongs to none
    dropped = np.zeros(len(begin), bool)
    block = np.append(np.flatnonzero(leads), len(begin))
    indented = np.flatnonzero(_MAY_BEGIN[buffer[begin[block[:-1]]]])
    for first, stop in zip(block[indented].tolist(), block[indented + 1].tolist(), strict=True):
        while first < stop and not (line := raw[begin[first] : end[first]].decode().lstrip()):
            dropped[first] = True
            first += 1
        if first < stop:
            begin[first], leads[first] = end[first] - len(line.encode()), True
    return (begin[~dropped], end[~dropped], leads[~dropped]) if dropped.any() else (begin, end, leads)


def _labels(raw: bytes, buffer: np.ndarray, begin: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(role or 0, where the text begins) of each line."""
    role, text_begin = np.zeros(len(begin), np.uint8), begin.copy()
    lines = np.flatnonzero(_INITIALS[buffer[begin]])
    padded = raw + bytes(_LABEL_BYTES)
    words = np.ndarray(len(raw) + _LABEL_BYTES - 8, "<u8", padded, strides=(1,))  # the eight bytes from each place on
    here = begin[lines]
    word = words[here] | _LARGE
    odd = np.ones(len(lines), bool)
    for label, name in _LABELS:
        found = _equal(word, label[:8])
        if label[8:]:
            found = found[_equal(words[here[found] + 8], label[8:])]
        role[lines[found]] = ROLE_INDEX[name]
        text_begin[lines[found]] += len(label)
        odd[found] = False
    here = here[odd]
    has_colon = (np.ndarray((len(raw), _LABEL_BYTES), np.uint8, padded, strides=(1, 1))[here] == ord(":")).any(axis=1)
    odd = lines[odd][has_colon]
    for i in odd.tolist():
        at = int(begin[i])
        colon = raw.index(b":", at) + 1
        speaker, _ = role_and_text(raw[at:colon].decode())
        if speaker:
            role[i], text_begin[i] = ROLE_INDEX[speaker], colon
    return role, text_begin


def _equal(words: np.ndarray, text: bytes) -> np.ndarray:
    """Which of the little-endian words begin with the text."""
    mask = np.uint64((1 << 8 * len(text)) - 1)
    return np.flatnonzero(words & mask == np.uint64(int.from_bytes(text, "little")))


def _strip(raw: bytes, buffer: np.ndarray, begin: np.ndarray, end: np.ndarray) -> None:
    """What str.strip does to each text, in place."""
    begin += (begin < end) & (buffer[np.minimum(begin, len(buffer) - 1)] == _SPACE)
    some = np.flatnonzero(begin < end)
    odd = some[_MAY_BEGIN[buffer[begin[some]]] | _MAY_END[buffer[end[some] - 1]]]
    for i in odd.tolist():
        text = raw[begin[i] : end[i]].decode().lstrip()
        begin[i] = end[i] - len(text.encode())
        end[i] = begin[i] + len(text.rstrip().encode())


def _texts(raw: bytes, begin: np.ndarray, end: np.ndarray, turn: np.ndarray, follows: np.ndarray) -> list[bytes]:
    """The text of each turn: of one block, or of several with an empty line between."""
    if len(turn) == len(begin):
        return [raw[a:b] for a, b in zip(begin.tolist(), end.tolist(), strict=True)]
    apart = follows.copy()
    apart[1:] &= begin[1:] - end[:-1] != 2  # else what stands between them is just that
    piece = np.flatnonzero(~follows | apart)
    stop = np.append(piece[1:], len(begin)) - 1
    texts = [raw[a:b] for a, b in zip(begin[piece].tolist(), end[stop].tolist(), strict=True)]
    if len(piece) == len(turn):
        return texts
    at = np.append(np.searchsorted(piece, turn), len(piece)).tolist()
    return [texts[a] if b - a == 1 else b"\n\n".join(texts[a:b]) for a, b in itertools.pairwise(at)]
