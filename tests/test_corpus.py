"""Documents are read exactly once whatever the byte ranges, from every kind of file."""

import bz2
import gzip
import json
import lzma
import os
import tarfile

import pytest
import zstandard

from prep import compression, corpus, formats, labelled, reading
from tests.helpers import error_of


def read(path, task_bytes=None, monkeypatch=None):
    """All records of a file, through the plan."""
    if task_bytes:
        monkeypatch.setattr(corpus, "TASK_BYTES", task_bytes)
    return [d for b in batches(corpus.find_sources((str(path),))) for d in b.documents]


def batches(sources):
    """Everything the plan reads."""
    return [b for t in corpus.plan(sources) for p in t.pieces for b in reading.read(p)]


CHAT = "".join(
    f"User: question {i} with some words\nAssistant: answer {i}\nin two lines\n{'' if i % 3 else chr(10) + 'and a paragraph'}\n"
    + ("\n" if i % 3 else "\n\n \n")
    for i in range(200)
)


@pytest.mark.parametrize("task_bytes", [1, 7, 64, 100, 1000, 10**9])
@pytest.mark.parametrize("kind", ["chat", "jsonl", "plain", "crlf"])
def test_any_ranges_give_the_same_documents(tmp_path, monkeypatch, task_bytes, kind):
    if kind == "jsonl":
        text = "".join(json.dumps({"text": f"line {i} é"}) + "\n" for i in range(300))
    else:
        text = CHAT.replace("User:", "It was").replace("Assistant:", "and") if kind == "plain" else CHAT
        text = text.replace("\n", "\r\n") if kind == "crlf" else text
    path = tmp_path / ("a.jsonl" if kind == "jsonl" else "a.txt")
    path.write_bytes(text.encode())
    monkeypatch.setattr(formats, "DOCUMENT_CHARS", 1)  # joining paragraphs depends on the plan, which is fixed
    chat = kind in ("chat", "crlf")
    whole = list(labelled.conversations(text.encode()) if chat else formats.documents(text, kind))
    assert len(whole) >= 200
    assert read(path, task_bytes, monkeypatch) == whole


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_compressed_files_give_the_same(tmp_path, monkeypatch, suffix):
    pack = {
        ".gz": gzip.compress,
        ".bz2": bz2.compress,
        ".xz": lzma.compress,
        ".zst": zstandard.ZstdCompressor().compress,
    }
    (tmp_path / "a.txt").write_text(CHAT)
    (tmp_path / f"b.txt{suffix}").write_bytes(pack[suffix](CHAT.encode()))
    monkeypatch.setattr(reading, "CUT_BYTES", 5000)
    monkeypatch.setattr(corpus, "TASK_BYTES", 1000)  # many chunks
    assert read(tmp_path / f"b.txt{suffix}") == read(tmp_path / "a.txt")
    (tmp_path / f"bad.txt{suffix}").write_bytes(pack[suffix](CHAT.encode())[:-20])
    assert "the file is damaged" in error_of(read, tmp_path / f"bad.txt{suffix}")


def test_limit_counts_unpacked_text(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "TASK_BYTES", 1000)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(CHAT.encode()))
    sources = corpus.find_sources((str(tmp_path / "a.txt.gz"),))
    (task,) = corpus.plan(sources, limit=3000)
    assert 2000 < sum(b.text_bytes for b in reading.read(task.pieces[0])) <= 3000


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("task_bytes", [100, 1000, 3500, 10**6])
def test_a_huge_record_is_cut_the_same_in_any_ranges(tmp_path, monkeypatch, task_bytes, packed):
    monkeypatch.setattr(corpus, "TASK_BYTES", task_bytes)
    monkeypatch.setattr(reading, "CUT_BYTES", 2000)
    monkeypatch.setattr(formats, "DOCUMENT_CHARS", 1)
    text = "before\n\n" + "x" + "é" * 5000 + "\n\nshort " + "y" * 2900 + "\n\nlast"
    path = tmp_path / "a.txt"
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    (source,) = corpus.find_sources((str(path),))
    assert source.kind == "plain"
    found = batches([source])
    said = [d[0][1] for b in found for d in b.documents]
    # at 2,000 to 8,000: a character begins one byte before; at 10,000 what is left is no longer than it may be
    assert [len(t.encode()) for t in said if "é" in t] == [1999 - 8, 2000, 2000, 2000, 10_009 - 7999]
    assert "\n\n".join(said).replace("é\n\né", "éé") == text
    assert sum(b.cut for b in found) == 4
    assert sum(b.invalid_utf8 for b in found) == 0
    assert max(b.text_bytes for b in found) <= 4000


def test_ranges_inside_a_huge_record_do_not_read_all_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "TASK_BYTES", 1 << 20)
    monkeypatch.setattr(reading, "CUT_BYTES", 1 << 20)
    path = tmp_path / "a.txt"
    path.write_bytes(b"x" * (16 << 20))
    count = 0
    real = compression.Unpacked.read

    def read(self, n):
        nonlocal count
        count += len(data := real(self, n))
        return data

    sources = corpus.find_sources((str(path),))
    monkeypatch.setattr(compression.Unpacked, "read", read)
    assert sum(b.text_bytes for b in batches(sources)) == 16 << 20
    assert count < 8 * (16 << 20)  # not the square of it


def test_find_sources(tmp_path):
    for name in ("b.txt", "a.jsonl", "sub/c d.txt", "sub/é.txt.gz", ".hidden/x.txt", "image.png"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(gzip.compress(b"text") if name.endswith("gz") else b'{"text": "hello"}')

    def names(*inputs):
        return [s.url.removeprefix(str(tmp_path) + "/") for s in corpus.find_sources(tuple(map(str, inputs)))]

    assert names(tmp_path) == ["a.jsonl", "b.txt", "sub/c d.txt", "sub/é.txt.gz"]
    assert names(tmp_path / "*.txt", tmp_path / "b.txt") == ["b.txt"]  # each once
    assert names(tmp_path / "image.png") == ["image.png"]  # named by hand: taken as text if it is
    assert "no text found" in error_of(corpus.find_sources, (str(tmp_path / "*.pdf"),))


def test_small_files_are_worked_on_together(tmp_path):
    for i in range(300):
        (tmp_path / f"{i:03}.txt").write_text(f"User: question {i}\nAssistant: answer {i}\n")
    (task,) = corpus.plan(corpus.find_sources((str(tmp_path),)))
    assert [p.source.url[-7:] for p in task.pieces] == [f"{i:03}.txt" for i in range(300)]


def test_tasks_never_mix_inputs(tmp_path):
    for name in "abcd":
        (tmp_path / f"{name}.txt").write_text(f"User: question {name}\nAssistant: answer\n")
    inputs = tuple(str(tmp_path / n) for n in ("b.txt", "*.txt", "a.txt"))
    tasks = corpus.plan(corpus.find_sources(inputs))
    assert [(t.group, [p.source.url[-5:] for p in t.pieces]) for t in tasks] == [
        (0, ["b.txt"]),
        (1, ["a.txt", "c.txt", "d.txt"]),
    ]


def test_kind_is_seen_in_the_text(tmp_path):
    (tmp_path / "chat.txt").write_text(CHAT)
    (tmp_path / "plain.txt").write_text("It is a truth universally acknowledged.\n\nUser: is a word too.\n\nAnd so on.")
    assert [s.kind for s in corpus.find_sources((str(tmp_path),))] == ["chat", "plain"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", r"empty \(0 bytes\)"),
        ("text".encode("utf-16"), "looks binary.*iconv"),
        (bytes(range(256)) * 20, "looks binary"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path, content, says):
    import re

    (tmp_path / "a.txt").write_bytes(content)
    assert re.search(says, error_of(corpus.find_sources, (str(tmp_path / "a.txt"),)))


def test_invalid_utf8_is_counted_or_refused(tmp_path):
    lone = b"caf\xe9 don\x92t \x93so\x94 na\xefve"
    assert formats.decode(lone) == ("café don’t “so” naïve", 5)
    other = "ok \ufffd é".encode() + b" \xff\xfe caf\xc3 \xcf\xf0\xe8\xe2\xe5\xf2 \x81 \xe2\x80"
    assert formats.decode(other) == ("ok \ufffd é \ufffd caf\ufffd \ufffd \ufffd \ufffd", 5)
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    (task,) = corpus.plan(corpus.find_sources((str(tmp_path / "a.txt"),)))
    assert "--clean strict refuses it" in error_of(
        lambda: [list(b.documents) for b in reading.read(task.pieces[0], strict=True)]
    )


def test_a_changed_file_has_another_fingerprint(tmp_path):
    path = tmp_path / "a.txt"

    def fingerprint(content):
        path.write_bytes(content)
        (source,) = corpus.find_sources((str(path),))
        return source.fingerprint

    lines = [b"User: number %07d\nAssistant: yes\n\n" % i for i in range(60_000)]
    whole = b"".join(lines)
    known = {
        "whole": fingerprint(whole),
        "the first byte": fingerprint(b"H" + whole[1:]),
        "the last byte": fingerprint(whole[:-1] + b" "),
        "a line moved": fingerprint(b"".join(lines[1:30_000] + lines[:1] + lines[30_000:])),
        "another order": fingerprint(b"".join(reversed(lines))),
    }
    assert len(set(known.values())) == len(known)
    assert fingerprint(whole) == known["whole"]  # put back: the date of a file is not its content


def test_what_a_shell_made_of_a_glob_is_one_input(tmp_path):
    names = [str(tmp_path / f"{i}.txt") for i in range(corpus.MAX_GROUPS + 1)]
    for name in names:
        (tmp_path / name).write_text("Some words of a small file.\n")
    assert len(corpus.plan(corpus.find_sources(names))) == 1
    assert [s.group for s in corpus.find_sources(names[1:])] == [*range(corpus.MAX_GROUPS)]
    assert len({s.group for s in corpus.find_sources(names, grouped=True)}) == len(names)


def test_a_tar_is_refused_though_its_text_would_pass_for_a_file(tmp_path):
    (tmp_path / "a.txt").write_text("User: hi\nAssistant: hello\n\n" * 1000)
    archive = tmp_path / "a.txt.gz"
    with tarfile.open(archive, "w:gz") as packed:
        packed.add(tmp_path / "a.txt", "a.txt")
    assert "a tar archive: unpack it first" in error_of(corpus.find_sources, [str(archive)])


def test_a_name_that_is_not_utf8_is_refused(tmp_path):
    """Reports and metadata name their sources, in UTF-8."""
    path = os.fsencode(tmp_path) + b"/\xffbad.txt"
    with open(path, "w") as f:
        f.write("Some words.\n")
    for named in (os.fsdecode(path), str(tmp_path)):
        assert "not UTF-8: rename" in error_of(corpus.find_sources, [named])
