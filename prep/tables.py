"""Rows of CSV, Parquet and Arrow files and the elements of a JSON array, some at a time."""

import contextlib
import csv
import importlib.util
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

from cli.errors import UserError
from prep.formats import load_json
from store import fs
from store.errors import StoreError

MAX_FIELD_CHARS = 16 << 20  # a quote that never closes takes no more than this with it
BATCH_BYTES = 4 << 20  # of a table's text at once; a row that is larger comes alone

BROKEN = "a row that cannot be read"
Row = dict[str, Any] | str  # by column name, or BROKEN


# ---- CSV ------------------------------------------------------------------------------------------------------------


def delimiter_of(header: str) -> str:
    """What separates the columns of a CSV file, seen in its first line."""
    return max(",;\t", key=header.count)


def csv_rows(lines: Iterable[str]) -> Iterator[tuple[int, Row]]:
    """(number of its last line, row by column name) for each row after the header; quoted fields may hold line breaks."""
    csv.field_size_limit(MAX_FIELD_CHARS)
    lines = iter(lines)
    first = next(lines, "")
    header = next(csv.reader([first], delimiter=delimiter_of(first)), [])
    reader = csv.reader(lines, delimiter=delimiter_of(first))
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error:  # a field over the limit: the reader goes on with the next line
            row = [""]
        if row:
            yield reader.line_num + 1, dict(zip(header, row, strict=True)) if len(row) == len(header) else BROKEN


def csv_columns(head: str) -> list[str]:
    """The column names in a CSV file's first line."""
    first = head.split("\n", 1)[0]
    return next(csv.reader([first], delimiter=delimiter_of(first)), [])


# ---- Parquet and Arrow ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def opened(url: str) -> Iterator[BinaryIO]:
    """A Parquet or Arrow file, to be read in any order. Raises UserError where pyarrow is missing or finds it damaged."""
    if importlib.util.find_spec("pyarrow") is None:
        raise UserError(f"{fs.redact(url)}: Parquet and Arrow files need pyarrow: pip install pyarrow")
    import pyarrow

    with fs.open_stream(url) as file:
        try:
            yield file
        except (pyarrow.ArrowException, OSError) as e:
            if getattr(e, "errno", None):
                raise StoreError(f"{fs.redact(url)}: cannot read ({e}): when it is back, "
                                 "run the same command with --resume") from e  # fmt: skip
            raise UserError(f"{fs.redact(url)}: cannot be read ({str(e).splitlines()[0][:200]}): "
                            "the file is damaged") from e  # fmt: skip


def column_names(file: BinaryIO, kind: str) -> list[str]:
    """The top-level columns of a Parquet or Arrow file."""
    return _parquet(file).schema_arrow.names if kind == "parquet" else _arrow_reader(file).schema.names


def column_rows(file: BinaryIO, kind: str, start: int, stop: int, columns: list[str]) -> Iterator[list[Row]]:
    """The rows of a Parquet file's row groups that begin in the bytes [start, stop), or of an Arrow file, in batches."""
    return _parquet_rows(file, start, stop, columns) if kind == "parquet" else _arrow_rows(file, columns)


def _parquet(file: BinaryIO) -> Any:
    import pyarrow.parquet

    file.seek(0)
    return pyarrow.parquet.ParquetFile(file, buffer_size=1 << 20)  # columns in pieces, not whole row groups at once


def _parquet_rows(file: BinaryIO, start: int, stop: int, columns: list[str]) -> Iterator[list[Row]]:
    parquet = _parquet(file)
    for number in range(parquet.num_row_groups):
        group = parquet.metadata.row_group(number)
        chunks = [group.column(i) for i in range(group.num_columns)]
        offset = min((c.dictionary_page_offset or c.data_page_offset for c in chunks), default=0)
        if start <= offset < stop:
            row_bytes = sum(c.total_uncompressed_size for c in chunks) // max(group.num_rows, 1)
            rows = max(min(BATCH_BYTES // max(row_bytes, 1), 4096), 1)
            for batch in parquet.iter_batches(rows, [number], columns, use_threads=False):
                yield _to_rows(batch)


def _arrow_rows(file: BinaryIO, columns: list[str]) -> Iterator[list[Row]]:
    for batch in _arrow_reader(file):
        batch = batch.select(columns)
        rows = max(min(BATCH_BYTES * batch.num_rows // max(batch.nbytes, 1), 4096), 1)
        for at in range(0, batch.num_rows, rows):
            yield _to_rows(batch.slice(at, rows))


def _arrow_reader(file: BinaryIO) -> Any:
    import pyarrow

    file.seek(0)
    magic = file.read(6)
    file.seek(0)
    if magic != b"ARROW1":  # a stream, as Hugging Face's save_to_disk writes
        return pyarrow.ipc.open_stream(file)
    whole = pyarrow.ipc.open_file(file)
    batches = (whole.get_batch(i) for i in range(whole.num_record_batches))
    return pyarrow.RecordBatchReader.from_batches(whole.schema, batches)


def _to_rows(batch: Any) -> list[Row]:
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:  # a string column may hold any bytes
        if batch.num_rows == 1:
            return [BROKEN]
        return [row for i in range(batch.num_rows) for row in _to_rows(batch.slice(i, 1))]


# ---- a JSON array ---------------------------------------------------------------------------------------------------


_OPENED, _SPACE, _AFTER = re.compile(r"[\s\ufeff]*\["), re.compile(r"\s*"), re.compile(r"\s*([,\]])")


def json_array(pieces: Iterator[str], max_chars: int = MAX_FIELD_CHARS) -> Iterator[Any]:
    """The elements of one JSON array given as text in pieces, held one at a time. Raises ValueError where it is broken."""
    decoder, text, expected = json.JSONDecoder(), "", "["
    for piece in itertools.chain(pieces, [""]):
        text += piece
        if expected == "[" and (m := _OPENED.match(text)):
            text, expected = text[m.end() :], "element"
        at = 0
        while expected == "element":
            at = _SPACE.match(text, at).end()
            if text[at : at + 1] == "]":
                return
            try:
                end = decoder.raw_decode(text, at)[1]
            except RecursionError as e:
                raise ValueError("nested too deeply") from e
            except ValueError:
                if not piece or len(text) - at > max_chars:
                    raise
                break  # only its beginning has come
            if not (m := _AFTER.match(text, end)):
                break  # a number may still go on
            yield load_json(text[at:end])
            if m[1] == "]":
                return
            at = m.end()
        text = text[at:]
    raise ValueError("not an array, or one that does not end")
