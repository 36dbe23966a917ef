"""The documents of a piece of a source, in batches of bounded size, whatever its format.

A record belongs to the byte range it begins in, so that every record is read exactly once whatever the ranges.
"""

import codecs
import io
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from cli.errors import UserError
from prep import corpus, tables
from prep.compression import Unpacked
from prep.corpus import Piece, Source
from prep.formats import (
    BOUNDARY,
    BOUNDARY_BYTES,
    EXCERPT_CHARS,
    KNOWN_FIELDS,
    Document,
    Fields,
    Unusable,
    decode,
    documents,
    known_fields,
    record_document,
)
from prep.labelled import conversations
from prep.parts import Gathered
from store import fs
from store.errors import StoreError

CUT_BYTES = 8 << 20  # a record of twice this is cut, one of less never: nothing of unknown size is held in memory
CACHED_BYTES = 1 << 20


@dataclass
class Batch:
    """Some consecutive records of a piece, and what was met on the way to them."""

    records: Iterable[Gathered | Document | Unusable] = field(default_factory=list)  # one, or many gathered
    text_bytes: int = 0  # unpacked
    lines: int = 0  # or rows
    invalid_utf8: int = 0  # sequences that were replaced by U+FFFD, known when the documents are read
    cut: int = 0  # times that a record was cut because of its length

    @property
    def documents(self) -> Iterator[Document | Unusable]:
        """The records one by one."""
        for record in self.records:
            yield from record if isinstance(record, Gathered) else (record,)


def read(piece: Piece, fields: Fields = KNOWN_FIELDS, *, strict: bool = False) -> Iterator[Batch]:
    """All documents of a piece. The line (or row) of an Unusable is counted from the piece's beginning.

    Raises UserError for a damaged file, and for invalid UTF-8 if `strict`; StoreError for storage that fails.
    """
    kind = piece.source.kind
    if kind in BOUNDARY:
        return _read_text(piece, fields, strict)
    if kind == "csv":
        return _read_csv(piece, fields, strict)
    return _read_json(piece, fields, strict) if kind == "json" else _read_columns(piece, fields)


# ---- text -----------------------------------------------------------------------------------------------------------


def _read_text(piece: Piece, fields: Fields, strict: bool) -> Iterator[Batch]:
    kind, lines = piece.source.kind, 0
    for chunk, cut in _chunks_of(piece, BOUNDARY[kind]):
        batch = Batch(text_bytes=len(chunk), lines=chunk.count(b"\n") if kind == "jsonl" else 0, cut=cut)
        batch.records = _records_of_text(chunk, batch, piece.source, fields, strict, lines + 1)
        lines += batch.lines
        yield batch


def _records_of_text(
    chunk: bytes, batch: Batch, source: Source, fields: Fields, strict: bool, first_line: int
) -> Iterator[Gathered | Document | Unusable]:  # fmt: skip
    if source.kind == "chat":
        for part in _in_cache(chunk):
            if not part.isascii():
                text, invalid = _decode(part, source, strict)
                batch.invalid_utf8 += invalid
                part = text.encode() if invalid else part
            yield conversations(part)
    else:
        text, invalid = _decode(chunk, source, strict)
        batch.invalid_utf8 += invalid
        yield from documents(text, source.kind, fields, first_line=first_line)


def _in_cache(chunk: bytes) -> Iterator[bytes]:
    """Conversations as pieces small enough for the cache."""
    start = 0
    while start < len(chunk):
        boundary = BOUNDARY["chat"].search(chunk, start + CACHED_BYTES)
        stop = boundary.end() if boundary else len(chunk)
        yield chunk[start:stop]
        start = stop


def _decode(chunk: bytes, source: Source, strict: bool) -> tuple[str, int]:
    try:
        return decode(chunk, strict=strict)
    except UnicodeDecodeError as e:
        raise UserError(f"{fs.redact(source.url)}: invalid UTF-8 ({chunk[e.start : e.start + 4].hex(' ')}…); --clean strict "
                        "refuses it: repair the file, or use --clean standard to replace such bytes") from e  # fmt: skip


def _chunks_of(piece: Piece, boundary: re.Pattern[bytes]) -> Iterator[tuple[bytes, bool]]:
    """The piece as chunks of bounded size: (whole records, whether the first is the rest of one that was cut)."""
    source = piece.source
    with Unpacked(source.url, source.compression) as f:
        if not source.divisible:
            yield from _whole_records(_chunks(f, 0, piece.limit, boundary, rest=False), piece.limit, boundary)
            return
        first, rest = _record_start(f, piece.start, source, boundary)
        last, _ = _record_start(f, piece.stop, source, boundary)
        f.seek(first)
        got = 0
        for chunk, cut in _chunks(f, first, last, boundary, rest=rest):
            got += len(chunk)
            yield chunk, cut
        if got < last - first:
            raise _shrank(source)


def _shrank(source: Source) -> StoreError:
    return StoreError(f"{fs.redact(source.url)}: shrank while it was read: put the whole file back, "
                      "then run the same command with --resume")  # fmt: skip


def _whole_records(
    chunks: Iterator[tuple[bytes, bool]], limit: int | None, boundary: re.Pattern[bytes]
) -> Iterator[tuple[bytes, bool]]:
    """The chunks without the record that a `limit` of bytes has cut off."""
    got = 0
    for chunk, cut in chunks:
        got += len(chunk)
        yield (chunk[: _last_end(chunk, boundary) or None] if got == limit else chunk), cut


# A record may be of any length, and may neither be held nor looked through as a whole. So it is cut at those multiples of
# CUT_BYTES after which it goes on for as much again: that can be seen from anywhere in the file, so that all ranges
# agree, and the pieces are shorter than two CUT_BYTES. (As much again but three: cuts go back to where a character begins.)


def _record_start(f: Unpacked, at: int, source: Source, boundary: re.Pattern[bytes]) -> tuple[int, bool]:
    """(the first record start at or after byte `at`; whether a record is cut there).

    It is a function of the file and `at` alone, so that neighbours agree.
    """
    if at <= 0 or at >= source.size:
        return min(max(at, 0), source.size), False
    place = -(-at // CUT_BYTES) * CUT_BYTES
    position = max(at - BOUNDARY_BYTES, 0)
    f.seek(position)
    buffer = b""
    while position + len(buffer) < place + CUT_BYTES - 3:
        more = f.read(1 << 20 if buffer else 1 << 16)
        buffer += more
        for end in (position + m.end() for m in boundary.finditer(buffer)):
            if place - 3 <= end < at:
                place = _next_place(end)
            if at <= end < place + CUT_BYTES - 3:
                return end, False
        if not more:
            if position + len(buffer) < source.size:
                raise _shrank(source)
            return source.size, False
        position += max(len(buffer) - BOUNDARY_BYTES, 0)
        buffer = buffer[-BOUNDARY_BYTES:]
    f.seek(place - 3)
    return place - _inside_character(f.read(4)), True


def _chunks(
    f: Unpacked, start: int, stop: int | None, boundary: re.Pattern[bytes], *, rest: bool
) -> Iterator[tuple[bytes, bool]]:
    """The bytes from `start`, a record or the `rest` of one, to `stop` (None: the end) as `_chunks_of` gives them."""
    if stop is not None and _next_place(start) + CUT_BYTES - 3 > stop:  # all but a few ranges: there is nothing to cut
        if chunk := f.read(stop - start):
            yield chunk, rest
        return
    buffer, left = b"", stop - start if stop is not None else 1 << 62
    while more := f.read(min(CUT_BYTES, left)):
        left -= len(more)
        buffer += more
        while cut := _cut(buffer, start, boundary):
            yield buffer[:cut], rest
            buffer, start, rest = buffer[cut:], start + cut, True
        if end := _last_end(buffer, boundary):
            yield buffer[:end], rest
            buffer, start, rest = buffer[end:], start + end, False
    if buffer:
        yield buffer, rest


def _next_place(at: int) -> int:
    """The first multiple of CUT_BYTES after `at`; not the one that `at` is in the character of."""
    return ((at + 3) // CUT_BYTES + 1) * CUT_BYTES


def _cut(buffer: bytes, start: int, boundary: re.Pattern[bytes]) -> int:
    """How much of the buffer, which is the file from `start` on, to cut off a record that is too long; 0 for nothing."""
    place = _next_place(start) - start
    if len(buffer) < place + CUT_BYTES - 3 or ((m := boundary.search(buffer)) and m.end() < place + CUT_BYTES - 3):
        return 0
    return place - _inside_character(buffer[place - 3 : place + 1])


def _inside_character(four: bytes) -> int:
    """How many bytes before the last of four the UTF-8 character begins that it belongs to."""
    return next((back for back in range(4) if four[3 - back] & 0xC0 != 0x80), 0)


def _last_end(buffer: bytes, boundary: re.Pattern[bytes]) -> int:
    """Where the last record that ends in the buffer does; 0 when none does. Near the end in all but odd files."""
    for start in (max(len(buffer) - (1 << 20), 0), 0):
        if ends := [m.end() for m in boundary.finditer(buffer, start)]:
            return ends[-1]
    return 0


# ---- tables and arrays ----------------------------------------------------------------------------------------------


def _read_csv(piece: Piece, fields: Fields, strict: bool) -> Iterator[Batch]:
    batch = Batch()

    def lines() -> Iterator[str]:
        for chunk, cut in _chunks_of(piece, BOUNDARY["lines"]):
            text, invalid = _decode(chunk, piece.source, strict)
            batch.invalid_utf8 += invalid
            batch.cut += cut
            batch.text_bytes += len(chunk)
            batch.lines += text.count("\n")
            yield from io.StringIO(text.removeprefix("\ufeff"), newline="\n")

    for number, row in tables.csv_rows(lines()):
        batch.records.append(_document_of(row, fields, number))
        if batch.text_bytes >= corpus.TASK_BYTES:
            yield batch
            batch = Batch()
    yield batch


def _read_json(piece: Piece, fields: Fields, strict: bool) -> Iterator[Batch]:
    source, batch, total = piece.source, Batch(), 0

    def texts(f: Unpacked) -> Iterator[str]:
        utf8 = codecs.getincrementaldecoder("utf-8")("strict" if strict else "replace")
        while chunk := f.read(1 << 20):
            text = utf8.decode(chunk)
            batch.invalid_utf8 += text.count("\ufffd") - chunk.count("\ufffd".encode())
            yield text

    with Unpacked(source.url, source.compression) as f:
        try:
            for number, record in enumerate(tables.json_array(texts(f)), 1):
                batch.records.append(_document_of(record, fields, number))
                batch.text_bytes += _said(batch.records[-1])
                if piece.limit is not None and total + batch.text_bytes >= piece.limit:
                    break
                if batch.text_bytes >= corpus.TASK_BYTES:
                    yield batch
                    total += batch.text_bytes
                    batch = Batch()
        except ValueError as e:  # what follows cannot be found again, as the next line of JSONL can
            raise UserError(f"{fs.redact(source.url)}: broken JSON ({e}): repair it, or convert it to .jsonl") from e
    yield batch


def _read_columns(piece: Piece, fields: Fields) -> Iterator[Batch]:
    source, number, total = piece.source, 0, 0
    with tables.opened(source.url) as file:
        columns = known_fields(tables.column_names(file, source.kind), fields)
        for rows in tables.column_rows(file, source.kind, piece.start, piece.stop, columns):
            found = [_document_of(row, fields, n) for n, row in enumerate(rows, number + 1)]
            number += len(rows)
            said = sum(map(_said, found))
            yield Batch(found, said, len(rows))
            total += said
            if piece.limit is not None and total >= piece.limit:
                return


def _document_of(row: object, fields: Fields, number: int) -> Document | Unusable:
    document = record_document(row, fields) if row is not tables.BROKEN else "broken_row"
    return Unusable(document, str(row)[:EXCERPT_CHARS], number) if isinstance(document, str) else document


def _said(document: Document | Unusable) -> int:
    return sum(len(text) for _, text in document) if isinstance(document, list) else 0
