"""MinHash against sets counted by hand and by plain Python."""

import re

import numpy as np
import pytest

from prep import minhash
from prep.parts import Documents

WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "house",
    "tree",
    "river",
    "sings",
    "runs",
    "under",
    "over",
    "between",
    "red",
    "blue",
    "seven",
    "eight",
    "slowly",
    "never",
]


def build(*texts):
    return Documents.build([[(None, text)] for text in texts])


def words_of(text):
    hashes, starts = minhash.words(text)
    return dict(zip(starts.tolist(), hashes.tolist(), strict=True))


def random_text(rng, n):
    return " ".join(rng.choice(WORDS, n))


def change(text, rng, share):
    words = text.split()
    for i in np.flatnonzero(rng.random(len(words)) < share):
        words[i] = "other"
    return " ".join(words)


def plain_shingles(text):
    """A word with the two after it, of which those at the end have none."""
    words = [*re.findall(r"\w+", text.lower()), "", ""]
    return {tuple(words[i : i + 3]) for i in range(len(words) - 2)}


def plain_jaccard(a, b):
    a, b = plain_shingles(a), plain_shingles(b)
    return len(a & b) / len(a | b)


def true_jaccard(*texts):
    hashes, counts = minhash.shingle_sets(build(*texts))
    return float(minhash.jaccard(np.split(hashes, np.cumsum(counts)[:-1]), np.array([0]), np.array([1]))[0])


def test_words_are_runs_of_letters_and_digits_in_any_case_or_script():
    found = words_of("Don't PANIC - don’t panic, 42×!")
    assert list(found) == [0, 4, 6, 14, 18, 20, 27]
    don, t, panic, don2, t2, panic2, _ = found.values()
    assert (don, t, panic) == (don2, t2, panic2)
    assert len({don, t, panic}) == 3
    assert list(words_of(["Привет", "ПРИВЕТ"][0]).values()) == list(words_of("ПРИВЕТ").values())
    assert len(set(words_of("ÀÉ àé e\u0301té").values())) == 2


def test_scripts_without_spaces_are_read_letter_by_letter():
    assert list(words_of("今天天气很好。")) == [0, 1, 2, 3, 4, 5]
    assert len(words_of("สวัสดี")) > 3
    assert true_jaccard("今天天气很好我们出去走走吧朋友", "今天天气很好我们出去走走吧朋支") == 12 / 18


def test_turns_and_documents_do_not_run_into_each_other():
    one = Documents.build([[("user", "good"), ("assistant", "night")]])
    same = Documents.build([[("user", "good night")]])
    other = Documents.build([[("user", "goodnight")]])
    first, second, third = (minhash.shingles(d)[0].tolist() for d in (one, same, other))
    assert first == second != third
    alone = minhash.shingles(build("red cat"))[0].tolist()
    assert minhash.shingles(build("red cat", "runs over"))[0].tolist()[:2] == alone


def test_the_jaccard_index_is_that_of_sets_counted_plainly():
    assert true_jaccard("the red cat runs under the tree", "The RED cat, runs under the house!") == 4 / 10
    rng = np.random.Generator(np.random.PCG64(0))
    for share in (0.0, 0.02, 0.1, 0.5):
        text = random_text(rng, 300)
        changed = change(text, rng, share)
        assert true_jaccard(text, changed) == pytest.approx(plain_jaccard(text, changed), abs=1e-12)
    assert true_jaccard("Hi", "hi!") == 1
    assert true_jaccard("Hi", "Hello") == 0


def test_texts_without_words_are_like_their_equals_alone():
    hashes, counts = minhash.shingles(build("!!!", "???", "a cat", "!!!"))
    assert counts.tolist() == [1, 1, 2, 1]
    assert hashes[0] == hashes[4] != hashes[1]


def test_signatures_agree_as_often_as_the_sets_are_alike():
    rng = np.random.Generator(np.random.PCG64(1))
    errors = []
    for share in (0.01, 0.05, 0.1, 0.2):
        text = random_text(rng, 400)
        changed = change(text, rng, share)
        left, right = minhash.signatures(*minhash.shingles(build(text, changed)), 2000).T
        errors.append(float((left == right).mean()) - plain_jaccard(text, changed))
    assert max(map(abs, errors)) < 0.045  # four standard deviations of 2,000 draws


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.9, 1.0])
def test_pairs_of_the_threshold_become_candidates(threshold):
    bands, rows = minhash.band_shape(threshold)
    assert bands * rows <= minhash.PERMUTATIONS
    assert 1 - (1 - threshold**rows) ** bands >= minhash.RECALL
    longer = rows + 1  # would let too many go, or has no room
    assert longer > minhash.PERMUTATIONS or (
        1 - (1 - threshold**longer) ** (minhash.PERMUTATIONS // longer) < minhash.RECALL
    )


def test_a_document_has_the_same_keys_in_any_company(monkeypatch):
    rng = np.random.Generator(np.random.PCG64(2))
    texts = [random_text(rng, int(n)) for n in rng.integers(1, 300, 60)]
    together = minhash.band_keys(build(*texts), 0.8)
    monkeypatch.setattr(minhash, "BLOCK_BYTES", 900)
    assert np.array_equal(minhash.band_keys(build(*texts), 0.8), together)
    alone = [minhash.band_keys(build(text), 0.8) for text in texts]
    assert np.array_equal(np.concatenate(alone, axis=1), together)
    sets = minhash.shingle_sets(build(*texts))
    assert sets[1].tolist() == [len(plain_shingles(t)) for t in texts]


def test_keys_stay_what_they_are():
    """Two machines, or two versions, must find the same duplicates."""
    keys = minhash.band_keys(build("the quick brown fox jumps over the lazy dog"), 0.8)
    assert keys[:3, 0].tolist() == FROZEN


FROZEN = [1117108604, 2980956437, 1742791188]
