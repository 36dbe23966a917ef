"""Flags come from a dataclass, and whatever the user can get wrong is one line on stderr and exit code 2."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

import prep.settings
import train.config
from cli import flags
from cli.flags import flag, number, price, seconds
from scripts.export import ExportFlags
from scripts.goodput import GoodputFlags
from train.config import TrainConfig

ROOT = Path(__file__).parent.parent


def even(text: str) -> int:
    if int(text) % 2:
        raise ValueError(f"{text} is odd")
    return int(text)


@dataclass(frozen=True)
class Config:
    steps: int = flag(300, "steps; 100% of them")
    micro_batch: int | None = flag(None, "sequences at once")
    lr: float = flag(3e-4, "learning rate")
    name: str = flag("run", "a name")
    resume: bool = flag(False, "go on")
    dtype: Literal["auto", "fp16", "bf16"] = flag("auto", "precision")
    input: tuple[str, ...] = flag((), "files")
    pairs: int = flag(2, "an even number", parse=even)
    out: str = flag("out", "where", env="PERENNIAL_TEST_OUT")


def parse(*argv: str) -> tuple[Config, frozenset[str]]:
    return flags.parse(Config, argv, prog="prog", description="what it does")


def test_values_and_which_were_given():
    """Every type is read as its field says; what was not given has the dataclass's own default."""
    assert parse() == (Config(), frozenset())
    config, given_names = parse(
        *[
            "--steps",
            "2.5K",
            "--micro-batch",
            "8",
            "--lr",
            "1e-3",
            "--resume",
            "--dtype",
            "bf16",
            "--input",
            "a",
            "b",
            "--pairs=4",
            "--name=",
        ]
    )
    assert config == Config(2500, 8, 1e-3, "", True, "bf16", ("a", "b"), 4)
    assert given_names == {"steps", "micro_batch", "lr", "resume", "dtype", "input", "pairs", "name"}
    assert parse("--resume", "--no-resume") == (Config(), {"resume"})
    assert parse("--input", "with space", "ü")[0].input == ("with space", "ü")


def test_environment_stands_in_for_a_flag(monkeypatch):
    monkeypatch.setenv("PERENNIAL_TEST_OUT", "gs://b/run")
    config, given_names = parse()
    assert (config.out, given_names) == ("gs://b/run", frozenset())
    assert parse("--out", "here")[0].out == "here"
    monkeypatch.setenv("PERENNIAL_TEST_OUT", "")
    assert parse()[0].out == "out"


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--stepz", "5"], "unknown flag --stepz; did you mean --steps?"),
        (["--micro_batch", "5"], "unknown flag --micro_batch; did you mean --micro-batch?"),
        (["--stepz=5"], "unknown flag --stepz; did you mean --steps?"),
        (["--step", "5"], "unknown flag --step; did you mean --steps?"),  # no abbreviations
        (["--no-resum"], "unknown flag --no-resum; did you mean --no-resume?"),
        (["--xyzzy"], "unknown flag --xyzzy; see --help"),
        (["-n"], "unknown flag -n; see --help"),
        (["corpus.txt"], "unexpected argument corpus.txt; see --help"),
        (["--steps"], "argument --steps: expected one argument"),
        (["--steps", "many"], "argument --steps: 'many' is not a number such as 300, 2.5G or 50MB"),
        (["--steps", "1.5"], "argument --steps: '1.5' is not a whole number"),
        (["--steps", "-5"], "argument --steps: '-5' is not a number such as 300, 2.5G or 50MB"),
        (["--steps", "1\n2"], r"argument --steps: '1\n2' is not a number such as 300, 2.5G or 50MB"),
        (["--lr", "fast"], "argument --lr: 'fast' is not a number"),
        (["--pairs", "3"], "argument --pairs: 3 is odd"),
        (["--resume=yes"], "argument --resume/--no-resume: ignored explicit argument 'yes'"),
        (["--input"], "argument --input: expected at least one argument"),
        (["--dtype", "int8\n"], None),
        (["--wrong\nflag"], "unknown flag --wrong; see --help"),
    ],
    ids=lambda v: repr(v)[:40] if isinstance(v, list) else "",
)
def test_wrong_flags_are_one_line(capsys, argv, line):
    with pytest.raises(SystemExit) as e:
        parse(*argv)
    out, err = capsys.readouterr()
    assert (e.value.code, out) == (2, "")
    assert err.count("\n") == 1
    assert err.startswith("error: ")
    assert line is None or err == f"error: {line}\n"


def test_wrong_choice_names_the_choices(capsys):
    with pytest.raises(SystemExit):
        parse("--dtype", "int8")
    err = capsys.readouterr().err
    assert all(word in err for word in ("--dtype", "int8", "auto", "fp16", "bf16"))


def test_help_shows_each_flag_with_its_default(capsys):
    with pytest.raises(SystemExit) as e:
        parse("--help")
    out, err = capsys.readouterr()
    assert (e.value.code, err) == (0, "")
    text = " ".join(out.split())
    for words in ("--steps N steps; 100% of them (default: 300)", "--lr X learning rate (default: 0.0003)",
                  "--resume, --no-resume go on (default: False)", "--name TEXT a name (default: run)"):  # fmt: skip
        assert words in text
    assert "sequences at once (default" not in text


@pytest.mark.parametrize("settings", [prep.settings.Settings, train.config.TrainConfig], ids=["prep", "train"])
def test_no_help_names_two_defaults(settings, capsys):
    with pytest.raises(SystemExit):
        flags.parse(settings, ["--help"], prog="prog", description="")
    helps = re.split(r"\n  --", capsys.readouterr().out)
    assert len(helps) > 20
    assert [h for h in helps if h.count("(default") > 1] == []


def test_mutable_defaults_are_refused():
    with pytest.raises(TypeError, match="immutable"):
        flag([], "files")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("300", 300), ("0", 0), ("1_000", 1000), ("1e9", 10**9), ("1E3", 1000), ("50MB", 50_000_000), ("50mb", 50_000_000),
        ("2.5G", 2_500_000_000), ("2.5 GB", 2_500_000_000), ("16KiB", 16_384), ("1GiB", 2**30), (" 7 ", 7),
        ("0.1K", 100), ("2.3M", 2_300_000), ("1.5e3", 1500), ("9007199254740993", 9_007_199_254_740_993),
    ],
)  # fmt: skip
def test_numbers_people_write(text, value):
    assert number(text) == value
    assert type(number(text)) is int


@pytest.mark.parametrize(
    "text", ["", " ", "x", "1.5", "0.0001K", "-1", "+1", "1e-3", "1e400", "1e999999999", ".5", "5.", "1,000", "1 2", "M",
             "1ib", "1TiB", "7B", "1.5 b", "5X", "0x10", "nan", "inf", "_1", "١", "1e", "1KK"],
)  # fmt: skip
def test_what_is_no_number(text):
    with pytest.raises(ValueError, match=r"not a (whole )?number"):
        number(text)


@pytest.mark.parametrize(
    ("text", "value"), [("28B", 28 * 10**9), ("1.5 b", 15 * 10**8), ("2.5G", 25 * 10**8), ("9", 9)]
)
def test_tokens_are_counted_in_billions(text, value):
    """Bytes are not: a number of them with B alone is refused."""
    assert flags.parse(TrainConfig, ["--tokens", text], prog="p", description="")[0].tokens == value


@pytest.mark.parametrize("config", [TrainConfig, GoodputFlags, ExportFlags])
@pytest.mark.parametrize("text", ["-1", "-0.01", "nan", "inf", "-inf", "1e999", "free", ""])
def test_what_is_no_price(config, text, capsys):
    with pytest.raises(SystemExit) as e:
        flags.parse(config, [f"--price-per-hour={text}"], prog="p", description="")
    assert e.value.code == 2
    assert capsys.readouterr().err == f"error: argument --price-per-hour: {text!r} is not a price such as 1.20\n"


@pytest.mark.parametrize(("text", "value"), [("1.20", 1.2), ("0", 0.0), ("3600", 3600.0)])
def test_prices_people_write(text, value):
    assert price(text) == value


@pytest.mark.parametrize(
    ("text", "value"), [("90s", 90), ("30m", 1800), ("11.5h", 41_400), ("2d", 172_800), (" 1 H ", 3600), ("0s", 0)]
)
def test_durations_people_write(text, value):
    assert seconds(text) == value


@pytest.mark.parametrize("text", ["", "90", "h", "1h30m", "-1h", "1e3s", "inf", "nan", "1 hour", "1w", "١h", ".5h"])
def test_what_is_no_duration(text):
    with pytest.raises(ValueError, match="not a duration such as 90s, 30m"):
        seconds(text)


@given(st.integers(0, 2**63 - 1))
def test_every_whole_number_reads_as_itself(n):
    assert number(str(n)) == n


# ---- run: how a program ends ----------------------------------------------------------------------------------------


def program(body: str, how: str = "", **options: object) -> subprocess.CompletedProcess[str]:
    """Run a program whose main() is `body`; `how`: arguments of flags.run."""
    lines = "\n".join(f"    {line}" for line in body.splitlines())
    code = f"import os, sys, errno, signal\nfrom cli import flags\ndef main():\n{lines}\nflags.run(main, {how})\n"
    env = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": env, **options}
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, timeout=30, **options)


@pytest.mark.parametrize(
    ("body", "code", "line"),
    [
        ("print('ok')", 0, None),
        ("return 3", 3, None),
        ("from cli.errors import UserError; raise UserError('no such preset')", 2, "error: no such preset"),
        ("from store.errors import DataError; raise DataError('damaged')", 2, "error: damaged"),
        ("from gpt.errors import GPTError; raise GPTError('bad model')", 2, "error: bad model"),
        ("from cli.errors import UserError; raise UserError('file a\\nb.txt')", 2, "error: file a b.txt"),
        (
            "raise OSError(errno.ENOSPC, 'No space left on device', '/x')",
            2,
            "error: /x: No space left on device; make room",
        ),
        (
            "raise OSError(errno.ENOSPC, 'No space left on device')",
            2,
            "error: storage: No space left on device; make room",
        ),
        ("raise PermissionError(errno.EACCES, 'Permission denied', '/x')", 2, "error: /x: Permission denied; "),
        ("raise KeyboardInterrupt", 130, "stopped"),
        ("os.kill(os.getpid(), signal.SIGINT); import time; time.sleep(9)", 130, "stopped"),
        ("sys.exit(7)", 7, None),
    ],
)
def test_how_programs_end(body, code, line):
    """0 or its own code, 2 and one line for what a user can set right, 130 when interrupted: never a traceback."""
    ran = program(body)
    assert ran.returncode == code
    assert len(ran.stderr.splitlines()) == (line is not None)
    assert ran.stderr.startswith(line or "")


@pytest.mark.parametrize("body", ["1 / 0", "raise ValueError('x')", "raise OSError('x')", "open('/nonexistent')"])
def test_bugs_keep_their_traceback(body):
    """What no user can set right is not hidden."""
    ran = program(body)
    assert ran.returncode == 1
    assert ran.stderr.startswith("Traceback")


def test_a_closed_pipe_is_no_error():
    """`program | head -1` ends without a word."""
    read, write = os.pipe()
    os.close(read)
    try:
        ran = program("for _ in range(9999): print('x' * 99)", stdout=write)
    finally:
        os.close(write)
    assert (ran.returncode, ran.stderr) == (0, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_under_stdout_is_one_line():
    """Also when it shows only as the last line is flushed."""
    with open("/dev/full", "w") as full:
        ran = program("print('x')", stdout=full)
    assert ran.returncode == 2
    assert len(ran.stderr.splitlines()) == 1
    assert "No space left" in ran.stderr


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
@pytest.mark.parametrize("fate", ["nobody reads", "full disk", "closed"])
def test_a_job_that_outlives_its_output_ends_as_if_it_were_read(stream, fate, tmp_path):
    """Neither killed nor "finished" by a line that nobody can read."""
    if fate == "full disk" and not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    read, write = os.pipe()
    os.close(read)
    full = os.open("/dev/full" if fate == "full disk" else os.devnull, os.O_WRONLY)
    options = {stream: full if fate == "full disk" else write if fate == "nobody reads" else subprocess.DEVNULL}
    if fate == "closed":
        options["preexec_fn"] = lambda: os.close({"stdout": 1, "stderr": 2}[stream])
    end = tmp_path / "end"
    body = f"for _ in range(999): print('x' * 99, file=sys.{stream}, flush=True)\nopen({str(end)!r}, 'w')\nreturn 3"
    try:
        ran = program(body, "outlives_stdout=True", **options)
    finally:
        os.close(write), os.close(full)
    assert (ran.returncode, ran.stdout or "", ran.stderr or "") == (3, "", "")
    assert end.exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_output_goes_on_when_there_is_room_again():
    body = """there, full = os.dup(1), os.open("/dev/full", os.O_WRONLY)
for i in range(3000):
    if i in (1000, 2000):
        os.dup2(full if i == 1000 else there, 1)
    print(i, flush=True)"""
    ran = program(body, "outlives_stdout=True")
    assert ran.returncode == 0
    lines = list(map(int, ran.stdout.splitlines()))
    assert lines == sorted(lines)
    assert {*range(1000), *range(2000, 3000)} <= set(lines) < set(range(3000))


def test_a_broken_pipe_of_something_else_is_no_success():
    assert program("raise BrokenPipeError(errno.EPIPE, 'Broken pipe')", "outlives_stdout=True").returncode == 1


def test_storage_warnings_are_plain_lines():
    """A retry in store/ shows as one line on stderr, so a pause explains itself."""
    ran = program("import logging; logging.getLogger('store.fs').warning('storage: trying again')")
    assert (ran.returncode, ran.stderr) == (0, "storage: trying again\n")


def test_rendered_flags_are_read_as_the_same_settings():
    """What is not the default, whatever it begins with, comes back as it was; so do all defaults."""
    changed = TrainConfig(
        data="-odd name", model="tiny", resume=True, bias=False, steps=3, lr=1.5e-4, save_every="auto",
        prompts=("Hello!", "And you?"), seed=2**59, compile="off",
    )  # fmt: skip
    for config in (TrainConfig(), changed):
        assert flags.parse(TrainConfig, flags.render(config), prog="p", description="")[0] == config
