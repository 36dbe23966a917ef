"""Standard input as a file: kept in the work folder, so that it can be entered anywhere and a restart still has it."""

import os
import shutil
import sys
from pathlib import Path

from cli.errors import UserError
from store.errors import StoreError

STDIN = "-"  # as it is named among the inputs
LOCK = ".stdin-lock"  # of the work folder: held by who reads


def standard_input(work: Path, *, anew: bool) -> Path:
    """The file that holds all of standard input: an earlier run's, where that had read to the end, else read now.

    With `anew` an earlier run's does not count. Raises UserError where nothing is piped in, StoreError where it cannot
    be kept. The caller holds LOCK.
    """
    path, partial = work / "stdin", work / "stdin.part"
    if path.exists() and not anew:
        return path
    if sys.stdin is None or sys.stdin.isatty():
        raise UserError("--input -: nothing is piped in: zcat corpus.txt.gz | python prep/tokenize_bpe.py --input - …")
    try:
        with open(partial, "wb") as f:
            shutil.copyfileobj(sys.stdin.buffer, f, 1 << 20)
        os.replace(partial, path)
    except OSError as e:
        raise StoreError(f"{work}: standard input cannot be kept there ({e.strerror}): make room, or give a roomier "
                         "--work-dir, then pipe it in again") from e  # fmt: skip
    finally:
        partial.unlink(missing_ok=True)
    return path
