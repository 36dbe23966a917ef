"""A mixture has the asked shares of text, uses the scarcest source whole, and repeats nothing."""

import json

import numpy as np
import pytest

from prep import mixing
from store.shards import TokenShards
from tests.helpers import error_of, files, prepare


def test_parse():
    assert mixing.parse(()) is None
    mix = mixing.parse(("a b.txt=0.7", "https://h/x?a=1&b=2=3"))
    assert (mix.inputs, mix.weights) == (("a b.txt", "https://h/x?a=1&b=2"), (0.7, 3.0))
    for bad in ("a.txt", "a.txt=", "=0.5", "a.txt=nan", "a.txt=inf", "a.txt=x"):
        assert "expected SOURCE=SHARE" in error_of(mixing.parse, (bad,))
    for bad in ("a.txt=0", "a.txt=-1"):
        assert "a share is more than 0" in error_of(mixing.parse, (bad,))
    assert "named twice" in error_of(mixing.parse, ("a.txt=0.5", "b.txt=1", "a.txt=0.5"))


def test_fractions_are_the_largest_total_without_repeats():
    mix = mixing.Mix(("a", "b", "c"), (7, 2, 1))
    have = np.array([1000.0, 4000.0, 100.0])
    used = np.array(mixing.fractions(mix, have))
    assert used.max() == 1
    taken = used * have
    assert taken / taken.sum() == pytest.approx([0.7, 0.2, 0.1])
    assert "b has no text" in error_of(mixing.fractions, mix, np.array([1.0, 0.0, 1.0]))


def test_choice_is_by_content_up_to_the_byte():
    rng = np.random.default_rng(1)
    hashes, group = rng.integers(0, 2**64, 20_000, np.uint64), rng.integers(0, 2, 20_000)
    n_bytes = rng.integers(0, 500, 20_000).astype(np.uint32)
    chosen = mixing.choose([1.0, 0.3], group, hashes, n_bytes, 5)
    assert (chosen == (n_bytes > 0))[group == 0].all()
    given = n_bytes[(group == 1) & chosen].sum() / n_bytes[group == 1].sum()
    assert 0.2998 < given <= 0.3
    order = rng.permutation(20_000)
    again = mixing.choose([1.0, 0.3], group[order], hashes[order], n_bytes[order], 5)
    assert (again == chosen[order]).all()
    assert (mixing.choose([1.0, 0.3], group, hashes, n_bytes, 6) != chosen).any()


@pytest.fixture
def two_sources(corpus, tmp_path):
    lines = [f"the {i}th line says that {i * 7919 % 10007} apples were sold" for i in range(8000)]
    (tmp_path / "b=c.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))
    return f"{corpus}=3", f"{tmp_path / 'b=c.jsonl'}=1"


def test_mix_makes_a_dataset_of_the_asked_shares(two_sources, tmp_path, capsys):
    flags = ("--vocab-size", 512, "--dedup", "exact")
    assert prepare("--mix", *two_sources, "--output", tmp_path / "d", *flags) == 0
    report = json.loads((tmp_path / "d" / "report.json").read_bytes())
    chat, lines = report["sources"]
    assert chat["text_bytes"] / lines["text_bytes"] == pytest.approx(3, rel=0.01)
    assert max(chat["fraction"], lines["fraction"]) == 1
    assert chat["documents"] + lines["documents"] == report["counts"]["encoded"]
    total = TokenShards(str(tmp_path / "d")).metadata["totals"]
    assert chat["tokens"] + lines["tokens"] == sum(t["tokens"] for t in total.values())
    assert report["counts"]["left_out_of_mix"] > 0
    assert "of what it has" in capsys.readouterr().out
    assert str(tmp_path) not in (tmp_path / "d" / "metadata.json").read_text()
    assert prepare("--mix", *two_sources, "--output", tmp_path / "again", *flags) == 0
    assert files(tmp_path / "again").keys() == files(tmp_path / "d").keys()
    for name in ("metadata.json", "report.json", "train-00000.bin"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "d" / name).read_bytes()
    other = error_of(
        prepare, "--mix", two_sources[0], two_sources[1] + "1", "--output", tmp_path / "d", *flags, "--resume"
    )
    assert "was begun with --mix 3.0, 1.0, now it is 3.0, 11.0" in other


def test_mix_errors(two_sources, corpus, tmp_path):
    out = ("--output", tmp_path / "d")
    assert "leave --input out" in error_of(prepare, "--mix", *two_sources, "--input", corpus, *out)
    assert "--limit" in error_of(prepare, "--mix", *two_sources, "--limit", "1kB", *out)
    same = error_of(prepare, "--mix", f"{corpus}=1", f"{corpus.parent}/*.txt=2", *out)  # its files went to the first
    assert "has no text after cleaning" in same
    assert not (tmp_path / "d").exists()
