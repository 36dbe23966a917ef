"""What passes between preparation's stages: one file per task and stage, committed whole, skipped when found valid.

A cleaned part holds documents as arrays: the UTF-8 of all turns with a separator after each, the length and role of each
turn, the turns of each document and its 64-bit hash. An encoded part holds documents in the order of their place in the dataset, so that
every output shard is one slice of every part. All are .npy, of numbers alone: nothing executable.
"""

import contextlib
import dataclasses
import functools
import io
import itertools
import json
import os
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import xxhash
import zstandard

from prep.formats import ROLE_INDEX, ROLES, Document
from store.errors import DataError, StoreError

T = TypeVar("T")
Proof = dict[str, list]  # file name: [bytes, xxh3 of them]

SEPARATOR = b" ZQ000"  # with it a stretch of the text is what the encoder takes as one string: prep/encode.py tells why
PACKED = 1  # zstd level for text: to 40 % at 300 MB/s, where it would not all fit the disk otherwise


@dataclass
class Gathered:
    """Documents on their way into arrays."""

    said: list[bytes] = field(default_factory=list)  # UTF-8 of each turn
    roles: bytearray = field(default_factory=bytearray)  # index into ROLES of each turn
    doc_turns: list[int] = field(default_factory=list)  # turns of each document

    def __len__(self) -> int:
        return len(self.doc_turns)

    def __iter__(self) -> Iterator[Document]:
        """Each document as turns of (role, text)."""
        ends = itertools.accumulate(self.doc_turns, initial=0)
        for a, b in itertools.pairwise(ends):
            yield [(ROLES[role], said.decode()) for role, said in zip(self.roles[a:b], self.said[a:b], strict=True)]

    def first_turns(self) -> np.ndarray:
        """(documents,) int64: where each document begins among the turns."""
        turns = np.array(self.doc_turns, np.int64)
        return np.cumsum(turns) - turns

    def add(self, document: Document) -> None:
        """Take another document, of turns of (role, text)."""
        self.said += [text.encode() for _, text in document]
        self.roles += bytes([ROLE_INDEX[role] for role, _ in document])
        self.doc_turns.append(len(document))

    def extend(self, other: "Gathered") -> None:
        """Take all of another's documents."""
        self.said += other.said
        self.roles += other.roles
        self.doc_turns += other.doc_turns

    def runs(self, flags: np.ndarray) -> Iterator[tuple[bool, "Gathered"]]:
        """(flag, documents in a row that have it), in order; `flags` (documents,) bool."""
        begins = np.flatnonzero(np.diff(flags, prepend=~flags[:1]))
        turn_at = list(itertools.accumulate(self.doc_turns, initial=0))
        for first, last in itertools.pairwise([*begins.tolist(), len(flags)]):
            turns = slice(turn_at[first], turn_at[last])
            yield bool(flags[first]), Gathered(self.said[turns], self.roles[turns], self.doc_turns[first:last])

    def documents(self) -> "Documents":
        """Arrays of all of them."""
        # 0xff occurs in no UTF-8: different turns can never join to the same bytes
        roles = bytes(self.roles)
        hashes = [
            xxhash.xxh3_64_intdigest(b"\xff".join((*self.said[a:b], roles[a:b])))
            for a, b in itertools.pairwise(itertools.accumulate(self.doc_turns, initial=0))
        ]
        return Documents(
            np.frombuffer(separated(self.said), np.uint8),
            np.fromiter(map(len, self.said), np.uint32, len(self.said)),
            np.frombuffer(roles, np.uint8),
            np.array(self.doc_turns, np.uint32),
            np.array(hashes, np.uint64),
        )


@dataclass
class Documents:
    """Cleaned documents of one part."""

    text: np.ndarray  # (bytes,) uint8, all turns end to end, SEPARATOR after each
    turn_bytes: np.ndarray  # (turns,) uint32, without separators
    turn_role: np.ndarray  # (turns,) uint8, index into ROLES
    doc_turns: np.ndarray  # (documents,) uint32
    doc_hash: np.ndarray  # (documents,) uint64

    @classmethod
    def build(cls, documents: Iterable[Document]) -> "Documents":
        """Arrays of documents given as turns of (role, text)."""
        gathered = Gathered()
        for document in documents:
            gathered.add(document)
        return gathered.documents()

    def select(self, keep: np.ndarray) -> "Documents":
        """Only the documents where `keep`, (documents,) bool, is true."""
        if keep.all():
            return self
        chosen = self.select_turns(np.repeat(keep, self.doc_turns))
        return dataclasses.replace(chosen, doc_turns=self.doc_turns[keep], doc_hash=self.doc_hash[keep])

    def select_turns(self, keep: np.ndarray) -> "Documents":
        """Only the turns where `keep`, (turns,) bool, is true; documents may be left without any."""
        of_document = np.repeat(np.arange(len(self.doc_turns)), self.doc_turns)
        return Documents(
            self.text[np.repeat(keep, np.diff(self.turn_at()))],
            self.turn_bytes[keep],
            self.turn_role[keep],
            np.bincount(of_document[keep], minlength=len(self.doc_turns)).astype(np.uint32),
            self.doc_hash,
        )

    def blocks(self, n_bytes: int) -> Iterator["Documents"]:
        """The documents in order, about `n_bytes` of text at a time, at least one document; views, not copies."""
        doc_turn = np.append(0, np.cumsum(self.doc_turns, dtype=np.int64))  # where each document begins among the turns
        doc_at = self.turn_at()[doc_turn]
        first = 0
        while first < len(self.doc_turns):
            last = max(int(np.searchsorted(doc_at, doc_at[first] + n_bytes, "right")) - 1, first + 1)
            turns, docs = slice(doc_turn[first], doc_turn[last]), slice(first, last)
            yield Documents(self.text[doc_at[first] : doc_at[last]], self.turn_bytes[turns], self.turn_role[turns],
                            self.doc_turns[docs], self.doc_hash[docs])  # fmt: skip
            first = last

    def text_bytes(self) -> int:
        """Bytes of the text of all turns."""
        return int(self.turn_bytes.sum(dtype=np.int64))

    def turn_at(self) -> np.ndarray:
        """(turns + 1,) int64: where each turn begins in `text`."""
        return turn_begins(self.turn_bytes)

    def turns(self) -> list[str]:
        """The text of every turn."""
        return turn_texts(self.text, self.turn_bytes)


@dataclass
class Encoded:
    """Encoded documents of one part, in ascending order of `place`."""

    place: np.ndarray  # (documents,) uint64
    tokens: np.ndarray  # (documents,) uint32, ids per document
    ids: np.ndarray  # (sum of tokens,) uint16 or uint32, documents end to end


def separated(said: Iterable[bytes]) -> bytes:
    """Text as `Documents` have it, of the UTF-8 of turns."""
    return SEPARATOR.join([*said, b""])


def turn_begins(turn_bytes: np.ndarray) -> np.ndarray:
    """(turns + 1,) int64: where each turn begins in text as `Documents` have it."""
    return np.append(0, np.cumsum(turn_bytes + np.int64(len(SEPARATOR))))


def turn_texts(text: bytes | np.ndarray, turn_bytes: np.ndarray) -> list[str]:
    """Each turn of text as `Documents` have it."""
    begins, blob = turn_begins(turn_bytes)[:-1], memoryview(text)
    return [str(blob[a:b], "utf-8") for a, b in zip(begins.tolist(), (begins + turn_bytes).tolist(), strict=True)]


def save_documents(path: Path, documents: Documents, level: int | None = PACKED) -> Proof:
    """Publish a cleaned part and its index."""
    turn_ends = np.cumsum(documents.doc_turns, dtype=np.int64)
    text_ends = np.append(0, np.cumsum(documents.turn_bytes, dtype=np.int64))[turn_ends]  # without separators
    index = np.stack([documents.doc_hash, np.diff(text_ends, prepend=0).astype(np.uint64)])
    return save_arrays(path, documents, level) | save_array(path.with_suffix(".index.npy"), index)


def load_index(path: Path) -> np.ndarray:
    """(2, documents) uint64 of a cleaned part: hash and text bytes of each document, without reading the text."""
    return np.load(path.with_suffix(".index.npy"), allow_pickle=False)


def load_documents(path: Path) -> Documents:
    """Read a cleaned part back. Raises DataError if it is damaged."""
    return load_arrays(Documents, path)


def save_arrays(path: Path, arrays: Any, level: int | None = PACKED) -> Proof:
    """Publish a dataclass of arrays as one file, .npy after .npy, packed with zstd's `level` or as it is."""
    pieces = itertools.chain.from_iterable(map(_npy, vars(arrays).values()))
    if level is None:
        return _publish(path, pieces)
    compressor = zstandard.ZstdCompressor(level=level, write_checksum=True)
    return _publish(path, [compressor.compress(b"".join(pieces))])


def load_arrays(kind: type[T], path: Path) -> T:
    """What `save_arrays` published, a `kind`. Raises DataError if it is damaged."""
    try:
        with open(path, "rb") as f:
            packed = f.read(len(zstandard.FRAME_HEADER)) == zstandard.FRAME_HEADER
            f.seek(0)
            stored = io.BytesIO(zstandard.ZstdDecompressor().decompress(f.read())) if packed else f
            return kind(*(np.lib.format.read_array(stored, allow_pickle=False) for _ in fields(kind)))
    except (OSError, ValueError, zstandard.ZstdError) as e:
        raise DataError(f"{path}: damaged working file ({e}): delete {path.parent} and run prep again") from e


def save_encoded(path: Path, part: Encoded) -> Proof:
    """Publish an encoded part, uncompressed: every shard reads its own slice of it."""
    saved = [save_array(path.with_suffix(f".{name}.npy"), array) for name, array in vars(part).items()]
    return {name: proof for files in saved for name, proof in files.items()}


def save_array(path: Path, array: np.ndarray) -> Proof:
    """Publish one array as a .npy file."""
    return _publish(path, _npy(array))


def _npy(array: np.ndarray) -> Iterator[bytes | np.ndarray]:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
    yield header.getvalue()
    yield np.ravel(array, "A").view(np.uint8)


def _publish(path: Path, pieces: Iterable[bytes | np.ndarray]) -> Proof:
    """Write a file whole or not at all; hashed on the way, so that it need not be read for that."""
    digest, size = xxhash.xxh3_64(), 0
    # neither fsynced, which took an eighth of the encode pass: the marker's hashes tell what a power cut has taken
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "wb", buffering=0) as f:
            for piece in pieces:
                view = memoryview(piece)
                digest.update(view)
                size += len(view)
                while view:  # a disk that fills up takes a part, then says so
                    view = view[f.write(view) :]
        os.replace(temporary, path)
    except OSError as e:
        raise StoreError(f"{path.parent}: cannot be written ({e.strerror}): free some space, "
                         "then run the same command with --resume") from e  # fmt: skip
    finally:
        with contextlib.suppress(OSError):  # the fault that came first is the one to tell
            temporary.unlink(missing_ok=True)
    return {path.name: [size, digest.hexdigest()]}


def load_places(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """(place, tokens), each (documents,), of an encoded part."""
    return tuple(np.load(path.with_suffix(f".{n}.npy"), allow_pickle=False) for n in ("place", "tokens"))


def read_ids(path: Path, start: int, ids: np.ndarray) -> None:
    """Fill `ids` with the encoded part's ids from the `start`-th on."""
    read_slice(path.with_suffix(".ids.npy"), start, ids)


def read_slice(path: Path, start: int, out: np.ndarray) -> None:
    """Fill `out` with what a saved array of its type holds, read row by row, from the `start`-th value on.

    Read, not mapped: the mapped pages of a thousand parts would count as this process's memory.
    """
    with open(path, "rb") as f:
        f.seek(_header_bytes(path) + start * out.itemsize)
        if f.readinto(memoryview(out).cast("B")) != out.nbytes:
            raise DataError(f"{path}: damaged working file: delete {path.parent} and run prep again")


@functools.lru_cache(maxsize=1 << 14)
def _header_bytes(path: Path) -> int:
    # numpy has Python's own parser read it: 70 us, and a shingle file is entered a hundred times
    with open(path, "rb") as f:
        np.lib.format.read_magic(f)
        np.lib.format.read_array_header_1_0(f)
        return f.tell()


def save_marker(path: Path, figures: dict, files: Proof) -> dict:
    """Publish the marker that a task is done: its figures, the size and hash of each file it wrote, its own hash."""
    marker = {**figures, "files": files}
    text = json.dumps(marker, ensure_ascii=False)
    _publish(path, [f"{xxhash.xxh3_64_hexdigest(text.encode())}\n{text}".encode()])
    return marker


def prove(path: Path) -> Proof:
    """What `save_marker` needs of a file that was written elsewhere."""
    digest = xxhash.xxh3_64()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return {path.name: [path.stat().st_size, digest.hexdigest()]}


def load_marker(path: Path) -> dict | None:
    """The marker of a task whose files are all there and unchanged; None otherwise: then it is simply done again."""
    try:
        digest, text = path.read_bytes().split(b"\n", 1)
        if xxhash.xxh3_64_hexdigest(text) != digest.decode():
            return None
        marker = json.loads(text)
        whole = all(prove(path.parent / name) == {name: proof} for name, proof in marker["files"].items())
        return marker if whole else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
