"""The files that make a corpus, found at any path, folder, glob or URL, and planned as tasks independent of each other.

A plan is a list of tasks in a fixed order. A task is a byte range of one file, or many small files. Some files cannot
be entered in the middle (compressed ones, tables with quotes): each is one range.
"""

import concurrent.futures
from collections.abc import Sequence
from dataclasses import dataclass

import xxhash

from cli.errors import UserError
from prep import tables
from prep.compression import Compression, Unpacked, compression_of
from prep.formats import BOUNDARY, KNOWN_FIELDS, RECORDS, Fields, Kind, decode, kind_of, known_fields
from store import fs
from store.errors import StoreError

TASK_BYTES = 8 << 20  # two of these in work fit any memory; smaller ones only multiply files (12 GB: 1,500 tasks)
SNIFF_BYTES = 256 << 10
MAX_GROUPS = (
    64  # more inputs than these are what a shell made of one glob: one group, else each would be a task and a row
)
SAMPLES, SAMPLE_BYTES = 16, 4 << 10  # of a file's bytes, for its fingerprint

PACKED = (".gz", ".bz2", ".xz", ".zst")
SUFFIXES = (".txt", ".text", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".json")
IN_FOLDERS = SUFFIXES[:-1]  # a folder's .json files are more often about the data than data
BINARY = {
    b"PK\x03\x04": "a zip archive: unpack it first",
    b"%PDF": "a PDF: extract its text first",
    b"\xff\xfe": "UTF-16: iconv -f UTF-16 -t UTF-8",
    b"\xfe\xff": "UTF-16: iconv -f UTF-16 -t UTF-8",
}


@dataclass(frozen=True)
class Source:
    """One input file: size in stored bytes, what it is packed with, what it holds."""

    url: str
    size: int
    compression: Compression | None
    kind: Kind
    fingerprint: str  # of some of its bytes: a resumed run must not mix two versions of a file
    group: int = 0  # which of the inputs, in the order of the command line, it came from

    @property
    def divisible(self) -> bool:
        """True where reading can begin in the middle."""
        return self.compression is None and self.kind in (*BOUNDARY, "parquet")


@dataclass(frozen=True)
class Piece:
    """Bytes [start, stop) of a source. One that is not divisible is one piece, of about `limit` unpacked bytes."""

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


# ---- finding --------------------------------------------------------------------------------------------------------


def find_sources(inputs: Sequence[str], fields: Fields = KNOWN_FIELDS, *, grouped: bool = False) -> list[Source]:
    """The files that paths, folders, globs and URLs name, each once, in name order within each input.

    `grouped` inputs stay apart however many they are. Raises UserError for nothing found, and for empty, binary or
    unusable files.
    """
    grouped = grouped or len(inputs) <= MAX_GROUPS
    found: dict[str, tuple[int, int]] = {}
    for number, url in enumerate(inputs):
        for name, size in _usable_files(url):
            found.setdefault(name, (size, number if grouped else 0))
    for name in found:
        if not name.isascii() and name != name.encode(errors="replace").decode():  # a name of lone surrogates
            raise UserError(f"{fs.redact(ascii(name))}: its name is not UTF-8: rename the file")
    files = [(url, size, group, fields) for url, (size, group) in found.items() if size > 0]
    if not files:
        raise UserError(f"{', '.join(map(fs.redact, inputs))}: the corpus is empty (0 bytes)")
    with concurrent.futures.ThreadPoolExecutor(16) as threads:  # a bucket answers in 50 ms: ten thousand files in 30 s
        sources = list(threads.map(lambda file: _inspect(*file), files))
    if fields != KNOWN_FIELDS and not any(s.kind in RECORDS for s in sources):
        raise UserError(f"{fs.redact(sources[0].url)}: is text, without fields: leave --text-field, --user-field and "
                        "--assistant-field out")  # fmt: skip
    return sources


def address(url: str) -> str:
    """Where an input is: a bare name on the Hugging Face hub is a dataset here, where their own URLs mean a model."""
    if url.startswith("hf://") and url.split("/")[2] not in ("datasets", "buckets", "spaces"):
        return "hf://datasets/" + url.removeprefix("hf://")
    return url


def _usable_files(url: str) -> list[tuple[str, int]]:
    """(URL, bytes) of the files an input names: any that is named itself, those of known kinds in folders and globs."""
    url = address(url)
    files = fs.find_files(url)
    if len(files) == 1 and files[0][0].rsplit("/", 1)[-1] == url.rstrip("/").rsplit("/", 1)[-1]:
        return files
    suffixes = SUFFIXES if any(c in url for c in "*?[") else IN_FOLDERS
    usable = [(name, size) for name, size in files if _suffix(name) in suffixes and "/cache-" not in name]
    if not usable:
        others = f"; it holds {files[0][0].rsplit('/', 1)[-1]}" if files else ""
        raise UserError(f"{fs.redact(url)}: no text found there; expected {', '.join(suffixes)} "
                        f"(also {', '.join(PACKED)}){others}")  # fmt: skip
    return usable


def _suffix(url: str) -> str:
    """The suffix that tells what a file holds: "a.jsonl.gz" -> ".jsonl"."""
    name = fs.redact(url).rsplit("/", 1)[-1].lower()
    name = next((name.removesuffix(p) for p in PACKED if name.endswith(p)), name)
    return "." + name.rsplit(".", 1)[-1] if "." in name else ""


def _inspect(url: str, size: int, group: int, fields: Fields) -> Source:
    try:
        with Unpacked(url, None) as f:
            head = f.read(SNIFF_BYTES)
    except StoreError as e:
        if "range requests" not in str(e):  # fsspec's words
            raise
        raise UserError(f"{fs.redact(url)}: this server sends whole files only: download it first, or pipe it: "
                        "curl … | python prep/tokenize_bpe.py --input - --output …") from e  # fmt: skip
    fingerprint = _fingerprint(url, size, head)
    compression = compression_of(head)
    if compression:
        with Unpacked(url, compression) as f:
            head = f.read(SNIFF_BYTES)
    kind = kind_of(_suffix(url), head)
    source = Source(url, size, compression, kind, fingerprint, group)
    if kind in ("parquet", "arrow"):
        if compression:
            raise UserError(f"{fs.redact(url)}: a {kind} file is packed inside: unpack this one first")
        with tables.opened(url) as file:
            _check_columns(url, tables.column_names(file, kind), fields)
        return source
    _refuse_binary(url, head[: 1 << 16])
    if kind == "csv":
        _check_columns(url, tables.csv_columns(decode(head)[0].removeprefix("\ufeff")), fields)
    if kind is None:
        raise UserError(f"{fs.redact(url)}: neither an array of records nor one record a line: convert it to .jsonl")
    return source


def _fingerprint(url: str, size: int, head: bytes) -> str:
    """A hash of a file's first and last bytes and of samples between: whatever was rewritten, cut or grown has another.

    Not of its date: a copy that was put back is the same corpus.
    """
    digest = xxhash.xxh3_64(head)
    starts = [size * i // SAMPLES for i in range(1, SAMPLES)] if size > 2 * SNIFF_BYTES else []
    for start, stop in [*((s, s + SAMPLE_BYTES) for s in starts), (max(size - SNIFF_BYTES, SNIFF_BYTES), size)]:
        if start < stop:
            digest.update(fs.read_bytes(url, start, stop))
    return digest.hexdigest()


def _refuse_binary(url: str, head: bytes) -> None:
    odd = sum(head.count(bytes([c])) for c in (*range(9), *range(14, 27), *range(28, 32), 127))
    what = next((text for magic, text in BINARY.items() if head.startswith(magic)), None)
    if b"\r" in head and b"\n" not in head and not odd:
        raise UserError(f"{fs.redact(url)}: its lines end as on an old Mac: tr '\\r' '\\n' < FILE > NEW, and give that")
    if head[257:262] == b"ustar":
        what = "a tar archive: unpack it first"
    if what or odd > len(head) * 0.02:
        what = what or f"{odd} control bytes in the first {len(head)}: convert it first, e.g. iconv -f UTF-16 -t UTF-8"
        raise UserError(f"{fs.redact(url)}: looks binary, not UTF-8 text ({what})")


def _check_columns(url: str, names: list[str], fields: Fields) -> None:
    if not known_fields(names, fields):
        raise UserError(f"{fs.redact(url)}: no text in its columns {', '.join(names)[:200]}: name the right one with "
                        "--text-field, or two with --user-field and --assistant-field")  # fmt: skip


# ---- planning -------------------------------------------------------------------------------------------------------


def plan(sources: list[Source], limit: int | None = None) -> list[Task]:
    """Cut sources into tasks, in order; `limit` stops after about that many bytes of text, for a trial."""
    pieces: list[Piece] = []
    left = limit if limit is not None else sum(s.size for s in sources)
    for source in sources:
        size = min(source.size, left)
        step = TASK_BYTES if source.divisible else source.size
        unpacked = left if limit is not None and not source.divisible else None
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
