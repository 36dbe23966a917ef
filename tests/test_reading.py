"""Hostile and unreliable inputs: one clear line or a counted loss, bounded memory, and the same bytes once all is back."""

import bz2
import json
import lzma
import os
import subprocess
import sys

import pytest
import zstandard

from prep import compression, corpus, reading
from tests.helpers import ROOT, error_of, files, prepare

FLAGS = ("--vocab-size", 512)


@pytest.mark.parametrize("fault", ["vanished", "shrank", "all but its beginning lost", "became a folder"])
def test_a_source_that_fails_in_mid_run_is_one_line_and_the_restart_gives_the_same_bytes(
    corpus, tmp_path, monkeypatch, fault
):
    from prep import corpus as planning

    monkeypatch.setattr(planning, "TASK_BYTES", 50_000)
    path = tmp_path / "corpus.txt"
    whole = corpus.read_bytes()
    path.write_bytes(whole)
    prepare("--input", path, "--output", tmp_path / "quiet", *FLAGS)
    calls, real = 0, reading.read

    def failing(piece, *args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == 5:
            path.unlink()
            if fault == "shrank":
                path.write_bytes(whole[:300_000])
            elif fault == "became a folder":
                path.mkdir()
            elif fault == "all but its beginning lost":
                path.write_bytes(whole[:100])
        return real(piece, *args, **kwargs)

    with monkeypatch.context() as m:
        m.setattr(reading, "read", failing)
        message = error_of(prepare, "--input", path, "--output", tmp_path / "d", *FLAGS)
    assert "corpus.txt" in message
    assert calls > 4
    if path.is_dir():
        path.rmdir()
    path.write_bytes(whole)
    calls = 10
    assert prepare("--input", path, "--output", tmp_path / "d", *FLAGS, "--resume") == 0
    assert files(tmp_path / "d").keys() == files(tmp_path / "quiet").keys()
    for name, expected in files(tmp_path / "quiet").items():
        assert name == "timing.js" or files(tmp_path / "d")[name] == expected, name


def test_another_file_under_the_same_name_is_not_mixed_in(corpus, tmp_path, monkeypatch):
    from prep import stages

    path = tmp_path / "corpus.txt"
    path.write_bytes(corpus.read_bytes())
    with monkeypatch.context() as m:
        m.setattr(stages, "select", lambda *a, **k: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare("--input", path, "--output", tmp_path / "d", *FLAGS)
    path.write_bytes(corpus.read_bytes()[:-1] + b"!")
    assert "they have changed" in error_of(prepare, "--input", path, "--output", tmp_path / "d", *FLAGS, "--resume")


PACKERS = {
    "gzip": lambda: gzip_stream(),
    "bz2": bz2.BZ2Compressor,
    "xz": lambda: lzma.LZMACompressor(preset=0),
    "zstd": lambda: zstandard.ZstdCompressor(level=1).compressobj(),
}


def gzip_stream():
    import zlib

    return zlib.compressobj(wbits=31)


@pytest.mark.parametrize(
    ("packer", "filling"), [(p, b"\0") for p in PACKERS] + [("zstd", b"User: ha\nAssistant: ha\n\n")]
)
def test_a_bomb_is_refused_in_bounded_time_and_memory(tmp_path, packer, filling):
    """What would unpack to gigabytes: refused once it has unpacked to far more than its size."""
    stream, path = PACKERS[packer](), tmp_path / "bomb.txt"
    block = filling * ((1 << 20) // len(filling))
    with open(path, "wb") as f:
        f.write(
            stream.compress(b"User: text first, so that it looks like a corpus.\nAssistant: Yes, it does.\n\n" * 5000)
        )
        for _ in range(96):
            f.write(stream.compress(block))
        f.write(stream.flush())
    code = (
        "import resource, sys\n"
        "from prep import compression, corpus, reading\n"
        "compression.BOMB_BYTES = 8 << 20\n"
        f"(task,) = corpus.plan(corpus.find_sources(({str(path)!r},)))\n"
        "try:\n"
        "    total = 0\n"
        "    for batch in reading.read(task.pieces[0]):\n"
        "        total += batch.text_bytes\n"
        "except Exception as e:\n"
        "    print(total, e)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "as a decompression bomb does" in done.stdout, done.stdout + done.stderr
    assert int(done.stdout.split()[0]) < 90 << 20


def test_honest_text_is_no_bomb(tmp_path):
    text = "".join(
        f"User: what is {i} times {j}?\nAssistant: It is {i * j}.\n\n" for i in range(300) for j in range(100)
    )
    (tmp_path / "a.txt.xz").write_bytes(lzma.compress(text.encode()))
    ratio = len(text) / (tmp_path / "a.txt.xz").stat().st_size
    assert 5 < ratio < compression.BOMB_RATIO / 4


def test_broken_lines_are_counted_and_the_first_is_shown_with_its_number(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(corpus, "TASK_BYTES", 2000)
    lines = [
        json.dumps({"text": f"line {i} has some words in it, and they are all different: {i * i}."})
        for i in range(3000)
    ]
    lines[1234] = '{"text": "line 1234 has a person@example.org \x1b[31m'
    lines[2345] = "[" * 5000
    lines[2800] = '{"id": 5}'
    (tmp_path / "a b.jsonl").write_text("\n".join(lines))
    assert prepare("--input", tmp_path / "a b.jsonl", "--output", tmp_path / "d", *FLAGS) == 0
    warning = capsys.readouterr().err
    assert 'a b.jsonl, line 1235 (broken_json): \'{"text": "line 1234 has' in warning
    assert "\x1b" not in warning
    assert "person@example.org" not in warning
    report = json.loads((tmp_path / "d" / "report.json").read_bytes())
    assert report["counts"]["dropped_broken_json"] == 2
    assert report["counts"]["dropped_no_text_field"] == 1
    assert report["first_unusable"] in warning


def test_records_without_known_fields_are_told_with_what_they_hold(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "some text"}\n' * 50)
    message = error_of(prepare, "--input", tmp_path / "a.jsonl", "--output", tmp_path / "d", *FLAGS)
    assert "50 no_text_field" in message
    assert 'a.jsonl, line 1 (no_text_field): \'{"body": ' in message
    assert "--text-field" in message


def test_many_tiny_files_with_odd_names(tmp_path):
    folder = tmp_path / "in put"
    for i in range(1000):
        path = folder / f"größe {i % 10}" / f"字 {i}\u0301 '\".txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"User: What is the square of {i}?\nAssistant: The square of {i} is {i * i}, I think.\n")
    tasks = corpus.plan(corpus.find_sources((str(folder),)))
    assert len(tasks) == 1
    assert sum(len(list(b.documents)) for p in tasks[0].pieces for b in reading.read(p)) == 1000


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_told(tmp_path):
    (tmp_path / "a.txt").write_text("secret")
    (tmp_path / "a.txt").chmod(0)
    assert "a.txt: cannot open: Permission denied" in error_of(corpus.find_sources, (str(tmp_path / "a.txt"),))


def test_conversations_are_the_same_however_a_chunk_is_cut(tmp_path, monkeypatch):
    text = "\ufeffUser: a\n\nits second paragraph\n \t\nAssistant: b\n\n\n\nHUMAN : c\nbot:d\n\nusual: no label\n\nSystem: e\nUser: é"
    path = tmp_path / "a.txt"
    path.write_bytes(b"\n\n".join([text.encode(), b"caf\xe9"] * 9))
    (task,) = corpus.plan(corpus.find_sources((str(path),)))
    cuts = []
    for n_bytes in (1 << 20, 100, 1):
        monkeypatch.setattr(reading, "CACHED_BYTES", n_bytes)
        batches = list(reading.read(task.pieces[0]))
        cuts.append(([list(b.documents) for b in batches], [b.invalid_utf8 for b in batches]))
    assert cuts[0] == cuts[1] == cuts[2]
    assert (len(cuts[0][0][0]), cuts[0][1]) == (19, [9])
