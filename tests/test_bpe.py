"""Making tokenizers: quality, determinism, numbering; characters; tokenizers that the user brings."""

import json
from collections import Counter
from importlib.util import find_spec

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERNS, Tokenizer
from prep import bpe, char_level, encode, vocabulary
from prep.given import load
from tests.helpers import error_of

TEXTS = st.text() | st.text(alphabet=st.sampled_from("aA '’\n\t\r  🙂é\u0301日9.-_<|>"), max_size=60)


@pytest.fixture(scope="module")
def lines(corpus):
    return corpus.read_text("utf-8").split("\n")


@pytest.fixture(scope="module")
def tokenizer(data):
    return Tokenizer((data / "tokenizer.json").read_text("utf-8"))


def trained(texts: list[str], trainer: str, *, split: str = "o200k", **limits: int) -> Tokenizer:
    limits = {"vocab_size": 700, "min_frequency": 2} | limits
    if trainer == "tokenizers":
        return Tokenizer(bpe.train_on_texts(iter([texts]), **limits, split=split))
    pytest.importorskip("ffbpe")
    return Tokenizer(bpe.train_on_words(bpe.count_words(texts, split), **limits, split=split))


# ---- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLIT_PATTERNS)
def test_both_trainers_give_full_vocabularies_of_equal_quality(lines, split):
    """On lines that neither was trained on."""
    made = {trainer: trained(lines[::2], trainer, split=split) for trainer in ("ffbpe", "tokenizers")}
    for tokenizer in made.values():
        assert tokenizer.vocab_size == 700
        assert list(tokenizer.special_ids.values()) == [0, 1, 2, 3, 4]
    lengths = {trainer: len(t.encode_batch(lines[1::2])[0]) for trainer, t in made.items()}
    assert lengths["ffbpe"] == pytest.approx(lengths["tokenizers"], rel=0.005)


def test_merges_of_arrows_and_spaces_are_read(lines):
    """What ffbpe writes a merge with may itself be in one: "Ġ => => 55"."""
    tokenizer = trained(["x =>= a\n", "=> =>"] * 50 + lines[:200], "ffbpe", vocab_size=300)
    assert len(tokenizer.encode(" =>")) == 1
    assert len(tokenizer.encode(" =>=")) == 1


@pytest.mark.parametrize("trainer", ["ffbpe", "tokenizers"])
def test_training_is_deterministic_and_ignores_special_spellings(lines, trainer):
    texts = lines[:500] + ["<|user|> <|end|>"] * 300
    first, again = (trained(texts, trainer, vocab_size=400) for _ in range(2))
    assert first.json_text == again.json_text
    assert 1 not in first.encode("<|user|>")


@pytest.mark.parametrize("trainer", ["ffbpe", "tokenizers"])
def test_a_vocabulary_larger_than_the_text_supports_names_the_largest(trainer):
    message = error_of(lambda: trained(["abab abab"], trainer, vocab_size=1000))
    found = int(message.split("supports only ")[1].split(" ")[0])
    assert 261 < found < 270
    assert trained(["abab abab"], trainer, vocab_size=found).vocab_size == found


def test_counts_add_up_and_their_memory_is_bounded(lines, monkeypatch):
    pytest.importorskip("ffbpe")
    batches = [bpe.count_words(lines[i : i + 300], "o200k") for i in range(0, len(lines), 300)]
    whole = bpe.count_words(lines, "o200k")
    assert bpe.sum_counts(batches) == whole
    most, limit = len(max(batches, key=len)), len(whole) // 2
    monkeypatch.setattr(bpe, "MAX_WORDS", limit)
    few = bpe.sum_counts(batches)
    assert len(few) <= limit + most
    common = sorted(whole, key=whole.get)[-limit // 8 :]
    assert {word: whole[word] for word in common} == {word: few.get(word) for word in common}
    # a language without spaces: every word is new, and what came last still teaches
    strange = ({f"{i}-{j}": 1 for j in range(limit)} for i in range(5))
    assert len(bpe.sum_counts(strange)) in range(limit, 2 * limit + 1)


def test_the_texts_kept_for_numbering_do_not_depend_on_the_batches(lines):
    kept = []
    for size in (1, 7, 300, len(lines)):
        counts: dict[str, int] = {}
        batches = [lines[i : i + size] for i in range(0, len(lines), size)]
        assert list(vocabulary.keep_some(iter(batches), 9 * vocabulary.NUMBERING_BYTES, counts)) == batches
        kept.append(counts)
    assert kept[0] == Counter(lines[::10])
    assert all(counts == kept[0] for counts in kept)


# ---- numbering ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def numbered(lines):
    tokenizer = trained(lines, "tokenizers", vocab_size=1500)
    return tokenizer, Tokenizer(bpe.number_by_frequency(tokenizer.json_text, Counter(lines)))


@given(TEXTS)
@settings(max_examples=100, deadline=None)
def test_numbering_changes_the_ids_and_nothing_else(numbered, text):
    before, after = numbered
    assert [before.reference.id_to_token(i) for i in before.encode(text)] == [
        after.reference.id_to_token(i) for i in after.encode(text)
    ]
    assert after.decode(after.encode(text)) == text


def test_numbering_keeps_merges_and_special_ids_and_gives_frequent_tokens_small_bytes(numbered, lines):
    before, after = numbered
    old, new = json.loads(before.json_text), json.loads(after.json_text)
    assert old["model"]["merges"] == new["model"]["merges"]
    assert old["added_tokens"] == new["added_tokens"]
    assert after.special_ids == before.special_ids
    assert sorted(new["model"]["vocab"].values()) == list(range(1500))
    ids, _ = after.encode_batch(lines)
    frequent = np.argsort(-np.bincount(ids), kind="stable")[:20]
    assert {256, 512, 768} <= set(frequent.tolist())  # one byte is zero, the other nearly
    assert max(frequent & 255) < 32


def test_numbered_tokenizers_load_everywhere(numbered, lines):
    pytest.importorskip("fastokens")
    from transformers import PreTrainedTokenizerFast

    tokenizer = numbered[1]
    expected, _ = tokenizer.encode_batch(lines)
    ids, _ = encode.Encoder(tokenizer.json_text, "fastokens").encode_batch(lines)
    assert np.array_equal(ids, expected)
    theirs = PreTrainedTokenizerFast(tokenizer_object=tokenizer.reference)
    text = "\n".join(lines[:200])
    assert theirs(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text)
    assert theirs.decode(tokenizer.encode(text)) == text


# ---- characters -----------------------------------------------------------------------------------------------------

SEEN = "The naïve café — “yes” — 東京 пир 🙂👍🏽 \u0301\u200d\U0010ffff\ufffd\r\n\t\x00"


@pytest.fixture(scope="module")
def by_character():
    counts = char_level.count_characters([SEEN, SEEN[::-1]])
    return Tokenizer(char_level.train(counts, vocab_size=32_000, min_frequency=1))


def test_every_character_seen_is_one_token(by_character):
    assert char_level.count_characters(["aé", "é🙂"]) == {"a": 1, "é": 2, "🙂": 1}
    for character in SEEN:
        assert len(by_character.encode(character)) == 1, character
    assert len(by_character.encode(SEEN)) == len(SEEN)
    assert by_character.vocab_size < 261 + 3 * len(set(SEEN))


def test_any_order_of_frequency_makes_one_token_of_each_character():
    """All of the first plane's letters: beginnings, continuations and their prefixes in every combination."""
    plane = "".join(map(chr, [*range(0x80, 0x3000), *range(0x4E00, 0x5200), *range(0x1F300, 0x1F700)]))
    rng = np.random.default_rng(1)
    counts = dict(zip(plane, rng.integers(1, 10_000, len(plane)).tolist(), strict=True))
    tokenizer = Tokenizer(char_level.train(counts, vocab_size=60_000, min_frequency=1))
    _, lengths = tokenizer.encode_batch([*plane])
    assert lengths.tolist() == [1] * len(plane)


@given(TEXTS)
@settings(max_examples=100, deadline=None)
def test_any_text_comes_back_from_characters(by_character, text):
    ids = by_character.encode(text)
    assert by_character.decode(ids) == text
    if find_spec("fastokens"):
        assert encode.Encoder(by_character.json_text, "fastokens").encode_batch([text])[0].tolist() == ids


def test_a_small_character_vocabulary_keeps_the_frequent_ones():
    counts = {"é": 9, "日": 8, "本": 7, "ñ": 1, "x": 100}
    tokenizer = Tokenizer(char_level.train(counts, vocab_size=264, min_frequency=2))
    assert tokenizer.vocab_size == 264
    assert [len(tokenizer.encode(c)) for c in "é日本ñx"] == [1, 1, 3, 2, 1]


# ---- the user's own -------------------------------------------------------------------------------------------------


def test_a_users_own_tokenizer(tokenizer, tmp_path):
    own = tmp_path / "own.json"
    own.write_text(tokenizer.json_text, "utf-8")
    given, added = load(str(own))
    assert added == []
    assert given.encode("Hello there") == tokenizer.encode("Hello there")
    bare = json.loads(tokenizer.json_text)
    bare["added_tokens"] = [t for t in bare["added_tokens"] if t["content"] == "<|endoftext|>"]
    kept = [t for t in bare["model"]["vocab"] if t not in SPECIAL_TOKENS[1:]]
    bare["model"]["vocab"] = {t: i for i, t in enumerate(sorted(kept, key=bare["model"]["vocab"].get))}
    (tmp_path / "tokenizer.json").write_text(json.dumps(bare), "utf-8")
    extended, added = load(str(tmp_path))
    assert added == list(SPECIAL_TOKENS[1:])
    assert Tokenizer(extended.json_text).vocabulary == extended.vocabulary
    assert [i + 4 for i in extended.encode("Hello there")] == tokenizer.encode("Hello there")
    assert extended.decode(extended.render([("user", "Hi")])) == "<|endoftext|><|user|>Hi<|end|>"
    for bad, says in (
        ("{}", "not a tokenizer.json"),
        ("junk", "not a tokenizer.json"),
        (json.dumps({**bare, "normalizer": {"type": "Lowercase"}}), "does not give text back exactly"),
        (json.dumps({**bare, "normalizer": {"type": "NFC"}}), "does not give text back exactly"),
    ):
        own.write_text(bad)
        assert says in error_of(load, str(own))


def gpt2_files(folder, vocab_name: str, merges_name: str):
    """A small vocabulary in GPT-2's order: 256 bytes, merges, <|endoftext|> last."""
    tokens = [t for t in bpe.byte_vocab() if t not in SPECIAL_TOKENS]
    merges = ["h e", "l l", "he ll", "hell o", "Ġ hello", "# #", "' l", "'l l", "1 2", "12 3", "123 4"]
    tokens += [m.replace(" ", "") for m in merges] + ["<|endoftext|>"]
    folder.mkdir()
    (folder / vocab_name).write_text(json.dumps({t: i for i, t in enumerate(tokens)}), "utf-8")
    (folder / merges_name).write_text("\n".join(["#version: 0.2", *merges, ""]), "utf-8")
    return folder


@pytest.mark.parametrize("names", [("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt")])
def test_gpt2s_two_files_give_gpt2s_ids(tmp_path, names):
    from transformers import GPT2Tokenizer

    folder = gpt2_files(tmp_path / "gpt2", *names)
    made = {load(str(where))[0].json_text for where in (folder, *(folder / name for name in names))}
    assert len(made) == 1
    tokenizer = Tokenizer(made.pop())
    assert tokenizer.special_ids == {t: 267 + i for i, t in enumerate(SPECIAL_TOKENS)}
    assert tokenizer.encode("he") == [256]
    assert tokenizer.encode("hello hello") == [259, 260]
    assert tokenizer.encode("1234") == [266]  # the newer patterns cut after three digits
    theirs = GPT2Tokenizer(*(str(folder / name) for name in names))
    for text in ("hello  hello\n\n 1234 ##she'll\t x’s é 🙂 ", "<|endoftexts|>", "'LL'll 'S"):
        assert tokenizer.encode(text) == theirs(text)["input_ids"]


def test_wrong_vocabulary_files_are_one_line(tmp_path):
    folder = gpt2_files(tmp_path / "gpt2", "encoder.json", "vocab.bpe")
    good = {p.name: p.read_text("utf-8") for p in folder.iterdir()}
    vocab = json.loads(good["encoder.json"])
    for name, bad, says in (
        ("encoder.json", "junk", "encoder.json: not a vocabulary"),
        ("encoder.json", "[]", "encoder.json: not a vocabulary"),
        ("encoder.json", json.dumps({**vocab, "x": "1"}), "encoder.json: not a vocabulary"),
        ("encoder.json", json.dumps({**vocab, "more": 999}), "expected every id from 0 on, once"),
        ("encoder.json", json.dumps({t: i for i, t in enumerate(v for v in vocab if v != "Ċ")}), "give text back"),
        ("vocab.bpe", "#version: 0.2\nx y z\n", "vocab.bpe: not the merges of that vocabulary"),
        ("vocab.bpe", "#version: 0.2\nx y\n", "vocab.bpe: not the merges of that vocabulary"),
        ("vocab.bpe", "\udcff", "not UTF-8"),
        ("vocab.bpe", None, "vocab.bpe"),
    ):
        for file, text in (good | {name: bad}).items():
            (folder / file).unlink(missing_ok=True)
            if text is not None:
                (folder / file).write_bytes(text.encode("utf-8", "surrogateescape"))
        assert says in error_of(load, str(folder)), (name, bad)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "has none of tokenizer.json, encoder.json with vocab.bpe" in error_of(load, str(empty))
    assert "absent" in error_of(load, str(tmp_path / "absent"))
