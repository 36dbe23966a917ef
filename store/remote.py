"""fsspec's drivers, held to what is needed of them: no listing cache, no wait without an end, uploads that are proved.

fsspec is loaded where it is first needed: with asyncio and ssl it takes 0.03 s, which local work need not wait for.
"""

import base64
import errno
import hashlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from store.errors import StoreError
from store.retry import aws_code, redact

EXCLUSIVE = ("gs", "gcs", "s3", "s3a", "memory")  # drivers that honour mode="create"; others can swallow it
if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

PART_BYTES = 50 << 20  # of an upload in parts: gcsfs's and s3fs's own choice, given so that S3's hash can be computed
PIECE_BYTES = 64 << 20  # of a download: short enough for REQUEST_S, long enough for latency not to matter
CONNECT_S, SILENCE_S = 30.0, 60.0  # until a server accepts, and that it may say nothing after a request
REQUEST_S = (
    600.0  # one request in all: 50 MiB at 90 kB/s. gcsfs has no limit of its own: a silent server hangs it for ever
)
SLOWEST_BYTES_PER_S = 90_000
_parents: list["AbstractFileSystem"] = []


def _forked() -> None:
    """The thread that runs the drivers does not live on in a forked process; fsspec 2025.3.0 does not notice, and hangs."""
    if (asyn := sys.modules.get("fsspec.asyn")) is None:
        return
    asyn.reset_lock()
    # Kept for good: collected here, s3fs 2025.3.0 closes its connections in the epoll that both processes share, and the
    # parent's next request waits for an answer that it is not told of any more (15 s, measured).
    for driver in asyn.AsyncFileSystem.__subclasses__():
        _parents.extend(driver._cache.values())


os.register_at_fork(after_in_child=_forked)


def filesystem(url: str) -> tuple["AbstractFileSystem", str]:
    """The filesystem object and its path. Made where it is used: gcsfs is not fork-safe, and listing caches lie."""
    import fsspec

    protocol = url.split("://")[0]
    options: dict[str, Any] = {} if protocol == "memory" else {"use_listings_cache": False}
    if protocol in ("gs", "gcs", "http", "https"):
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=REQUEST_S, sock_connect=CONNECT_S, sock_read=SILENCE_S)
        options |= {"requests_timeout": timeout} if protocol[0] == "g" else {"client_kwargs": {"timeout": timeout}}
    try:
        return fsspec.core.url_to_fs(url, **options)
    except ValueError as e:
        if "rotocol" not in str(e):
            raise
        raise StoreError(
            f"{redact(url)}: unknown kind of URL '{protocol}://'; use a path, gs://, s3:// or https://"
        ) from e


def call(fs: "AbstractFileSystem", name: str, *args: Any, n_bytes: int = 0, **kwargs: Any) -> Any:
    """`fs.name(*args)`, or TimeoutError after the time that even a slow network needs for `n_bytes`."""
    if not fs.async_impl:
        return getattr(fs, name)(*args, **kwargs)
    import fsspec.asyn

    limit_s = 2 * SILENCE_S + n_bytes / SLOWEST_BYTES_PER_S
    try:
        return fsspec.asyn.sync(fs.loop, getattr(fs, f"_{name}"), *args, timeout=limit_s, **kwargs)
    except AttributeError as e:  # gcsfs 2025.3.0 stumbles while it cleans up after a fault, over which this one lies
        raise (e.__context__ or e) from None


def upload(url: str, source: Path | bytes) -> None:
    """Send a file or bytes whole and prove what the store holds. What raises can be begun again from byte 0."""
    fs, path = filesystem(url)
    n_bytes = len(source) if isinstance(source, bytes) else source.stat().st_size
    parts = {"chunksize": PART_BYTES} if fs.async_impl and url.startswith(("gs:", "gcs:", "s3:", "s3a:")) else {}
    if isinstance(source, bytes):
        call(fs, "pipe_file", path, source, n_bytes=n_bytes, **parts)
    else:
        call(fs, "put_file", str(source), path, n_bytes=n_bytes, **parts)
    prove(fs, path, url, source)


def prove(fs: "AbstractFileSystem", path: str, url: str, source: Path | bytes) -> None:
    """Raises OSError (EIO) unless the store holds exactly the bytes of `source`, by its hash or by reading them back."""
    whole, by_part, n_bytes = _md5s(source)
    fs.invalidate_cache()
    try:
        info = call(fs, "info", path)
    except FileNotFoundError as e:  # gcsfs 2025.3 can end an upload without an object, and without an error
        raise OSError(errno.EIO, "upload stored nothing", redact(url)) from e
    if info["size"] != n_bytes:
        raise OSError(errno.EIO, f"upload stored {info['size']} bytes of {n_bytes}", redact(url))
    told = info.get("md5Hash") or (info.get("ETag") or "").strip('"')
    same = told in (base64.b64encode(bytes.fromhex(whole)).decode(), whole, by_part)
    if told and not same and not info.get("md5Hash"):
        # an encrypted S3 object has an ETag that is no md5, another program's settings can choose other parts
        same = _held(fs, path, n_bytes) == whole
    if told and not same:
        raise OSError(errno.EIO, "upload stored other bytes than were sent", redact(url))


def _md5s(source: Path | bytes) -> tuple[str, str, int]:
    """md5 of the whole, S3's ETag of the same sent in parts, and the size."""
    whole, parts, n_bytes = hashlib.md5(usedforsecurity=False), [], 0
    for piece in _pieces(source):
        whole.update(piece)
        parts.append(hashlib.md5(piece, usedforsecurity=False).digest())
        n_bytes += len(piece)
    return whole.hexdigest(), f"{hashlib.md5(b''.join(parts), usedforsecurity=False).hexdigest()}-{len(parts)}", n_bytes


def _pieces(source: Path | bytes) -> Any:
    if isinstance(source, bytes):
        yield from (source[i : i + PART_BYTES] for i in range(0, len(source), PART_BYTES))
        return
    with open(source, "rb") as f:
        yield from iter(lambda: f.read(PART_BYTES), b"")


def _held(fs: "AbstractFileSystem", path: str, n_bytes: int) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    for start in range(0, n_bytes, PIECE_BYTES):
        stop = min(start + PIECE_BYTES, n_bytes)
        digest.update(call(fs, "cat_file", path, start=start, end=stop, n_bytes=stop - start))
    return digest.hexdigest()


def create(url: str, data: bytes) -> bool | None:
    """Send bytes to a name that nothing has yet: True, False where it is taken, None where the store cannot do that."""
    if url.split("://")[0] not in EXCLUSIVE:
        return None
    fs, path = filesystem(url)
    try:
        call(fs, "pipe_file", path, data, mode="create")
    except FileExistsError:
        return call(fs, "cat_file", path) == data
    except OSError as e:
        answer = aws_code(e)
        if answer == "NotImplemented":
            return None
        if answer != "PreconditionFailed":
            raise
        return call(fs, "cat_file", path) == data
    try:
        prove(fs, path, url, data)
    except OSError:  # the name is ours, with bytes damaged on their way
        upload(url, data)
    return True
