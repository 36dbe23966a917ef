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
from store import fs
from store.errors import StoreError

MAX_RECORD_BYTES = 2 * corpus.TASK_BYTES  # a longer record is cut: nothing of unknown size is ever held in memory


@dataclass
class Batch:
    """Some consecutive records of a piece, and what was met on the way to them."""

    documents: Iterable[Document | Unusable] = field(default_factory=list)
    text_bytes: int = 0  # unpacked
    lines: int = 0  # or rows
    invalid_utf8: int = 0  # sequences that were replaced by U+FFFD
    cut: int = 0  # times that a record longer than MAX_RECORD_BYTES was cut


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
    lines = 0
    for chunk, cut in _chunks_of(piece, BOUNDARY[piece.source.kind]):
        text, invalid = _decode(chunk, piece.source, strict)
        found = documents(text, piece.source.kind, fields, first_line=lines + 1)
        n_lines = chunk.count(b"\n") if piece.source.kind == "jsonl" else 0
        lines += n_lines
        yield Batch(found, len(chunk), n_lines, invalid, cut)


def _decode(chunk: bytes, source: Source, strict: bool) -> tuple[str, int]:
    try:
        return decode(chunk, strict=strict)
    except UnicodeDecodeError as e:
        raise UserError(f"{fs.redact(source.url)}: invalid UTF-8 ({chunk[e.start : e.start + 4].hex(' ')}…); --clean strict "
                        "refuses it: repair the file, or use --clean standard to replace such bytes") from e  # fmt: skip


def _chunks_of(piece: Piece, boundary: re.Pattern[bytes]) -> Iterator[tuple[bytes, bool]]:
    """The piece's records as (whole records, whether the last one was cut) of bounded size."""
    source = piece.source
    with Unpacked(source.url, source.compression) as f:
        if not source.divisible:
            yield from _whole_records(_chunks(f, piece.limit, boundary), piece.limit, boundary)
            return
        first = _record_start(f, piece.start, source, boundary)
        last = _record_start(f, piece.stop, source, boundary)
        f.seek(first)
        got = 0
        for chunk, cut in _chunks(f, last - first, boundary):
            got += len(chunk)
            yield chunk, cut
        if got < last - first:
            raise StoreError(f"{fs.redact(source.url)}: shrank while it was read: put the whole file back, "
                             "then run the same command with --resume")  # fmt: skip


def _whole_records(
    chunks: Iterator[tuple[bytes, bool]], limit: int | None, boundary: re.Pattern[bytes]
) -> Iterator[tuple[bytes, bool]]:
    """The chunks without the record that a `limit` of bytes has cut off."""
    got = 0
    for chunk, cut in chunks:
        got += len(chunk)
        yield (chunk[: _last_end(chunk, boundary) or None] if got == limit else chunk), cut


def _record_start(f: Unpacked, at: int, source: Source, boundary: re.Pattern[bytes]) -> int:
    """The first record start at or after byte `at`: a function of the file and `at` alone, so neighbours agree."""
    if at <= 0 or at >= source.size:
        return min(max(at, 0), source.size)
    position = max(at - BOUNDARY_BYTES, 0)
    f.seek(position)
    buffer = b""
    while True:
        more = f.read(1 << 20 if buffer else 1 << 16)
        buffer += more
        for m in boundary.finditer(buffer):
            if position + m.end() >= at:
                return position + m.end()
        if not more:
            return source.size
        position += max(len(buffer) - BOUNDARY_BYTES, 0)
        buffer = buffer[-BOUNDARY_BYTES:]


def _chunks(f: Unpacked, n_bytes: int | None, boundary: re.Pattern[bytes]) -> Iterator[tuple[bytes, bool]]:
    """The next `n_bytes` (None: all), which begin with a record, in chunks of whole records.

    A record longer than MAX_RECORD_BYTES is cut at multiples of that from its own beginning: the same in any range.
    """
    left = n_bytes if n_bytes is not None else 1 << 62
    if left <= MAX_RECORD_BYTES:  # all but a few ranges: nothing in it can be too long
        if chunk := f.read(left):
            yield chunk, False
        return
    buffer = b""
    while True:
        more = f.read(min(corpus.TASK_BYTES, left))
        left -= len(more)
        buffer += more
        while len(buffer) > MAX_RECORD_BYTES and not _ends_within(buffer, MAX_RECORD_BYTES, boundary):
            cut = _character_start(buffer, MAX_RECORD_BYTES)
            yield buffer[:cut], True
            buffer = buffer[cut:]
        if not more:
            break
        if end := _last_end(buffer, boundary):
            yield buffer[:end], False
            buffer = buffer[end:]
    if buffer:
        yield buffer, False


def _ends_within(buffer: bytes, limit: int, boundary: re.Pattern[bytes]) -> bool:
    m = boundary.search(buffer)
    return m is not None and m.end() <= limit


def _last_end(buffer: bytes, boundary: re.Pattern[bytes]) -> int:
    """Where the last record that ends in the buffer does; 0 when none does. Near the end in all but odd files."""
    for start in (max(len(buffer) - (1 << 20), 0), 0):
        if ends := [m.end() for m in boundary.finditer(buffer, start)]:
            return ends[-1]
    return 0


def _character_start(buffer: bytes, at: int) -> int:
    while at > 1 and buffer[at] & 0xC0 == 0x80:  # inside a UTF-8 character
        at -= 1
    return at


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
        batch.documents.append(_document_of(row, fields, number))
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
                batch.documents.append(_document_of(record, fields, number))
                batch.text_bytes += _said(batch.documents[-1])
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
