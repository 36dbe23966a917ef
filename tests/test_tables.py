"""Rows of CSV, Parquet and Arrow files and elements of JSON arrays become the same documents as JSONL records."""

import gzip
import json
import random

import pytest

from prep import corpus, reading, tables
from prep.formats import Fields, Unusable
from store import fs
from tests.helpers import error_of

ALPACA = [
    {"instruction": f"do {i}", "input": "x" if i % 2 else "", "output": f'line one\nline "two", é {i}'}
    for i in range(500)
]
DOCUMENTS = [
    [("user", f"do {i}" + ("\n\nx" if i % 2 else "")), ("assistant", r["output"])] for i, r in enumerate(ALPACA)
]


def read(path, fields=reading.KNOWN_FIELDS, **options):
    tasks = corpus.plan(corpus.find_sources((str(path),), fields), **options)
    return [d for t in tasks for p in t.pieces for b in reading.read(p, fields) for d in b.documents]


def write_csv(path, rows, **options):
    import csv

    with open(path, "w", newline="", encoding=options.pop("encoding", "utf-8")) as f:
        writer = csv.DictWriter(f, rows[0].keys(), **options)
        writer.writeheader()
        writer.writerows(rows)


@pytest.mark.parametrize(
    "options", [{}, {"delimiter": ";"}, {"delimiter": "\t"}, {"lineterminator": "\n"}, {"encoding": "utf-8-sig"}]
)
@pytest.mark.parametrize("task_bytes", [100, 1 << 20])
def test_csv(tmp_path, monkeypatch, options, task_bytes):
    monkeypatch.setattr(corpus, "TASK_BYTES", task_bytes)
    monkeypatch.setattr(reading, "CUT_BYTES", 2000)
    write_csv(tmp_path / "a.csv", ALPACA, **options)
    assert read(tmp_path / "a.csv") == DOCUMENTS
    (tmp_path / "b.tsv.gz").write_bytes(gzip.compress((tmp_path / "a.csv").read_bytes()))
    assert read(tmp_path / "b.tsv.gz") == DOCUMENTS


def test_csv_rows_that_cannot_be_read_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "MAX_FIELD_CHARS", 1000)
    long = "y" * 2000
    (tmp_path / "a.csv").write_text(f'id,text\n1,one\n2,two,2\n3\n\n4,"{long}"\n5,"five\nlines"\n')
    found = read(tmp_path / "a.csv")
    assert [d for d in found if isinstance(d, list)] == [[(None, "one")], [(None, "five\nlines")]]
    assert [(d.reason, d.line) for d in found if isinstance(d, Unusable)] == [("broken_row", n) for n in (3, 4, 6)]


def test_a_quote_that_never_closes_takes_a_bounded_part(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "MAX_FIELD_CHARS", 1000)
    lines = [f"{i},line {i}\n" for i in range(1000)]
    lines[100] = '100,"an open quote\n'
    (tmp_path / "a.csv").write_text("id,text\n" + "".join(lines))
    found = read(tmp_path / "a.csv")
    assert sum(isinstance(d, Unusable) for d in found) == 1
    assert len(found) > 850


def test_columns_without_text_are_told(tmp_path):
    (tmp_path / "a.csv").write_text("id,body,said,answered\n1,hello,a,b\n")
    message = error_of(read, tmp_path / "a.csv")
    assert "no text in its columns id, body, said, answered" in message
    assert "--text-field" in message
    assert read(tmp_path / "a.csv", Fields(text="body")) == [[(None, "hello")]]
    assert read(tmp_path / "a.csv", Fields(user="said", assistant="answered")) == [[("user", "a"), ("assistant", "b")]]
    assert "no text" in error_of(read, tmp_path / "a.csv", Fields(text="Body"))


@pytest.mark.parametrize("task_bytes", [50, 999, 5000, 1 << 20])
def test_parquet_row_groups_belong_to_one_range(tmp_path, monkeypatch, task_bytes):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(corpus, "TASK_BYTES", task_bytes)
    monkeypatch.setattr(tables, "BATCH_BYTES", 200)
    pq.write_table(pa.Table.from_pylist(ALPACA), tmp_path / "a.parquet", row_group_size=37)
    assert read(tmp_path / "a.parquet") == DOCUMENTS
    chats = [{"id": i, "messages": [{"role": r, "content": t} for r, t in d]} for i, d in enumerate(DOCUMENTS)]
    pq.write_table(pa.Table.from_pylist(chats), tmp_path / "b.parquet", row_group_size=100)
    assert read(tmp_path / "b.parquet") == DOCUMENTS
    assert len(read(tmp_path / "b.parquet", limit=3000)) in range(10, 500)


def test_parquet_in_a_bucket(gcs, tmp_path, monkeypatch):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(corpus, "TASK_BYTES", 3000)
    pq.write_table(pa.Table.from_pylist(ALPACA), tmp_path / "a.parquet", row_group_size=100)
    fs.put_file("gs://bucket/data/a.parquet", tmp_path / "a.parquet")
    assert read("gs://bucket/data") == DOCUMENTS


@pytest.mark.parametrize("form", ["stream", "file"])
def test_arrow(tmp_path, monkeypatch, form):
    pa = pytest.importorskip("pyarrow")
    monkeypatch.setattr(tables, "BATCH_BYTES", 2000)
    folder = tmp_path / "dataset" / "train"
    folder.mkdir(parents=True)
    table = pa.Table.from_pylist(ALPACA)
    path = folder / "data-00000-of-00001.arrow"
    with (pa.ipc.new_stream if form == "stream" else pa.ipc.new_file)(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=130)
    # what Hugging Face's save_to_disk writes beside it
    (folder / "state.json").write_text('{"_data_files": []}')
    (folder / "cache-1234.arrow").write_bytes(path.read_bytes())
    assert read(tmp_path / "dataset") == DOCUMENTS
    assert len(read(tmp_path / "dataset", limit=5000)) in range(10, 400)


def test_a_damaged_table_is_one_clear_error(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(ALPACA), path, row_group_size=100)
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    assert "a.parquet: cannot be read" in error_of(read, path)
    path.write_bytes(whole[:50] + bytes(400) + whole[450:])
    assert "a.parquet: cannot be read" in error_of(read, path)
    path = tmp_path / "b.arrow"
    path.write_bytes(b"no arrow file")
    assert "b.arrow: cannot be read" in error_of(read, path)
    (tmp_path / "c.parquet").write_bytes(gzip.compress(whole))
    assert "packed inside" in error_of(read, tmp_path / "c.parquet")


def test_strings_that_are_no_utf8_cost_their_row_alone(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    raw = pa.array([b"one", b"caf\xe9", b"three"])
    pq.write_table(pa.table({"text": pa.Array.from_buffers(pa.string(), 3, raw.buffers())}), tmp_path / "a.parquet")
    found = read(tmp_path / "a.parquet")
    assert (found[0], found[2]) == ([(None, "one")], [(None, "three")])
    assert (found[1].reason, found[1].line) == ("broken_row", 2)


def test_without_pyarrow_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(tables.importlib.util, "find_spec", lambda name: None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    assert "pip install pyarrow" in error_of(read, tmp_path / "a.parquet")


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("piece", [1, 7, 100, 10**6])
def test_json_array_in_any_pieces(indent, piece):
    values = [{"text": 'a, ]} \\ " é 😀', "n": [1, {"b": None}]}, "string", 12345, -1.5e3, [], {}, True, None, [[1]]]
    text = json.dumps(values * 3, indent=indent, ensure_ascii=bool(indent))
    assert list(tables.json_array(text[i : i + piece] for i in range(0, len(text), piece))) == values * 3
    assert list(tables.json_array(iter([" [ ] "]))) == []


@pytest.mark.parametrize(
    "text", ["", "{}", "[", "[1", "[1,", '[{"a": 1', "[1 2]", "[tru]", "[" * 100_000, '["' + "x" * 1000]
)
def test_broken_json_array_raises(text):
    with pytest.raises(ValueError, match=r"."):
        list(tables.json_array(iter([text]), max_chars=500))


def test_json_files(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "TASK_BYTES", 1000)
    (tmp_path / "a.json").write_text(json.dumps(ALPACA, indent=2))
    assert read(tmp_path / "a.json") == DOCUMENTS
    assert len(read(tmp_path / "a.json", limit=5000)) in range(10, 400)
    (tmp_path / "b.json").write_text("\n".join(map(json.dumps, ALPACA)))  # so are many: JSON Lines by another name
    assert read(tmp_path / "b.json") == DOCUMENTS
    (tmp_path / "c.json").write_text(json.dumps({"data": ALPACA}, indent=2))
    assert "convert it to .jsonl" in error_of(read, tmp_path / "c.json")
    (tmp_path / "d.json").write_text(json.dumps(ALPACA)[:-30])
    assert "broken JSON" in error_of(read, tmp_path / "d.json")


def test_all_formats_agree_on_random_records(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rng = random.Random(1)
    letters = 'ab,;"\n\t\\é😀{}[] '
    rows = [
        {k: "".join(rng.choices(letters, k=rng.randrange(1, 9))) for k in ("prompt", "response")} for _ in range(300)
    ]
    write_csv(tmp_path / "a.csv", rows)
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    expected = [[("user", r["prompt"]), ("assistant", r["response"])] for r in rows]
    for suffix in ("csv", "json", "jsonl", "parquet"):
        assert read(tmp_path / f"a.{suffix}") == expected, suffix
