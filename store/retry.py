"""Which storage faults pass by themselves, trying again with patience, and one clear line for the rest."""

import contextlib
import errno
import functools
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextvars import ContextVar
from typing import TYPE_CHECKING, TypeVar

from store.errors import NotFound, StoreError, Unreachable

if TYPE_CHECKING:
    import tenacity

log = logging.getLogger(__name__)
T = TypeVar("T")

try:
    RETRY_FOR_S = float(os.environ["PERENNIAL_RETRY_FOR_S"])
except (KeyError, ValueError):
    RETRY_FOR_S = 600.0  # gcsfs alone gives up after about 33 s
UNAUTHORISED_TRIES = 3
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 20.0  # between two tries, doubling, with jitter
DRIVERS = {
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "s3": "s3fs",
    "s3a": "s3fs",
    "hf": "huggingface_hub",
    "http": "aiohttp",
    "https": "aiohttp",
}
# Local faults that pass: a network mount that dropped or lagged. A full or read-only disk does not pass by waiting.
TRANSIENT_ERRNOS = {
    errno.EIO, errno.EREMOTEIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EAGAIN, errno.EBUSY, errno.EINTR,
    errno.ECONNRESET, errno.ECONNREFUSED, errno.ECONNABORTED, errno.EPIPE, errno.ENETUNREACH, errno.EHOSTUNREACH,
    socket.EAI_AGAIN,  # the name service does not answer: how a network outage looks; EAI_NONAME is a wrong name
}  # fmt: skip


MOUNT_GONE = (errno.ENOTCONN, errno.ESTALE)
# S3's answers to bytes that changed or ended on their way, which s3fs calls invalid arguments, and to an upload that is
# over: s3fs asks again to complete one that was completed, where the answer was lost, and calls that a missing file
BEGIN_AGAIN = ("BadDigest", "EntityTooSmall", "IncompleteBody", "InvalidPart", "NoSuchUpload", "RequestTimeout",
               "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch")  # fmt: skip
REMOUNT = ("the mount dropped: mount it again (in Colab stop this cell, run drive.mount('/content/drive', "
           "force_remount=True), then this cell): what was saved is kept")  # fmt: skip


def redact(url: str) -> str:
    """The URL without what may be a secret: user:password before the host, and the query (signed URLs)."""
    return re.sub(r"^([\w+.-]+://)[^/?#]*@", r"\1", url).split("?", 1)[0] if "://" in url else url


def aws_code(error: BaseException) -> str | None:
    """What S3 answered, in botocore's words (`PreconditionFailed`, …), where an error of s3fs comes of such an answer."""
    response = getattr(error.__cause__, "response", None)
    return response.get("Error", {}).get("Code") if isinstance(response, dict) else None


def is_transient(error: BaseException) -> bool:
    """True where trying again may help: network faults, throttling, server errors; never a refusal or a full disk."""
    if aws_code(error) in BEGIN_AGAIN:
        return True
    if isinstance(
        error, FileNotFoundError | PermissionError | FileExistsError | IsADirectoryError | NotADirectoryError
    ):
        return False
    if isinstance(error, ValueError):  # aiohttp and requests call a malformed URL one
        return False
    if status := _status(error):
        # 410: the upload's session is gone, it begins again; 501: this server never will
        return status in (408, 410, 429) or (status >= 500 and status != 501)
    if isinstance(error, TimeoutError | ConnectionError):
        return True
    if isinstance(error, OSError):
        # fsspec drivers raise bare OSErrors: "Forbidden: …" is an answer, the rest are faults
        return error.errno in TRANSIENT_ERRNOS if error.errno else not str(error).startswith("Forbidden")
    if type(error).__module__ == "google.auth.exceptions":  # the token could not be renewed for want of a network
        return type(error).__name__ == "TransportError" or bool(getattr(error, "retryable", False))
    names = {c.__name__ for c in type(error).__mro__}
    if type(error).__module__ == "botocore.exceptions":  # most of them are mistakes in a call
        return bool(
            names & {"HTTPClientError", "IncompleteReadError", "ResponseStreamingError", "FlexibleChecksumError"}
        )
    return type(error).__module__.split(".")[0] in ("aiohttp", "requests", "urllib3")


def _status(error: BaseException) -> int | None:
    """The HTTP status that a driver's error tells of."""
    status = getattr(error, "status", None) or getattr(error, "code", None)
    status = status or getattr(getattr(error, "response", None), "status_code", None)  # requests', huggingface_hub's
    return status if isinstance(status, int) and 400 <= status < 600 else None


def _plainly(work: Callable[[], T]) -> T:
    """`work()`; where fsspec's http driver calls a server that does not answer a missing file, what really happened."""
    try:
        return work()
    except FileNotFoundError as e:
        cause = e.__cause__
        if cause and (is_transient(cause) or (isinstance(cause, OSError) and _status(cause) is None)):
            raise cause from None
        raise


def _may_pass(error: BaseException, tries: int) -> bool:
    """Whether another try may help after so many."""
    if _status(error) == 401:  # a token that was just renewed, on its way to every server
        return tries <= UNAUTHORISED_TRIES
    return is_transient(error)


def _again(state: "tenacity.RetryCallState") -> bool:
    error = state.outcome.exception() if state.outcome else None
    return error is not None and _may_pass(error, state.attempt_number)


def _warn(state: "tenacity.RetryCallState") -> None:
    error = state.outcome.exception() if state.outcome else None
    log.warning("storage: %s; trying again (attempt %d)", _one_line(error), state.attempt_number + 1)


def _one_line(error: BaseException | None) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    text = re.sub(r"://[^/?#\s]*@", "://", re.sub(r"\?\S*", "", text))[:300]
    return f"{error.strerror}: {REMOUNT}" if isinstance(error, OSError) and error.errno in MOUNT_GONE else text


_patience_s: ContextVar[float | None] = ContextVar("patience_s", default=None)


@contextlib.contextmanager
def patience(seconds: float) -> Iterator[None]:
    """Within it whatever is attempted ends after that long, tried again without a word: for a first look at an address.

    An address that was mistyped fails as one does whose server restarts; work under way bears that for RETRY_FOR_S.
    """
    token = _patience_s.set(seconds)
    try:
        yield
    finally:
        _patience_s.reset(token)


def _until(end_s: float, work: Callable[[], T], met: list[BaseException]) -> T:
    """`work()`, or what the try before it met, or TimeoutError: gcsfs has retries of its own, 33 s of them, and a host may
    never answer."""
    answer: Future[T] = Future()

    def run() -> None:
        try:
            answer.set_result(_plainly(work))
        except BaseException as e:  # raised where it is asked for
            answer.set_exception(e)

    threading.Thread(target=run, daemon=True).start()
    wait([answer], max(end_s - time.monotonic(), 0))
    if not answer.done():
        raise met[-1] if met else TimeoutError("no answer: check the address and the network")
    if error := answer.exception():
        met.append(error)
    return answer.result()


def _patiently(work: Callable[[], T]) -> T:
    """`work()`, again with backoff and jitter while its fault is transient, until patience ends."""
    patience_s, begin_s = _patience_s.get(), time.monotonic()
    asked = functools.partial(_plainly, work)
    if patience_s is not None:
        asked = functools.partial(_until, begin_s + patience_s, work, [])
    try:
        return asked()
    except Exception as e:
        if not _may_pass(e, 1):
            raise
        faults = [e]

    import tenacity  # with asyncio it takes 0.03 s to load, and nearly nothing ever fails

    def next_try() -> T:
        if faults:
            raise faults.pop()
        return asked()

    took_s = time.monotonic() - begin_s
    return tenacity.Retrying(
        retry=_again,
        wait=tenacity.wait_random_exponential(multiplier=FIRST_WAIT_S, max=LONGEST_WAIT_S),
        stop=tenacity.stop_after_delay(RETRY_FOR_S - took_s)
        if patience_s is None
        else tenacity.stop_before_delay(patience_s - took_s),
        before_sleep=_warn if patience_s is None else None,
        reraise=True,
    )(next_try)


def attempt(url: str, action: str, work: Callable[[], T]) -> T:
    """Run `work`, again with backoff and jitter while the fault is transient; anything final is one StoreError.

    Unreachable where it was still worth another try when patience ended.
    """
    try:
        return _patiently(work)
    except StoreError:
        raise
    except (FileNotFoundError, NotADirectoryError) as e:
        if isinstance(e, NotADirectoryError) and action == "write":
            raise StoreError(f"{redact(url)}: cannot write: a part of that path is a file") from e
        raise NotFound(f"{redact(url)}: not found") from e
    except ImportError as e:
        package = DRIVERS.get(url.split("://")[0], "its fsspec driver")
        raise StoreError(
            f"{redact(url)}: this kind of URL needs a package that is missing: pip install {package}"
        ) from e
    except NotImplementedError as e:
        raise StoreError(f"{redact(url)}: this storage cannot {action}") from e
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StoreError(f"{redact(url)}: no space left; free some and run the same command with --resume") from e
        why = _one_line(e) if e.errno in MOUNT_GONE else e.strerror or _one_line(e)
        raise _final(e)(f"{redact(url)}: cannot {action}: {why}") from e
    except Exception as e:  # a driver's own exception types: still one line, the cause is chained for debugging
        raise _final(e)(f"{redact(url)}: cannot {action}: {_one_line(e)}") from e


def _final(error: BaseException) -> type[StoreError]:
    return Unreachable if is_transient(error) else StoreError
