"""Documents from any file, folder, glob or URL, planned as byte ranges that are independent of each other.

A plan is a list of tasks in a fixed order. A task is a byte range of one file, or many small files; a record belongs to
the range it begins in, so that every record is read exactly once whatever the ranges. Compressed files cannot be
entered in the middle: each is one range.
"""

import bz2
import gzip
import json
import lzma
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, Literal

import xxhash
import zstandard

from cli.errors import UserError
from store import fs

TASK_BYTES = 8 << 20  # two of these in work fit any memory; smaller ones only multiply files (12 GB: 1,500 tasks)
MAX_CHUNK_BYTES = 8 * TASK_BYTES  # a longer record is cut: nothing of unknown size is ever held in memory
PLAIN_DOCUMENT_BYTES = 16 << 10  # paragraphs of plain text are joined up to this: about four blocks of 1,024 tokens
SNIFF_BYTES = 256 << 10

Kind = Literal["chat", "plain", "jsonl"]
Document = list[tuple[str | None, str]]  # turns of (role, text); role None is plain text

COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}
TEXT_SUFFIXES, JSON_SUFFIXES = (".txt", ".text"), (".jsonl", ".ndjson")  # in folders and globs; a named file may be any
ROLE_OF = {"user": "user", "human": "user", "assistant": "assistant", "bot": "assistant", "system": "system"}
# the run of blanks is bounded so that a boundary can be found from a fixed distance before it
BOUNDARY = {
    # not before an assistant's label: an answer may stand an empty line below its question
    "chat": re.compile(rb"\n[ \t\r]{0,16}\n(?=(?:user|human|system)[ \t]*:)", re.IGNORECASE),
    "plain": re.compile(rb"\n[ \t\r]{0,16}\n"),
    "jsonl": re.compile(rb"\n"),
}
LOOKAROUND = 64  # bytes that hold any boundary with its label


@dataclass(frozen=True)
class Source:
    """One input file: size in stored bytes, compression by its name, kind by its name and first bytes."""

    url: str
    size: int
    compression: str | None
    kind: Kind
    head_xxh3: str  # of the first text: a resumed run must not mix two versions of a file
    group: int = 0  # which of the inputs, in the order of the command line, it came from


@dataclass(frozen=True)
class Piece:
    """Bytes [start, stop) of a source. A compressed source is one piece, of at most `limit` unpacked bytes."""

    source: Source
    start: int
    stop: int
    limit: int | None = None


@dataclass(frozen=True)
class Task:
    """Work of about TASK_BYTES: one piece of a large file, or many small files of one group together."""

    index: int
    pieces: tuple[Piece, ...]

    @property
    def group(self) -> int:
        """Which of the inputs all its pieces came from."""
        return self.pieces[0].source.group

    @property
    def size(self) -> int:
        """Stored bytes."""
        return sum(p.stop - p.start for p in self.pieces)


# ---- planning -------------------------------------------------------------------------------------------------------


def find_sources(inputs: tuple[str, ...]) -> list[Source]:
    """The files that paths, folders, globs and URLs name, each once, in name order within each input.

    Raises UserError for nothing found, empty or binary files.
    """
    found: dict[str, tuple[int, int]] = {}
    for group, url in enumerate(inputs):
        files = fs.find_files(url)
        explicit = len(files) == 1 and files[0][0].rstrip("/").endswith(url.rstrip("/").split("://")[-1].split("/")[-1])
        usable = files if explicit else [f for f in files if _split_name(f[0])[1] in (*TEXT_SUFFIXES, *JSON_SUFFIXES)]
        if not usable:
            known = ", ".join((*TEXT_SUFFIXES, *JSON_SUFFIXES))
            raise UserError(
                f"{fs.redact(url)}: no text found there; expected {known} files (also {', '.join(COMPRESSIONS)})"
            )
        for name, size in usable:
            found.setdefault(name, (size, group))
    sources = [_inspect(url, size, group) for url, (size, group) in found.items() if size > 0]
    if not sources:
        raise UserError(f"{', '.join(map(fs.redact, inputs))}: the corpus is empty (0 bytes)")
    return sources


def _split_name(url: str) -> tuple[str | None, str]:
    """(compression, suffix before it): "a.jsonl.gz" -> ("gzip", ".jsonl")."""
    name = url.rsplit("/", 1)[-1].lower()
    compression = next((c for s, c in COMPRESSIONS.items() if name.endswith(s)), None)
    name = name.rsplit(".", 1)[0] if compression else name
    return compression, "." + name.rsplit(".", 1)[-1] if "." in name else ""


def _inspect(url: str, size: int, group: int) -> Source:
    compression, suffix = _split_name(url)
    with _open(url, compression) as f:
        head = _read_up_to(f, SNIFF_BYTES, url)
    odd = sum(head[: 1 << 16].count(bytes([c])) for c in (*range(9), *range(14, 27), *range(28, 32), 127))
    if odd > len(head[: 1 << 16]) * 0.02:
        raise UserError(f"{fs.redact(url)}: looks binary, not UTF-8 text ({odd} control bytes in the first "
                        f"{len(head[: 1 << 16])}); convert it first, e.g. iconv -f UTF-16 -t UTF-8")  # fmt: skip
    head_xxh3 = xxhash.xxh3_64_hexdigest(head)
    if suffix in JSON_SUFFIXES:
        return Source(url, size, compression, "jsonl", head_xxh3, group)
    blocks = [b for b in re.split(rb"\n[ \t\r]*\n", head) if b.strip()]
    labelled = sum(
        role_and_text(b[:64].decode(errors="replace").lstrip("\ufeff \t\r\n"))[0] is not None for b in blocks
    )
    kind = "chat" if labelled * 2 >= max(len(blocks), 1) else "plain"
    return Source(url, size, compression, kind, head_xxh3, group)


def plan(sources: list[Source], limit: int | None = None) -> list[Task]:
    """Cut sources into tasks, in order; `limit` stops after about that many bytes of text, for a trial."""
    pieces: list[Piece] = []
    left = limit if limit is not None else sum(s.size for s in sources)
    for source in sources:
        size = min(source.size, left)
        step = TASK_BYTES if source.compression is None else source.size
        unpacked = left if limit is not None and source.compression else None
        pieces += [Piece(source, start, min(start + step, size), unpacked) for start in range(0, size, step)]
        left -= size
    tasks: list[Task] = []
    together: list[Piece] = []
    for piece in pieces:
        full = sum(p.stop - p.start for p in together) + piece.stop - piece.start > TASK_BYTES
        if together and (full or together[0].source.group != piece.source.group):
            tasks.append(Task(len(tasks), tuple(together)))
            together = []
        together.append(piece)
    return [*tasks, Task(len(tasks), tuple(together))] if together else tasks


# ---- reading a task -------------------------------------------------------------------------------------------------


def _open(url: str, compression: str | None) -> BinaryIO:
    f = fs.open_stream(url)
    if compression == "gzip":
        return gzip.GzipFile(fileobj=f)
    if compression == "bz2":
        return bz2.BZ2File(f)
    if compression == "xz":
        return lzma.LZMAFile(f)
    if compression == "zstd":
        return _ZstdFile(f)
    return f


class _ZstdFile:
    """Reads zstd frames one after another. Unlike zstandard's stream_reader it notices a file that was cut off."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.frame, self.ready = file, None, b""
        self.decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)  # as `zstd --long=31` may need

    def read(self, n: int) -> bytes:
        while not self.ready:
            # few stored bytes at once: a bomb's 16 KiB can unpack to half a gigabyte, no more
            stored = (self.frame.unused_data if self.frame and self.frame.eof else b"") or self.file.read(1 << 14)
            if self.frame is None or self.frame.eof:
                if not stored:
                    return b""
                self.frame = self.decompressor.decompressobj()
            elif not stored:
                raise EOFError("cut off inside a zstd frame")
            self.ready = self.frame.decompress(stored)
        piece, self.ready = self.ready[:n], self.ready[n:]
        return piece

    def __enter__(self) -> "_ZstdFile":
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()


def _read_up_to(f: BinaryIO, n: int, url: str) -> bytes:
    """Up to n bytes; a damaged compressed stream is one clear error."""
    pieces, got = [], 0
    try:
        while got < n and (piece := f.read(min(n - got, 1 << 20))):
            pieces.append(piece)
            got += len(piece)
    except (OSError, EOFError, lzma.LZMAError, zstandard.ZstdError) as e:
        raise UserError(f"{fs.redact(url)}: cannot be decompressed ({e}): the file is damaged or misnamed") from e
    return b"".join(pieces)


def read_chunks(piece: Piece) -> Iterator[bytes]:
    """The piece's records as byte chunks of at most MAX_CHUNK_BYTES, each made of whole records where they fit."""
    source, boundary = piece.source, BOUNDARY[piece.source.kind]
    with _open(source.url, source.compression) as f:
        if source.compression:
            yield from _stream_chunks(f, source.url, boundary, piece.limit)
            return
        first = _record_start(f, piece.start, source, boundary)
        last = _record_start(f, piece.stop, source, boundary)
        f.seek(first)
        while first < last:
            chunk = _read_up_to(f, min(last - first, MAX_CHUNK_BYTES), source.url)
            if not chunk:
                raise UserError(f"{fs.redact(source.url)}: shrank while it was read; start again without --resume")
            first += len(chunk)
            yield chunk


def _record_start(f: BinaryIO, at: int, source: Source, boundary: re.Pattern[bytes]) -> int:
    """The first record start at or after byte `at`: a function of the file and `at` alone, so neighbours agree."""
    if at <= 0 or at >= source.size:
        return min(max(at, 0), source.size)
    position = max(at - LOOKAROUND, 0)
    f.seek(position)
    buffer = b""
    while True:
        piece = _read_up_to(f, 1 << 20 if buffer else 1 << 16, source.url)
        buffer += piece
        for m in boundary.finditer(buffer):
            if position + m.end() >= at:
                return position + m.end()
        if not piece:
            return source.size
        position += max(len(buffer) - LOOKAROUND, 0)
        buffer = buffer[-LOOKAROUND:]


def _stream_chunks(f: BinaryIO, url: str, boundary: re.Pattern[bytes], limit: int | None) -> Iterator[bytes]:
    buffer, left = b"", limit if limit is not None else 1 << 62
    while True:
        piece = _read_up_to(f, min(TASK_BYTES, left), url)
        left -= len(piece)
        buffer += piece
        if not piece:
            break
        cut = max((m.end() for m in boundary.finditer(buffer, max(len(buffer) - (1 << 20), 0))), default=0)
        if cut or len(buffer) >= MAX_CHUNK_BYTES:
            yield buffer[: cut or len(buffer)]
            buffer = buffer[cut or len(buffer) :]
    if buffer:
        yield buffer


# ---- records --------------------------------------------------------------------------------------------------------


def documents(text: str, kind: Kind) -> Iterator[Document | str]:
    """The documents of a chunk's text; a record that cannot be one is given as the reason (a str) instead."""
    text = text.removeprefix("\ufeff")
    if kind == "jsonl":
        for line in text.split("\n"):
            if line.strip():
                yield parse_json(line)
    elif kind == "chat":
        yield from _conversations(text)
    else:
        yield from _passages(text)


def _blocks(text: str) -> list[str]:
    return [b for b in re.split(r"\n[ \t\r]*\n", text) if b and not b.isspace()]


def _conversations(text: str) -> Iterator[Document]:
    """Blank-line separated blocks of labelled turns.

    A block without any label goes on with the turn before it: replies of several paragraphs are common. A block whose
    first line alone lacks a label has lost it: the line was said by whoever does not speak next.
    """
    current: Document = []
    for block in _blocks(text):
        turns: list[tuple[str | None, list[str]]] = []
        for line in block.strip().split("\n"):
            role, said = role_and_text(line)
            if role is not None or not turns:
                turns.append((role, [said]))
            else:
                turns[-1][1].append(line)
        document = [(role, "\n".join(lines).strip()) for role, lines in turns]
        lead_role, lead = document[0]
        if lead_role is None and len(document) == 1 and current:
            role, said = current[-1]
            current[-1] = (role, f"{said}\n\n{lead}")
            continue
        if lead_role is None and len(document) > 1:
            document[0] = ("assistant" if document[1][0] == "user" else "user", lead)
        if current and lead_role == "assistant" and current[-1][0] == "user":
            current += document
            continue
        if current:
            yield current
        current = document
    if current:
        yield current


def role_and_text(line: str) -> tuple[str | None, str]:
    """("user", "Hi") for "User: Hi"; (None, the line) where no label begins it. Labels in any case."""
    label, colon, rest = line.partition(":")
    role = ROLE_OF.get(label.rstrip(" \t").lower()) if colon and len(label) < 16 else None
    return (role, rest.lstrip(" \t")) if role else (None, line)


def _passages(text: str) -> Iterator[Document]:
    """Plain text: consecutive paragraphs, joined until a document is PLAIN_DOCUMENT_BYTES long."""
    passage: list[str] = []
    length = 0
    for block in _blocks(text):
        passage.append(block)
        length += len(block)
        if length >= PLAIN_DOCUMENT_BYTES:
            yield [(None, "\n\n".join(passage))]
            passage, length = [], 0
    if passage:
        yield [(None, "\n\n".join(passage))]


def parse_json(line: str) -> Document | str:
    """One JSONL record: `{"messages": [{"role", "content"}…]}` or `{"text": …}`; else the reason it is neither."""
    try:
        record = json.loads(line)
        if "\\u" in line:  # JSON can spell half a surrogate pair, which no UTF-8 can hold: it becomes U+FFFD
            record = json.loads(
                json.dumps(record, ensure_ascii=False).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            )
    except (ValueError, RecursionError):
        return "broken_json"
    if isinstance(record, dict) and isinstance(record.get("messages"), list):
        turns: Document = []
        for message in record["messages"]:
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                return "bad_message"
            content = message.get("content")
            if isinstance(content, list):  # OpenAI's parts: the text ones
                content = "".join(str(p.get("text", "")) for p in content if isinstance(p, dict))
            if message["role"].lower() not in ROLE_OF:
                return "unknown_role"
            turns.append((ROLE_OF[message["role"].lower()], content if isinstance(content, str) else ""))
        return turns
    if isinstance(record, dict) and isinstance(record.get("text"), str):
        return [(None, record["text"])]
    return "no_text_field"


def decode(chunk: bytes, *, strict: bool, where: str) -> tuple[str, int]:
    """(text, number of invalid sequences replaced by U+FFFD). Raises UserError on the first one if `strict`."""
    try:
        return str(chunk, "utf-8"), 0
    except UnicodeDecodeError as e:
        if strict:
            raise UserError(f"{where}: invalid UTF-8 ({chunk[e.start : e.start + 4].hex(' ')}…); --clean strict refuses it: "
                            "repair the file, or use --clean standard to replace such bytes") from e  # fmt: skip
        genuine = chunk.count("\ufffd".encode())
        text = chunk.decode("utf-8", "replace")
        return text, text.count("\ufffd") - genuine
