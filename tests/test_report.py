"""The report shows what is in the data, is equal for equal data, and can be opened whatever the corpus holds."""

import json
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest

from cli import progress
from cli.progress import Meter
from gpt.tokenizer import Tokenizer
from prep import figures, parts, report, report_page, timing, verdict
from scripts import inspect_data
from tests.helpers import prepare

VOCAB = 50


# ---- what is counted ------------------------------------------------------------------------------------------------


def encoded_part(documents, rng):
    """A part of documents given as lists of ids; each is one turn of plain text."""
    place = np.sort(rng.integers(2**63, 2**64, len(documents), dtype=np.uint64))
    lengths = np.array([len(d) for d in documents], np.uint32)
    ids = np.concatenate(documents).astype(np.uint16)
    one = np.ones(len(documents), np.uint32)
    text = parts.Documents(np.zeros(len(ids), np.uint8), lengths, one.astype(np.uint8) * 0, one, place)
    return text, lengths.astype(np.int64), parts.Encoded(place, lengths, ids)


def measured(documents, rng, limit=2**64 - 1):
    text, turn_ids, encoded = encoded_part(documents, rng)
    return figures.measure(text, turn_ids, encoded, vocab_size=VOCAB, spread_limit=limit)


def random_documents(rng, n):
    return [rng.integers(0, VOCAB, int(rng.integers(5, 80))) for _ in range(n)]


def test_counts_are_right_and_parts_add_up(monkeypatch):
    monkeypatch.setattr(figures, "BITMAP_BYTES", 7 * VOCAB)  # several blocks, the last one not full
    documents = random_documents(np.random.Generator(np.random.PCG64(1)), 200)
    whole = measured(documents, np.random.Generator(np.random.PCG64(2)))
    by_group = [measured(d, np.random.Generator(np.random.PCG64(2))) for d in (documents[:60], documents[60:])]
    counted = figures.Counted.of(enumerate(by_group), 2, special_ids=[])
    assert counted.group_totals[:, 0].tolist() == [60, 140]
    split = counted.total
    for name, array in vars(whole).items():
        assert np.array_equal(array, getattr(split, name)), name
    everything = np.concatenate(documents)
    assert whole.totals.tolist() == [200, len(everything), len(everything)]
    assert whole.ids.tolist() == [int((everything == i).sum()) for i in range(VOCAB)]
    assert whole.spread[1].tolist() == [sum(i in d for d in documents) for i in range(VOCAB)]
    assert whole.doc_ids.sum() == whole.turns.sum() == 200
    assert whole.doc_turns.sum() == 0  # no conversations
    assert figures.bins(np.array([1, 2, 3])).tolist() == [0, 1, 2]


def test_the_spread_sample_is_the_first_training_documents():
    rng = np.random.Generator(np.random.PCG64(3))
    half = measured(random_documents(rng, 400), rng, limit=figures.spread_limit(2 * figures.SPREAD_BYTES))
    assert 140 < half.spread_docs[0].sum() < 260
    assert figures.spread_limit(10) == 2**64 - 1


def test_validation_documents_are_not_in_the_spread_sample():
    rng = np.random.Generator(np.random.PCG64(6))
    text, turn_ids, encoded = encoded_part([np.full(9, 1)] * 5 + [np.full(9, 2)] * 5, rng)
    encoded.place[:5] >>= np.uint64(1)  # what validates stands first
    counted = figures.measure(text, turn_ids, encoded, vocab_size=VOCAB, spread_limit=2**64 - 1)
    assert counted.spread[:, 1:3].tolist() == [[0, 45], [0, 5]]
    assert counted.ids[1:3].tolist() == [45, 45]


def test_garbage_of_few_documents_is_suspicious_and_ordinary_tokens_are_not():
    """Token 49 is as frequent as others, but sits in 3 % of the documents; 48 in half of them is only a topic."""
    rng = np.random.Generator(np.random.PCG64(4))
    documents = [rng.integers(0, 48, 40) for _ in range(1000)]
    for i in range(0, 1000, 33):
        documents[i] = np.concatenate([documents[i], np.full(60, 49)])
    for i in range(0, 1000, 2):
        documents[i] = np.concatenate([documents[i], [48, 48]])
    counted = measured(documents, rng)
    assert figures.suspects(counted, special_ids=[0]).tolist() == [49]
    assert figures.suspects(counted, special_ids=[49]).tolist() == []
    expected = figures.expected_documents(counted)
    assert expected[49] > 8 * counted.spread[1][49]
    assert expected[5] == pytest.approx(counted.spread[1][5], rel=0.05)


def test_a_watch_sees_the_same_however_documents_are_cut():
    rng = np.random.Generator(np.random.PCG64(5))
    documents = random_documents(rng, 300)
    counted = measured(documents, rng)
    table = figures.watch_table(figures.Counted(np.zeros((0, 3)), counted, np.array([7])))
    _, lengths, encoded = encoded_part(documents, rng)
    begins = np.append(0, np.cumsum(lengths))

    def watched(cuts):
        seen = []
        for shard in cuts:
            watch = figures.Watch(table)
            for a, b in shard:
                watch.look(encoded.place[a:b], lengths[a:b], encoded.ids[begins[a] : begins[b]])
            seen.append(json.loads(json.dumps(watch.seen)))
        return figures.join(seen)

    whole = watched([[(0, 300)]])
    assert watched([[(0, 10), (10, 150)], [(150, 151), (151, 300)]]) == whole
    assert sum(whole["bits"]) == 300
    assert len(whole["likely"]) == len(whole["unlikely"]) == figures.EXTREMES
    bits = [sum(table[0][d].tolist()) / len(d) / figures.BIT for d in documents]
    long_enough = sorted(b for b, d in zip(bits, documents, strict=True) if len(d) >= figures.EXTREME_TOKENS)
    assert [d[0] for d in whole["likely"]] == long_enough[: figures.EXTREMES]
    assert [d[0] for d in whole["unlikely"]] == long_enough[: -figures.EXTREMES - 1 : -1]
    first = next(i for i, d in enumerate(documents) if 7 in d)
    assert whole["suspects"]["1"][0] == encoded.place[first]
    assert whole["longest"] == max(lengths)


# ---- the page -------------------------------------------------------------------------------------------------------

HOSTILE = [
    "<script>alert(1)</script>", "</div></main><img src=x onerror=alert(1)>", "\"' onmouseover=alert(1) x='", "${body} $title",
    "a\x00b\x1b[31m", "\u202eevil\u2066x\u2069", "one\u2028two\u2029", "".join(map(str, range(170_000))), "<!--", "]]>", "&lt;b&gt; &amp;", "\ufeff\u200b\xad",
]  # fmt: skip


class Page(HTMLParser):
    """Every tag with its attributes, and all text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A dataset of hostile conversations, cleaned of nothing."""
    folder = tmp_path_factory.mktemp("hostile")
    name = "a<b>\"'&\u202e.jsonl"
    lines = [
        json.dumps(
            {
                "messages": [
                    {"role": "user", "content": f"{text} number {i}"},
                    {"role": "assistant", "content": "Right. " * 20},
                ]
            }
        )
        for i in range(30)
        for text in HOSTILE
        if i == 0 or len(text) < 100
    ]
    (folder / name).write_text("\n".join([*lines, '{"broken <script>alert(2)</script>']), encoding="utf-8")
    out = folder / "out"
    assert prepare("--input", folder / name, "--output", out, "--vocab-size", 400, "--clean", "off") == 0
    return out


def test_hostile_text_stays_text(hostile):
    text = (hostile / "report.html").read_text("utf-8")
    page = Page(text)
    known = ("html head meta title style body main h1 h2 h3 b section div p span ul li table thead tbody tr th td i details summary "
                "figure svg g rect line text polyline small code bdi mark br dl dt dd footer script a")  # fmt: skip
    assert {tag for tag, _ in page.tags} <= {*known.split()}
    assert [a.get("src") for tag, a in page.tags if tag == "script"] == ["timing.js", None]
    attributes = {name for _, a in page.tags for name in a}
    assert not {n for n in attributes if n.startswith("on")} | (attributes & {"srcset", "action", "data"})
    assert all(
        a["href"] in ("#flow", "#shape", "#sources", "#tokens", "#documents") for _, a in page.tags if "href" in a
    )
    assert not [c for c in "\x00\x1b\u202e\u2028\u2066\ufeff\u200b" if c in text]
    assert "U+202E" in page.text
    assert "alert(2)" in page.text  # the first broken record
    assert len(text) < 200_000  # with a word of a megabyte in the corpus
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy
    assert "unsafe-inline" not in policy.split("script-src")[1]


def test_the_page_loads_nothing_from_anywhere(hostile):
    text = (hostile / "report.html").read_text("utf-8")
    for outside in ("http:", "https:", "//fonts", "@import", "url("):
        assert outside not in text


def test_shown_text_is_escaped_cut_and_spelled_out():
    assert report_page.shown("<b>&\"'") == "&lt;b&gt;&amp;&quot;&#x27;"
    assert report_page.shown("a\u202eb") == 'a<span class="odd">U+202E</span>b'
    assert report_page.shown("\ud800\x00\x01") == "".join(
        f'<span class="odd">U+{code}</span>' for code in ("D800", "0000", "0001")
    )
    assert report_page.cut("x" * 50, 10) == "x" * 10 + " …"
    plain = "family: \U0001f468\u200d\U0001f469, naïve, עברית\n\tcode"
    assert report_page.shown(plain) == plain
    assert report_page.token("  a\n<") == (
        '<code><bdi><span class="blank">··</span>a<span class="blank">⏎</span>&lt;</bdi></code>'
    )


def test_a_tiny_corpus_has_a_page_too(tmp_path):
    corpus, out = tmp_path / "three.txt", tmp_path / "d"
    corpus.write_text("User: a\nAssistant: b\n\nUser: c\nAssistant: d\n\nUser: e\nAssistant: f\n")
    assert prepare("--input", corpus, "--output", out, "--vocab-size", 261, "--clean", "light") == 0
    found = json.loads((out / "report.json").read_text())
    assert found["verdict"]["level"] == "look"
    assert found["surprise"]["least_likely"] == []
    assert "No document has 32 tokens" in (out / "report.html").read_text()


# ---- report.json ----------------------------------------------------------------------------------------------------


def test_the_figures_agree_with_the_dataset(corpus, data):
    found = json.loads((data / "report.json").read_text("utf-8"))
    metadata = json.loads((data / "metadata.json").read_text("utf-8"))
    assert found["totals"] == metadata["totals"]
    tokens = sum(t["tokens"] for t in found["totals"].values())
    documents = sum(t["documents"] for t in found["totals"].values())
    (source,) = found["sources"]
    assert (source["name"], source["bytes"]) == ("corpus.txt", corpus.stat().st_size)
    assert (source["tokens"], source["documents"]) == (tokens, documents)
    assert source["documents"] == found["counts"]["encoded"]
    length = found["lengths"]["document_tokens"]
    assert length["p5"] <= length["median"] <= length["p95"] <= length["longest"]
    for name, total in (("document_tokens", documents), ("conversation_turns", documents)):
        assert sum(n for *_, n in found["lengths"][name]["bins"]) == total
    assert sum(found["surprise"]["documents_by_quarter_bit"]) == documents
    turns = sum(r["turns"] for r in found["roles"].values())
    special = documents + 2 * turns
    assert sum(r["tokens"] for r in found["roles"].values()) + special == tokens
    assert sum(found["vocabulary"]["tokens_by_bytes"]) + special == tokens
    spelled = report.token_bytes(Tokenizer((data / "tokenizer.json").read_text("utf-8")))
    assert {bytes([b]) for b in range(256)} <= set(spelled)


def test_each_input_has_its_own_figures(corpus, tmp_path):
    blocks = corpus.read_text("utf-8").split("\n\n")
    (tmp_path / "a.txt").write_text("\n\n".join(blocks[:150]))
    (tmp_path / "b").mkdir()
    for name, some in (("b1.txt", blocks[150:200]), ("b2.txt", blocks[200:250])):
        (tmp_path / "b" / name).write_text("\n\n".join(some))
    out = tmp_path / "d"
    assert prepare("--input", tmp_path / "a.txt", tmp_path / "b", "--output", out, "--vocab-size", 400) == 0
    found = json.loads((out / "report.json").read_text("utf-8"))
    first, second = found["sources"]
    assert [(s["name"], s["files"]) for s in (first, second)] == [("a.txt", 1), ("b1.txt", 2)]
    assert first["bytes"] == (tmp_path / "a.txt").stat().st_size
    assert second["bytes"] == sum(f.stat().st_size for f in (tmp_path / "b").iterdir())
    assert first["read_documents"] + second["read_documents"] == found["counts"]["documents"]
    assert first["tokens"] + second["tokens"] == sum(t["tokens"] for t in found["totals"].values())
    assert 1.2 < first["tokens"] / second["tokens"] < 1.8


def test_what_a_mixture_leaves_out_is_shown(corpus, tmp_path):
    (tmp_path / "b.txt").write_bytes(corpus.read_bytes()[:20_000])
    mix = ("--mix", f"{corpus}=0.5", f"{tmp_path / 'b.txt'}=0.5", "--dedup", "off")
    assert prepare(*mix, "--output", tmp_path / "d", "--vocab-size", 300) == 0
    found = json.loads((tmp_path / "d" / "report.json").read_text("utf-8"))
    text = Page((tmp_path / "d" / "report.html").read_text("utf-8")).text
    assert "Left out by --mix" in text
    assert f"{verdict.percent(found['sources'][0]['fraction'])} of its text used" in text


def good_report(**changes):
    """The report of a corpus that nothing is wrong with, with some of its keys changed."""
    length = {"p5": 40, "median": 200, "p95": 900, "bins": [[4, 4, 1000]], "longest": 2000}
    made = {
        "counts": {"bytes": 4 * 10**8, "documents": 10**6, "kept": 10**6, "duplicates": 10, "invalid_utf8": 0},
        "totals": {"train": {"tokens": 10**8, "documents": 990_000}, "val": {"tokens": 10**6, "documents": 10_000}},
        "sources": [{"name": "a.txt", "tokens": 6 * 10**7, "text_bytes": 24 * 10**7}, {"name": "b.txt", "tokens": 4 * 10**7, "text_bytes": 16 * 10**7}],
        "lengths": {"document_tokens": length, "turn_tokens": length, "conversation_turns": length},
        "roles": {"user": {"turns": 10, "tokens": 100}, "assistant": {"turns": 10, "tokens": 300}},
        "vocabulary": {"size": 32000, "never_used": 10, "seldom_used": 1000, "very_long": 0, "suspicious": []},
        "surprise": {"bits_per_token": 10.0, "odd_from_bits": 13.0, "documents_by_quarter_bit": [0] * 40 + [1000]},
    }  # fmt: skip
    for path, value in changes.items():
        *way, last = path.split("__")
        inner = made
        for key in way:
            inner = inner[key]
        inner[last] = value
    return made


def test_a_good_corpus_is_called_good():
    assert verdict.verdict(good_report()) == {"level": "good", "headline": "Nothing suspicious found", "findings": []}


@pytest.mark.parametrize(
    ("changes", "level", "says"),
    [
        ({"counts__invalid_utf8": 10**6}, "stop", "not UTF-8"),
        ({"counts__invalid_utf8": 10**5}, "look", "one in 4,000 bytes"),
        ({"counts__invalid_utf8": 3}, "good", "3 byte sequences"),
        ({"counts__dropped_few_letters": 600_000}, "stop", "60 % of the documents were dropped by one rule: few letters"),
        ({"counts__dropped_few_letters": 60_000}, "look", "6.0 %"),
        ({"counts__dropped_broken_json": 5_000}, "look", "5,000 records could not be read"),
        ({"counts__duplicates": 300_000}, "look", "Duplicates: 30 % of the documents"),
        ({"counts__near_duplicates": 300_000}, "look", "Near-duplicates: 30 %"),
        ({"totals__train__tokens": 10**5}, "look", "Only 100,000 tokens"),
        ({"totals__val": {"tokens": 0, "documents": 0}}, "look", "No document validates"),
        ({"totals__val": {"tokens": 900, "documents": 3}}, "look", "validation split is tiny: 900 tokens in 3 documents"),
        ({"counts__cut": 2}, "look", "were cut, 2 times"),
        ({"lengths__document_tokens__longest": 5 * 10**7}, "look", "One document alone holds 50 %"),
        ({"lengths__document_tokens__median": 12}, "look", "half of them have 12 tokens"),
        ({"lengths__conversation_turns__bins": [[1, 1, 5], [2, 2, 5]]}, "look", "50 % of the conversations have a single turn"),
        ({"roles__assistant__tokens": 5}, "look", "Only 4.8 % of what is said"),
        ({"sources": [{"name": "a", "tokens": 99, "text_bytes": 400}, {"name": "b", "tokens": 1, "text_bytes": 4}]}, "look", "a alone gives 99.00 %"),
        ({"sources": [{"name": "a", "tokens": 80, "text_bytes": 400}, {"name": "b", "tokens": 20, "text_bytes": 30}]}, "look", "b gives 1.50 bytes"),
        ({"sources": [{"name": "a", "tokens": 80, "text_bytes": 400}, {"name": "c", "tokens": 80, "text_bytes": 400}, {"name": "b", "tokens": 0, "text_bytes": 0}]}, "look", "Nothing of b was kept"),
        ({"vocabulary__never_used": 3200}, "good", "3,200 of 32,000 tokens occur nowhere"),
        ({"vocabulary__very_long": 3, "vocabulary__longest": ["-" * 64]}, "look", "3 tokens are longer than any word"),
        ({"vocabulary__suspicious": [{"token": " <td", "count": 10**6}]}, "look", "“<td”; 1.0 % of all tokens"),
        ({"surprise__documents_by_quarter_bit": [0] * 40 + [950] + [0] * 15 + [50]}, "look", "5.0 % of the documents are made of"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(changes, level, says):
    found = verdict.verdict(good_report(**changes))
    assert found["level"] == level
    assert [
        f["section"]
        for f in found["findings"]
        if f["section"] not in ("flow", "shape", "sources", "tokens", "documents")
    ] == []
    assert [says in f["what"] for f in found["findings"]] == [True], found


def test_the_worst_comes_first():
    found = verdict.verdict(
        good_report(counts__invalid_utf8=3, counts__dropped_few_letters=600_000, counts__duplicates=300_000)
    )
    assert [f["level"] for f in found["findings"]] == ["stop", "look", "note"]
    assert found["headline"] == "Do not train on this yet"


def test_inspecting_a_dataset_tells_the_verdict(data, tmp_path, capsys):
    copy = shutil.copytree(data, tmp_path / "copy")
    found = json.loads((copy / "report.json").read_text("utf-8"))
    found["verdict"] = {"level": "look", "headline": "Look", "findings": [{"level": "look", "what": "a \x1b[31m"}]}
    (copy / "report.json").write_text(json.dumps(found))
    assert inspect_data.main(["--data", str(copy)]) == 0
    assert f"report     Look ({copy}/report.html)\nlook       a �[31m\n" in capsys.readouterr().out
    (copy / "report.json").unlink()
    assert inspect_data.main(["--data", str(copy)]) == 0


# ---- timing ---------------------------------------------------------------------------------------------------------


def test_the_time_of_each_pass_is_beside_the_page(data):
    text = (data / "timing.js").read_text()
    assert text.startswith("var perennial_timing = {")
    told = json.loads(text.removeprefix("var perennial_timing = ").removesuffix(";\n"))
    assert [p[0] for p in told["passes"]] == ["clean", "tokenizer", "encode", "write"]
    assert "interrupted" not in told["about"]
    resumed = timing.timing_js([], elapsed_s=3, workers=2, resumed=True)
    assert b"went on from an interrupted one" in resumed


def test_only_meters_that_finish_are_recorded(capsys):
    with progress.recorded() as meters:
        with Meter("one", 1, "B"):
            pass
        with pytest.raises(ZeroDivisionError), Meter("two", 1, "B"):
            raise ZeroDivisionError
    with Meter("three", 1, "B"):
        pass
    assert [m.what for m in meters] == ["one"]
