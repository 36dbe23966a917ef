"""The token dataset, format version 1: writer and reader together.

A folder holds `metadata.json`, written last, `tokenizer.json`, and shards `train-00000.bin[.zst]`, `val-00000.bin[.zst]`.
A raw shard is the 256-int32 header that llm.c and modded-nanogpt read, then little-endian ids: uint16 (magic 20240520,
version 1) or, for a vocabulary above 65,536, uint32 (magic 20240801, version 7). The header alone says which.

A `.zst` shard is the same bytes as independent zstd frames, ending in the seek table of the zstd "seekable format"
(facebook/zstd, contrib/seekable_format): `zstd -d` gives back the raw shard, and a reader can fetch any part of it.
"""

import hashlib
import json
import os
import re
import struct
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import xxhash
import zstandard

from store import fs
from store.errors import DataError, NotFound
from store.untrusted import parse_json

FORMAT, VERSION = "perennial-tokens", 1
HEADER_BYTES = 1024
MAGICS = {20240520: (1, np.dtype("<u2")), 20240801: (7, np.dtype("<u4"))}  # magic -> (version, width)
FRAME_BYTES = 16 << 20  # raw; 4 MiB frames store 2.4 % more at level 9, larger ones start later
PIECE_BYTES = 4 << 20  # what a stream is unpacked by
SEEK_MAGIC, SKIPPABLE_MAGIC = 0x8F92EAB1, 0x184D2A5E
Split = Literal["train", "val"]
Loading = Literal["auto", "preload", "memmap"]


# ---- header ---------------------------------------------------------------------------------------------------------


def dtype_for(vocab_size: int) -> np.dtype:
    """The narrowest id type of the format: uint16 up to 65,536 ids, else uint32."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


def make_header(n_tokens: int, dtype: np.dtype) -> bytes:
    """The 1,024 bytes that begin a raw shard."""
    if n_tokens >= 1 << 31:
        raise DataError(f"{n_tokens} tokens do not fit one shard (at most {(1 << 31) - 1}): use smaller shards")
    header = np.zeros(256, "<i4")
    magic, (version, _) = next((m, v) for m, v in MAGICS.items() if v[1] == dtype)
    header[:3] = magic, version, n_tokens
    return header.tobytes()


def read_header(raw: bytes, where: str) -> tuple[int, np.dtype]:
    """(token count, id type) of a raw shard's first 1,024 bytes. Raises DataError for anything else."""
    ints = np.frombuffer(raw[:HEADER_BYTES], "<i4") if len(raw) >= HEADER_BYTES else np.zeros(3, "<i4")
    version, dtype = MAGICS.get(int(ints[0]), (None, None))
    if dtype is None or int(ints[1]) != version:
        raise DataError(f"{where}: not a token shard (header {ints[:2].tolist()}, expected one of "
                        f"{[[m, v] for m, (v, _) in MAGICS.items()]}): re-run prep")  # fmt: skip
    return int(ints[2]), dtype


# ---- writing --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shard:
    """One shard's entry in metadata.json."""

    name: str
    split: Split
    tokens: int
    documents: int
    stored_bytes: int
    sha256: str  # of the stored bytes
    xxh3: str  # xxh3-64 of the raw token bytes, the same for raw and compressed


def make_compressor(level: int) -> zstandard.ZstdCompressor:
    """zstd's `level` with what suits ids in frames of FRAME_BYTES (docs/tokenizer.md has the measurements).

    The window is the whole frame, and a match is worth searching from six bytes on, three ids. The time of the middle levels
    is spent waiting for the memory of the places they remember. So level 4, which looks up two and searches no further, has
    tables of 6 MiB, which a cache can hold; level 5 remembers a quarter of the frame, in 20 MiB, and looks at twice as many of
    its places; 6 and 7 remember half, 8 to 12 every position, which takes 80 MiB.
    """
    fitted = {"window_log": 24}
    if level <= 12:  # above, zstd searches trees, where shorter matches pay
        fitted["min_match"] = 6
    if level == 4:
        fitted |= {"hash_log": 20, "chain_log": 19}
    elif level == 5:
        fitted |= {"hash_log": 22, "search_log": 4}
    elif 6 <= level <= 12:
        fitted["hash_log"] = 23 if level < 8 else 24
    parameters = zstandard.ZstdCompressionParameters.from_level(level, **fitted, write_checksum=True)
    return zstandard.ZstdCompressor(compression_params=parameters)


class ShardWriter:
    """Write one shard of a known number of tokens to a local file, in bounded memory.

    `with ShardWriter(path, n_tokens, dtype, level=3) as w: w.write(ids)…`, then `w.entry(split, documents)`.
    The file appears under `path` only when complete. `level=None` writes a raw shard. Without `durable` there is no
    fsync: for copies that are proved by their hash whenever they are found.
    """

    def __init__(
        self, path: Path, n_tokens: int, dtype: np.dtype, *, level: int | None, durable: bool = True
    ) -> None:  # fmt: skip
        self.path, self.dtype, self.n_tokens, self.written, self.durable = path, dtype, n_tokens, 0, durable
        header = make_header(n_tokens, dtype)
        self.temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self.file = open(self.temporary, "wb")  # noqa: SIM115 - closed in __exit__
        self.compressor = None if level is None else make_compressor(level)
        self.sha256, self.xxh3 = hashlib.sha256(), xxhash.xxh3_64()
        self.frames: list[tuple[int, int]] = []  # (stored, raw) bytes
        self.pending, self.pending_bytes = [], 0
        self._frame(header)

    def write(self, ids: np.ndarray) -> None:
        """Append ids, any integer dtype. Raises DataError for values that do not fit and for more than announced."""
        if len(ids) and ids.dtype != self.dtype and (ids.min() < 0 or ids.max() > np.iinfo(self.dtype).max):
            raise DataError(f"{self.path}: token ids {ids.min()} to {ids.max()} do not fit {self.dtype}")
        ids = np.ascontiguousarray(ids, self.dtype)
        self.written += len(ids)
        if self.written > self.n_tokens:  # at once: what is being unpacked may be endless
            raise DataError(f"{self.path}: more than the {self.n_tokens} tokens announced")
        raw = memoryview(ids.view(np.uint8))
        self.xxh3.update(raw)
        while len(raw):
            part = raw[: FRAME_BYTES - self.pending_bytes]
            self.pending.append(part)
            self.pending_bytes += len(part)
            raw = raw[len(part) :]
            if self.pending_bytes == FRAME_BYTES:
                self._flush()

    def _flush(self) -> None:
        if self.pending:
            self._frame(b"".join(self.pending))
            self.pending, self.pending_bytes = [], 0

    def _frame(self, raw: bytes) -> None:
        stored = raw if self.compressor is None else self.compressor.compress(raw)
        self.frames.append((len(stored), len(raw)))
        self._store(stored)

    def _store(self, stored: bytes) -> None:
        self.sha256.update(stored)
        self.file.write(stored)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            if kind is None:
                self._flush()
                if self.written != self.n_tokens:
                    raise DataError(f"{self.path}: {self.written} tokens written, {self.n_tokens} announced")
                if self.compressor is not None:
                    self._store(_seek_table(self.frames))
                self.file.flush()
                if self.durable:
                    os.fsync(self.file.fileno())
                self.file.close()
                os.replace(self.temporary, self.path)
        finally:
            self.temporary.unlink(missing_ok=True)  # before close, which fails too when the disk is full
            self.file.close()

    def entry(self, split: Split, documents: int) -> Shard:
        """The metadata entry of the finished file."""
        return Shard(self.path.name, split, self.n_tokens, documents, self.path.stat().st_size,
                     self.sha256.hexdigest(), self.xxh3.hexdigest())  # fmt: skip


def _seek_table(frames: list[tuple[int, int]]) -> bytes:
    table = b"".join(struct.pack("<II", *f) for f in frames) + struct.pack("<IBI", len(frames), 0, SEEK_MAGIC)
    return struct.pack("<II", SKIPPABLE_MAGIC, len(table)) + table


def write_metadata(url: str, shards: Iterable[Shard], **fields: Any) -> None:
    """Publish metadata.json, which is what makes the dataset complete: call it last."""
    entries = [asdict(s) for s in shards]
    data = {"format": FORMAT, "version": VERSION, **fields, "shards": entries}
    fs.put_bytes(fs.join(url, "metadata.json"), json.dumps(data, indent=1, ensure_ascii=False).encode())


# ---- reading --------------------------------------------------------------------------------------------------------


class TokenShards:
    """A complete dataset at any URL: its metadata, checked, and its tokens.

    Raises DataError where metadata.json is missing, damaged, of a newer version or names files outside the folder.
    `cache` is where remote or compressed shards are kept as raw local files when they are memory-mapped.
    """

    def __init__(self, url: str, *, cache: Path | None = None) -> None:
        self.url, self.cache = url, cache or default_cache() / "shards"
        self.metadata, self.fingerprint = _load_metadata(url)
        self.shards = [Shard(**s) for s in self.metadata["shards"]]
        self.vocab_size: int = self.metadata["vocab_size"]
        self.dtype = dtype_for(self.vocab_size)

    def split(self, split: Split) -> list[Shard]:
        """The shards of one split, in name order."""
        return [s for s in self.shards if s.split == split]

    def tokenizer_json(self) -> str:
        """The text of tokenizer.json, proved to be the one the tokens were made with."""
        url = fs.join(self.url, "tokenizer.json")
        data = fs.read_bytes(url)
        if hashlib.sha256(data).hexdigest() != self.metadata["tokenizer_sha256"]:
            raise DataError(
                f"{fs.redact(url)}: not the tokenizer these shards were made with: restore it, or re-run prep"
            )
        return data.decode()

    def check_sizes(self) -> None:
        """Raise DataError when a shard is missing or has another size than recorded: the cheap check, at start."""
        urls = [fs.join(self.url, shard.name) for shard in self.shards]
        with ThreadPoolExecutor(1 if fs.is_local(self.url) else 8) as pool:  # a hundred answers of 50 ms each are 5 s
            sizes = list(pool.map(lambda url, context: context.run(fs.size, url), urls, [copy_context() for _ in urls]))
        for shard, found in zip(self.shards, sizes, strict=True):
            if found != shard.stored_bytes:
                what = "is missing" if found is None else f"has {found} bytes"
                raise DataError(f"{fs.redact(self.url)}: shard {shard.name} {what}, expected {shard.stored_bytes} bytes: "
                                "copy it again, or re-run prep")  # fmt: skip

    def load(self, shard: Shard, *, preload: bool, stored: Callable[[], BinaryIO] | None = None) -> np.ndarray:
        """All tokens of one shard, (tokens,) uint16 or uint32, every stored byte verified on the way.

        `preload` reads them into memory; otherwise they are memory-mapped, from the cache if remote or compressed.
        `stored` opens the shard's stored bytes where they are to be had otherwise than from its URL.
        """
        url = fs.join(self.url, shard.name)
        if stored is None and fs.is_local(url) and not shard.name.endswith(".zst"):
            path = fs.local_path(url)
            _verify(shard, url)
            return self._map(path, shard, preload=preload)
        if not preload:
            return self._map(self._cached(shard, stored), shard, preload=False)
        out = np.empty(shard.tokens, self.dtype)
        view, filled = memoryview(out.view(np.uint8)), 0
        for piece in self._raw_pieces(shard, stored):
            if filled + len(piece) > len(view):
                raise _wrong_length(url, shard)
            view[filled : filled + len(piece)] = piece
            filled += len(piece)
        if filled != len(view):
            raise _wrong_length(url, shard)
        return out

    def _map(self, path: Path, shard: Shard, *, preload: bool) -> np.ndarray:
        with open(path, "rb") as f:
            tokens, dtype = read_header(f.read(HEADER_BYTES), str(path))
        if (tokens, dtype) != (
            shard.tokens,
            self.dtype,
        ) or path.stat().st_size != HEADER_BYTES + tokens * dtype.itemsize:
            raise _wrong_length(str(path), shard)
        if preload:
            return np.fromfile(path, dtype, offset=HEADER_BYTES)
        return np.memmap(path, dtype, mode="r", offset=HEADER_BYTES, shape=(tokens,))

    def copy_path(self, shard: Shard) -> Path:
        """Where the raw local copy of a shard is, or would be."""
        return self.cache / f"{shard.sha256[:20]}-{shard.name.removesuffix('.zst')}"

    def copied(self, shard: Shard) -> np.ndarray | None:
        """The raw local copy, memory-mapped and proved by its hash; None where there is none, or a damaged one."""
        try:
            tokens = self._map(self.copy_path(shard), shard, preload=False)
        except (DataError, FileNotFoundError):
            return None
        return tokens if xxhash.xxh3_64(tokens.view(np.uint8)).hexdigest() == shard.xxh3 else None

    def _cached(self, shard: Shard, stored: Callable[[], BinaryIO] | None) -> Path:
        """The raw local copy, which appears only once verified; one that is damaged since then is made again."""
        path = self.copy_path(shard)
        if self.copied(shard) is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with ShardWriter(path, shard.tokens, self.dtype, level=None, durable=False) as w:
                for piece in self._raw_pieces(shard, stored):
                    w.write(np.frombuffer(piece, self.dtype))
        return path

    def _raw_pieces(
        self, shard: Shard, stored: Callable[[], BinaryIO] | None = None
    ) -> Iterable[memoryview | bytes]:  # fmt: skip
        """The raw token bytes after the header, piece by piece; stored bytes are proved at the end: use nothing before."""
        url = fs.join(self.url, shard.name)
        digest, raw_hash, header, odd = hashlib.sha256(), xxhash.xxh3_64(), b"", b""
        with stored() if stored else fs.open_stream(url) as f:
            hashing = _HashingReader(f, digest.update)
            source = (
                zstandard.ZstdDecompressor().stream_reader(hashing, read_across_frames=True)
                if shard.name.endswith(".zst")
                else hashing
            )
            try:
                while piece := source.read(PIECE_BYTES):
                    if len(header) < HEADER_BYTES:
                        cut = HEADER_BYTES - len(header)
                        header, piece = header + piece[:cut], piece[cut:]
                        if len(header) == HEADER_BYTES and read_header(header, url) != (shard.tokens, self.dtype):
                            raise _wrong_length(url, shard)
                    piece = odd + piece
                    whole = len(piece) - len(piece) % self.dtype.itemsize
                    piece, odd = piece[:whole], piece[whole:]
                    raw_hash.update(piece)
                    yield piece
                while hashing.read(PIECE_BYTES):
                    pass  # what follows the last frame counts for the sha256 too
            except zstandard.ZstdError as e:
                raise DataError(f"{fs.redact(url)}: damaged (zstd: {e}): copy it again, or re-run prep") from e
        if digest.hexdigest() != shard.sha256 or raw_hash.hexdigest() != shard.xxh3 or odd:
            raise _damaged(url)

    def read(self, shard: Shard, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of one shard, reading only the frames that hold them (range requests when remote).

        Frame checksums are verified; the whole-file hash is not: use `load` for training, this for a look.
        """
        if not 0 <= start <= stop <= shard.tokens:
            raise ValueError(f"tokens {start}:{stop} are outside 0:{shard.tokens}")
        url, width = fs.join(self.url, shard.name), self.dtype.itemsize
        first, last = HEADER_BYTES + start * width, HEADER_BYTES + stop * width
        if first == last:
            return np.empty(0, self.dtype)
        if not shard.name.endswith(".zst"):
            part = fs.read_bytes(url, first, last)
            if len(part) != last - first:
                raise _wrong_length(url, shard)
            return np.frombuffer(part, self.dtype)
        stored, raw = _read_seek_table(url, shard.stored_bytes)
        stored_at, raw_at = np.append(0, np.cumsum(stored)), np.append(0, np.cumsum(raw))
        table_bytes = 17 + 8 * len(stored)
        if stored_at[-1] + table_bytes != shard.stored_bytes or raw_at[-1] != HEADER_BYTES + shard.tokens * width:
            raise _damaged(url)
        a, b = np.searchsorted(raw_at, first, "right") - 1, np.searchsorted(raw_at, last, "left")
        blob = fs.read_bytes(url, int(stored_at[a]), int(stored_at[b]))
        frames = (blob[stored_at[i] - stored_at[a] : stored_at[i + 1] - stored_at[a]] for i in range(a, b))
        try:
            part = b"".join(zstandard.ZstdDecompressor().decompress(f, max_output_size=FRAME_BYTES) for f in frames)
        except zstandard.ZstdError as e:
            raise DataError(f"{fs.redact(url)}: damaged (zstd: {e}): copy it again, or re-run prep") from e
        if len(part) != raw_at[b] - raw_at[a]:
            raise _damaged(url)
        return np.frombuffer(part[first - raw_at[a] : last - raw_at[a]], self.dtype)

    def verify(self, on_bytes: Callable[[int], object] = lambda n: None) -> None:
        """Read every file and compare every hash; raises DataError naming the first that differs."""
        self.check_sizes()
        self.tokenizer_json()
        for shard in self.shards:
            n = 0
            for piece in self._raw_pieces(shard):
                n += len(piece) // self.dtype.itemsize
                on_bytes(len(piece))
            if n != shard.tokens:
                raise _wrong_length(fs.join(self.url, shard.name), shard)


def default_cache() -> Path:
    """Where this machine keeps what can be made again: $PERENNIAL_CACHE, else ~/.cache/perennial."""
    return Path(os.environ.get("PERENNIAL_CACHE") or Path.home() / ".cache" / "perennial")


class _HashingReader:
    """A file that shows every byte it reads to `on_bytes`."""

    def __init__(self, file: Any, on_bytes: Callable[[bytes], object]) -> None:
        self.file, self.on_bytes = file, on_bytes

    def read(self, n: int = -1) -> bytes:
        data = self.file.read(n)
        self.on_bytes(data)
        return data


def _read_seek_table(url: str, stored_bytes: int) -> tuple[list[int], list[int]]:
    footer = fs.read_bytes(url, max(stored_bytes - 9, 0), stored_bytes)
    n, flags, magic = struct.unpack("<IBI", footer) if len(footer) == 9 else (0, 0, 0)
    if magic != SEEK_MAGIC or flags != 0 or 8 * n + 17 > stored_bytes:
        raise _damaged(url)
    table = np.frombuffer(fs.read_bytes(url, stored_bytes - 9 - 8 * n, stored_bytes - 9), "<u4").reshape(n, 2)
    return table[:, 0].astype(np.int64).tolist(), table[:, 1].astype(np.int64).tolist()


def _verify(shard: Shard, url: str) -> None:
    with fs.open_stream(url) as f:
        if hashlib.file_digest(f, "sha256").hexdigest() != shard.sha256:
            raise _damaged(url)


def _damaged(url: str) -> DataError:
    return DataError(
        f"{fs.redact(url)}: sha256 differs from metadata.json: damaged or changed: copy it again, or re-run prep"
    )


def _wrong_length(url: str, shard: Shard) -> DataError:
    return DataError(f"{fs.redact(url)}: does not hold the {shard.tokens} tokens that metadata.json names: re-run prep")


def _load_metadata(url: str) -> tuple[dict[str, Any], str]:
    """(metadata, sha256 of the file), every field that is relied on checked for type: it is untrusted input."""
    where = fs.redact(fs.join(url, "metadata.json"))
    try:
        raw = fs.read_bytes(fs.join(url, "metadata.json"))
    except NotFound as e:
        raise DataError(f"{fs.redact(url)}: no token dataset there (metadata.json is missing): make one with "
                        "prep/tokenize_bpe.py, or let it finish with --resume") from e  # fmt: skip
    try:
        data = parse_json(raw)
        if data.get("format") != FORMAT:
            raise ValueError(f"format is {data.get('format')!r}, expected {FORMAT!r}")
        if data["version"] > VERSION:
            raise DataError(
                f"{where}: format version {data['version']} is newer than this program's {VERSION}: update it"
            )
        shards = [Shard(**s) for s in data["shards"]]
        if type(data["vocab_size"]) is not int or data["vocab_size"] < 1:
            raise ValueError("vocab_size is not a positive number")
        if not isinstance(data["tokenizer_sha256"], str):
            raise ValueError("tokenizer_sha256 has the wrong type")
        for s in shards:
            kinds = [type(v) for v in asdict(s).values()]
            if kinds != [str, str, int, int, int, str, str] or min(s.tokens, s.documents, s.stored_bytes) < 0:
                raise ValueError(f"bad shard entry {s.name!r}")
            if s.split not in ("train", "val") or not re.fullmatch(rf"{s.split}-[0-9]{{5,}}\.bin(\.zst)?", s.name):
                raise ValueError(f"bad shard name {s.name!r}")
            if not re.fullmatch("[0-9a-f]{64}", s.sha256) or not re.fullmatch("[0-9a-f]{16}", s.xxh3):
                raise ValueError(f"bad hash of shard {s.name!r}")  # one names the cached copy
        if len({s.name for s in shards}) != len(shards):
            raise ValueError("a shard is named twice")
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise DataError(f"{where}: not valid metadata ({e}): copy the dataset again, or re-run prep") from e
    # the tokens themselves: the same for raw and compressed shards, whatever library versions made them
    identity = [data["tokenizer_sha256"], *([s.split, s.tokens, s.xxh3] for s in shards)]
    return data, hashlib.sha256(json.dumps(identity).encode()).hexdigest()
