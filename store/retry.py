"""Which storage faults pass by themselves, trying again with patience, and one clear line for the rest."""

import errno
import logging
import os
import re
import socket
from collections.abc import Callable
from typing import TypeVar

import tenacity

from store.errors import NotFound, StoreError

log = logging.getLogger(__name__)
T = TypeVar("T")

try:
    RETRY_FOR_S = float(os.environ["PERENNIAL_RETRY_FOR_S"])
except (KeyError, ValueError):
    RETRY_FOR_S = 600.0  # gcsfs alone gives up after about 33 s
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
    errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EAGAIN, errno.EBUSY, errno.EINTR,
    errno.ECONNRESET, errno.ECONNREFUSED, errno.ECONNABORTED, errno.EPIPE, errno.ENETUNREACH, errno.EHOSTUNREACH,
    socket.EAI_AGAIN,  # the name service does not answer: how a network outage looks; EAI_NONAME is a wrong name
}  # fmt: skip


def redact(url: str) -> str:
    """The URL without what may be a secret: user:password before the host, and the query (signed URLs)."""
    return re.sub(r"^([\w+.-]+://)[^/?#]*@", r"\1", url).split("?", 1)[0] if "://" in url else url


def is_transient(error: BaseException) -> bool:
    """True where trying again may help: network faults, throttling, server errors; never a refusal or a full disk."""
    if isinstance(
        error, FileNotFoundError | PermissionError | FileExistsError | IsADirectoryError | NotADirectoryError
    ):
        return False
    if isinstance(error, ValueError):  # aiohttp and requests call a malformed URL one
        return False
    status = getattr(error, "status", None) or getattr(error, "code", None)
    status = status or getattr(getattr(error, "response", None), "status_code", None)  # requests', huggingface_hub's
    if isinstance(status, int) and 400 <= status < 600:
        return status in (408, 429) or (status >= 500 and status != 501)  # 501: this server never will
    if isinstance(error, TimeoutError | ConnectionError):
        return True
    if isinstance(error, OSError):
        # fsspec drivers raise bare OSErrors: "Forbidden: …" is an answer, the rest are faults
        return error.errno in TRANSIENT_ERRNOS if error.errno else not str(error).startswith("Forbidden")
    if type(error).__module__ == "google.auth.exceptions":  # the token could not be renewed for want of a network
        return type(error).__name__ == "TransportError" or bool(getattr(error, "retryable", False))
    return type(error).__module__.split(".")[0] in ("aiohttp", "requests", "urllib3")


def _warn(state: tenacity.RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome else None
    log.warning("storage: %s; trying again (attempt %d)", _one_line(error), state.attempt_number + 1)


def _one_line(error: BaseException | None) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return re.sub(r"://[^/?#\s]*@", "://", re.sub(r"\?\S*", "", text))[:300]


def attempt(url: str, action: str, work: Callable[[], T]) -> T:
    """Run `work`, again with backoff and jitter while the fault is transient; anything final is one StoreError."""
    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception(is_transient),
        wait=tenacity.wait_random_exponential(multiplier=0.5, max=20),
        stop=tenacity.stop_after_delay(RETRY_FOR_S),
        before_sleep=_warn,
        reraise=True,
    )
    try:
        return retrying(work)
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
        raise StoreError(f"{redact(url)}: cannot {action}: {e.strerror or _one_line(e)}") from e
    except Exception as e:  # a driver's own exception types: still one line, the cause is chained for debugging
        raise StoreError(f"{redact(url)}: cannot {action}: {_one_line(e)}") from e
