"""Command-line flags made from a dataclass: each default and help text stands once, in the dataclass."""

import argparse
import contextlib
import dataclasses
import difflib
import errno
import logging
import math
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any, NoReturn, TypeVar

from cli.errors import USER_ERRORS
from store.errors import Unreachable

C = TypeVar("C")

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30}


def flag(default: Any, help: str, *, parse: Callable[[str], Any] | None = None, env: str | None = None) -> Any:
    """A dataclass field with its help text; `parse` reads unusual values, `env` names a fallback variable."""
    if isinstance(default, list | dict):
        raise TypeError("flag defaults are immutable: use a tuple")
    return dataclasses.field(default=default, metadata={"help": help, "parse": parse, "env": env})


def number(text: str) -> int:
    """An int with an optional unit: 300, 1e9, 50MB, 2.5G, 1_000. Raises ValueError."""
    m = re.fullmatch(r"([0-9][0-9_]*(?:\.[0-9]+)?(?:e[0-9]{1,2})?)\s*([KMGT]?)(I?)B?", text.strip(), re.IGNORECASE)
    unit = m and (m[2] + m[3]).upper()
    if not m or unit not in UNITS:
        raise ValueError(f"{text!r} is not a number such as 300, 2.5G or 50MB")
    if not unit and text.strip().upper().endswith("B"):
        raise ValueError(f"{text!r} is not a number: B alone is bytes to some and billions to others; write G for 10^9")
    value = Decimal(m[1].replace("_", "")) * UNITS[unit]  # float would change a large seed
    if value >= 2**63:
        raise ValueError(f"{text!r} is too large")
    if value != int(value):
        raise ValueError(f"{text!r} is not a whole number")
    return int(value)


def tokens(text: str) -> int:
    """A number of tokens: as `number`, and 28B are 28 billion. Raises ValueError."""
    return number(re.sub(r"(?<=[0-9])\s*[Bb]$", "G", text.strip()))


def real(text: str) -> float:
    """A finite float. Raises ValueError."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError
    return value


def price(text: str) -> float:
    """Money: a finite number, 0 or more. Raises ValueError."""
    with contextlib.suppress(ValueError):
        if (value := real(text)) >= 0:
            return value
    raise ValueError(f"{text!r} is not a price such as 1.20")


def seconds(text: str) -> float:
    """A duration in seconds: 90s, 30m, 11.5h, 2d. Raises ValueError."""
    m = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([smhd])", text.strip().lower())
    if not m:
        raise ValueError(f"{text!r} is not a duration such as 90s, 30m, 11.5h or 2d")
    return float(m[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[m[2]]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line instead of argparse's usage block, with the flag that was probably meant."""
        m = re.match(r"unrecognized arguments: (\S+)", message)
        if m:
            name = m[1].split("=")[0]
            known = [o for a in self._actions for o in a.option_strings]
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
            hint = f"did you mean {near[0]}?" if near else "see --help"
            message = f"unknown flag {name}; {hint}" if name.startswith("-") else f"unexpected argument {name}; {hint}"
        print(_error_line(message), file=sys.stderr)
        raise SystemExit(2)


def _error_line(message: object) -> str:
    return "error: " + " ".join(str(message).splitlines())  # one line, even where a file name holds a line break


def _plain_type(hint: Any) -> Any:
    """`X | None` -> X."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return next(a for a in typing.get_args(hint) if a is not type(None))
    return hint


def parse(
    config_type: type[C], argv: Sequence[str] | None, *, prog: str, description: str, epilog: str | None = None
) -> tuple[C, frozenset[str]]:
    """(the filled dataclass, the names of the fields that were given on the command line).

    A bool field gives --name and --no-name, a Literal field its choices, a tuple field one or more values.
    A bad or unknown flag prints one line and exits with code 2.
    """
    parser = _Parser(prog=prog, description=description, epilog=epilog, allow_abbrev=False)
    hints = typing.get_type_hints(config_type)
    for f in dataclasses.fields(config_type):  # type: ignore[arg-type]
        hint = _plain_type(hints[f.name])
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "dest": f.name}
        shown = f.default if f.default not in (None, (), "") else None
        options["help"] = f.metadata["help"] + (f" (default: {shown})" if shown is not None else "")
        options["help"] = options["help"].replace("%", "%%")
        if hint is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(hint) is typing.Literal:
            options["choices"] = typing.get_args(hint)
        else:
            if typing.get_origin(hint) is tuple:
                options["nargs"] = "+"
                hint = typing.get_args(hint)[0]
            convert = f.metadata["parse"] or {int: number, float: real}.get(hint, hint)
            options["type"] = _named(convert, hint)
            options["metavar"] = {int: "N", float: "X", str: "TEXT"}.get(hint, "VALUE")
        # a field whose name Python keeps for itself ends in "_": from_ is --from
        parser.add_argument("--" + f.name.rstrip("_").replace("_", "-"), **options)
    given = vars(parser.parse_args(argv))
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    for f in dataclasses.fields(config_type):  # type: ignore[arg-type]
        env = f.metadata["env"]
        if env and f.name not in values and os.environ.get(env):
            values[f.name] = os.environ[env]
    return config_type(**values), frozenset(given)


def render(config: Any) -> list[str]:
    """The command line that `parse` reads as this dataclass: every field that is not its default, but for durations."""
    argv = []
    for f in dataclasses.fields(config):
        value, name = getattr(config, f.name), f.name.replace("_", "-")
        if value == f.default:
            continue
        if isinstance(value, bool):
            argv.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, tuple):
            argv += [f"--{name}", *map(str, value)]
        elif value is not None:
            argv.append(f"--{name}={value}")  # in one word: a value may begin with a dash
    return argv


def _named(convert: Callable[[str], Any], hint: type) -> Callable[[str], Any]:
    """`convert` with an error message a person can use (argparse shows ArgumentTypeError as it is)."""

    def read(text: str) -> Any:
        try:
            return convert(text)
        except (ValueError, TypeError) as e:
            plain = f"{text!r} is not {'a whole number' if hint is int else 'a number' if hint is float else 'valid'}"
            raise argparse.ArgumentTypeError(str(e) if convert is not real else plain) from e

    return read


class _Patient:
    """stdout or stderr that a job outlives: what cannot be written there (a full disk) is left out, and once nobody reads
    it any more (a closed pipe, a lost terminal) all of it is."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        self._try(lambda: self.stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def _try(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except OSError as e:
            if e.errno in (errno.EPIPE, errno.EIO):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def quiet_drivers() -> None:
    """For programs and their worker processes: storage drivers print tracebacks of faults that store.retry deals with."""
    for name in ("gcsfs", "fsspec"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def run(
    main: Callable[[], int | None], *, outlives_stdout: bool = False, at_once: bool = False, unreachable: int = 2
) -> NoReturn:
    """Run a program's `main` and exit: 0 or its own code; 2 with one line for what a user can set right; `unreachable`
    for storage that did not answer.

    With `outlives_stdout` a reader that goes away (`| head`, a lost ssh), or a full disk under what is printed, stderr
    included, does not end the program. With `at_once` nothing is taken down at the end: that takes Python 0.07 s and torch up to
    2 s, and a thread that hangs in an upload is waited for.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller: `>&-`
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - for the life of the process
        if outlives_stdout:
            setattr(sys, name, _Patient(getattr(sys, name)))
    quiet_drivers()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    try:
        code = main() or 0
        sys.stdout.flush()
    except USER_ERRORS as e:
        print(_error_line(e), file=sys.stderr)
        code = unreachable if isinstance(e, Unreachable) else 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        code = 130
    except BrokenPipeError:
        if outlives_stdout:  # then it is of something else
            raise
        code = 0  # `| head` closed the pipe: not an error
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        print(f"error: {e.filename or 'storage'}: {e.strerror}; make room, "
              "then run the same command with --resume", file=sys.stderr)  # fmt: skip
        code = 2
    try:
        sys.stdout.flush()
    except OSError:  # what it holds cannot be written: Python would try again at exit, and end with 120
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if at_once:
        os._exit(code)
    sys.exit(code)
