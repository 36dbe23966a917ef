"""Standard input is a source like a file: same bytes, resumable once it was read, nothing left by what cannot be."""

import gzip
import io
import os
import subprocess
import sys
import time

import pytest

from prep import spool, stages
from tests.helpers import command, error_of, files, prepare

FLAGS = ("--vocab-size", 512)


@pytest.fixture
def piped(monkeypatch):
    """What the program will find at its standard input."""

    def pipe(data):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))

    return pipe


def test_piped_in_it_gives_the_bytes_of_a_file_of_that_name(corpus, tmp_path):
    (tmp_path / "stdin").write_bytes(corpus.read_bytes())
    prepare("--input", tmp_path / "stdin", "--output", tmp_path / "file", *FLAGS)
    run = command("prep/tokenize_bpe.py", "--input", "-", "--output", tmp_path / "piped", *FLAGS, "--workers", 1)
    with open(corpus, "rb") as f:
        reader, writer = os.pipe()  # a pipe, not a file: cannot be sought in
        done = subprocess.Popen(run, stdin=reader)
        os.close(reader)
        with open(writer, "wb") as pipe:
            pipe.write(f.read())
    assert done.wait(60) == 0
    names = ("metadata.json", "tokenizer.json", "train-00000.bin", "val-00000.bin")
    made, expected = files(tmp_path / "piped"), files(tmp_path / "file")
    assert [made[n] for n in names] == [expected[n] for n in names]


def test_a_run_that_has_read_it_resumes_without_it(corpus, tmp_path, monkeypatch, piped):
    piped(gzip.compress(corpus.read_bytes()))
    with monkeypatch.context() as m:
        m.setattr(stages, "select", lambda *a, **k: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare("--input", "-", "--output", tmp_path / "d", *FLAGS)
    piped(b"something else altogether")
    assert prepare("--input", "-", "--output", tmp_path / "d", *FLAGS, "--resume") == 0
    assert prepare("--input", "-", "--output", tmp_path / "d", *FLAGS, "--resume") == 0
    assert b'"kept": 2149' in files(tmp_path / "d")["report.json"]
    assert not (tmp_path / "d" / ".prep").exists()
    assert "exists already" in error_of(prepare, "--input", "-", "--output", tmp_path / "d", *FLAGS)


def test_what_was_read_in_part_is_read_anew(corpus, tmp_path, piped):
    work = tmp_path / "d" / ".prep"
    work.mkdir(parents=True)
    (work / "stdin.part").write_bytes(b"half of it, left by a kill")
    piped(corpus.read_bytes())
    assert prepare("--input", "-", "--output", tmp_path / "d", *FLAGS, "--resume") == 0
    assert b'"kept": 2149' in files(tmp_path / "d")["report.json"]


def test_what_a_failed_run_had_read_is_not_taken_for_what_is_piped_in_now(corpus, tmp_path, piped):
    work = tmp_path / "d" / ".prep"
    work.mkdir(parents=True)
    (work / "stdin").write_bytes(b"User: of a run that ended\nAssistant: before it had a job\n")
    piped(corpus.read_bytes())
    assert prepare("--input", "-", "--output", tmp_path / "d", *FLAGS) == 0
    assert b'"kept": 2149' in files(tmp_path / "d")["report.json"]


def test_a_bad_flag_is_told_before_it_is_read(tmp_path, piped):
    piped(b"User: a question\nAssistant: an answer\n")
    error_of(prepare, "--input", "-", "--output", tmp_path / "d", "--tokenizer", tmp_path / "none.json")
    assert not (tmp_path / "d").exists()


def test_a_second_reader_leaves_the_first_alone(tmp_path):
    run = command("prep/tokenize_bpe.py", "--input", "-", "--output", tmp_path / "d", *FLAGS, "--workers", 1)
    first = subprocess.Popen(run, stdin=subprocess.PIPE)
    try:
        part = tmp_path / "d" / ".prep" / "stdin.part"
        while not part.exists():
            assert first.poll() is None
            time.sleep(0.01)
        second = subprocess.run(run, input=b"User: a\n", capture_output=True)
        assert second.returncode == 2
        assert b"another process is writing there" in second.stderr
        assert part.exists()
    finally:
        first.kill()
        first.wait()


@pytest.mark.parametrize(
    ("data", "flags", "says"),
    [
        (b"", (), "the corpus is empty"),
        (bytes(range(256)) * 99, (), "looks binary"),
        (b"User: a\nAssistant: b\n", (), "were dropped"),
        (b"User: a\n", ("--num-tasks", 2, "--task-index", 0), "keep it in a file first"),
    ],
)
def test_what_cannot_be_leaves_nothing(tmp_path, piped, data, flags, says):
    piped(data)
    assert says in error_of(prepare, "--input", "-", "--output", tmp_path / "d", *FLAGS, *flags)
    assert not (tmp_path / "d").exists()


def test_needs_a_pipe_and_a_name(tmp_path, monkeypatch):
    assert "give --output" in error_of(prepare, "--input", "-")
    monkeypatch.setattr(sys, "stdin", None)
    assert "nothing is piped in" in error_of(lambda: spool.standard_input(tmp_path, anew=False))


def test_what_else_is_in_the_output_stays(tmp_path, piped):
    (tmp_path / "thesis.doc").write_bytes(b"do not touch")
    piped(b"User: a\n")
    assert "holds something else" in error_of(prepare, "--input", "-", "--output", tmp_path)
    assert files(tmp_path) == {"thesis.doc": b"do not touch"}
