"""Unpacked bytes of a file at any URL, from front to back, in bounded memory.

What a file is packed with is seen in its first bytes, not in its name: downloads get renamed.
"""

import bz2
import gzip
import lzma
from typing import BinaryIO, Literal

import zstandard

from cli.errors import UserError
from store import fs
from store.errors import StoreError

Compression = Literal["gzip", "bz2", "xz", "zstd"]

MAGIC: tuple[tuple[bytes, Compression], ...] = (  # none of them begins a text
    (b"\x1f\x8b\x08", "gzip"),
    (b"BZh91AY&SY", "bz2"),
    (b"\xfd7zXZ\x00", "xz"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"\x50\x2a\x4d\x18", "zstd"),  # pzstd begins with a skippable frame
)
MAGIC_BYTES = 10
# Text packs 3 to 10 times, the most repetitive logs 100 times. A bomb (gzip of zeros: 1,030 times, the others more)
# would cost hours of work for nothing, so what unpacks to far more than it can hold is refused.
BOMB_RATIO, BOMB_BYTES = 200, 256 << 20


def compression_of(first_bytes: bytes) -> Compression | None:
    """What packed a file that begins so; None when nothing known did."""
    first_bytes = first_bytes[:3] + b"9" + first_bytes[4:] if first_bytes[:3] == b"BZh" else first_bytes  # any level
    return next((name for magic, name in MAGIC if first_bytes.startswith(magic)), None)


class Unpacked:
    """A file's bytes, unpacked: `with Unpacked(url, compression) as f: f.read(n)`, n bytes except at the end.

    Raises UserError for what is damaged or a decompression bomb, StoreError for storage that fails.
    """

    def __init__(self, url: str, compression: Compression | None) -> None:
        self.url, self.compression, self.unpacked_bytes = url, compression, 0
        self.stored = fs.open_stream(url)
        self.file = _unpacker(self.stored, compression)

    def __enter__(self) -> "Unpacked":
        return self

    def __exit__(self, *error: object) -> None:
        self.stored.close()

    def seek(self, offset: int) -> None:
        """Go to a byte of a file that is not compressed."""
        self.file.seek(offset)

    def read(self, n: int) -> bytes:
        """The next `n` bytes, fewer at the end of the file only."""
        pieces, left = [], n
        try:
            while left and (piece := self.file.read(min(left, 1 << 20))):
                pieces.append(piece)
                left -= len(piece)
        except (OSError, EOFError, lzma.LZMAError, zstandard.ZstdError) as e:
            if self.compression is None or getattr(e, "errno", None):
                raise StoreError(f"{fs.redact(self.url)}: cannot read ({e}): when it is back, "
                                 "run the same command with --resume") from e  # fmt: skip
            raise UserError(f"{fs.redact(self.url)}: cannot be decompressed ({e}): the file is damaged") from e
        self._refuse_bombs(n - left)
        return b"".join(pieces)

    def _refuse_bombs(self, n: int) -> None:
        self.unpacked_bytes += n
        if self.compression and self.unpacked_bytes > max(BOMB_BYTES, BOMB_RATIO * self.stored.tell()):
            raise UserError(f"{fs.redact(self.url)}: unpacks to more than {BOMB_RATIO} times its size, as a decompression "
                            "bomb does and text does not: leave it out, or unpack it yourself")  # fmt: skip


def _unpacker(stored: BinaryIO, compression: Compression | None) -> BinaryIO:
    if compression == "gzip":
        return gzip.GzipFile(fileobj=stored)
    if compression == "bz2":
        return bz2.BZ2File(stored)
    if compression == "xz":
        return lzma.LZMAFile(stored)
    return _ZstdFile(stored) if compression == "zstd" else stored


class _ZstdFile:
    """Reads zstd frames one after another. Unlike zstandard's stream_reader it notices a file that was cut off."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.frame, self.ready = file, None, memoryview(b"")
        self.decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)  # as `zstd --long=31` may need

    def read(self, n: int) -> bytes:
        while not self.ready:
            # few stored bytes at once: a bomb's 1 KiB unpack to 32 MiB, no more
            stored = (self.frame.unused_data if self.frame and self.frame.eof else b"") or self.file.read(1 << 10)
            if self.frame is None or self.frame.eof:
                if not stored:
                    return b""
                self.frame = self.decompressor.decompressobj()
            elif not stored:
                raise EOFError("cut off inside a zstd frame")
            self.ready = memoryview(self.frame.decompress(stored))
        piece, self.ready = self.ready[:n], self.ready[n:]
        return bytes(piece)
