"""Selection depends on content and seed alone."""

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from prep import dedup
from store.hashing import mix


def hashes(n, seed=0):
    return np.random.Generator(np.random.PCG64(seed)).integers(0, 2**64, n, dtype=np.uint64)


@given(st.lists(st.integers(0, 5)), st.sampled_from([1, 2**60, 2**64 - 1]))
def test_each_document_knows_its_earliest_equal(values, factor):
    doc_hash = np.array([v * factor % 2**64 for v in values], np.uint64)
    assert dedup.earliest_equal(doc_hash).tolist() == [values.index(v) for v in values]


def test_largest_groups_come_first_and_those_of_one_size_in_order():
    earliest = dedup.earliest_equal(np.array([9, 5, 3, 5, 9, 3, 3, 7], np.uint64))
    assert dedup.largest_groups(earliest, 20) == [(2, 3), (0, 2), (1, 2)]
    assert dedup.largest_groups(earliest, 2) == [(2, 3), (0, 2)]


def test_mix_is_one_to_one_and_fixed():
    assert len(np.unique(mix(np.arange(100_000), 3))) == 100_000
    assert mix(np.arange(3), 1).tolist() == FROZEN  # the order of every dataset ever made hangs on these


FROZEN = [487617019471545679, 17911839290282890590, 10987583248141275951]


def test_equal_documents_are_on_one_side_and_shares_hold():
    doc_hash = hashes(20_000)
    key = dedup.shuffle_key(np.concatenate([doc_hash, doc_hash]), 1)
    val = dedup.validates(key, dedup.validation_limit(key, 0.05, 1), 1)
    assert np.array_equal(val[:20_000], val[20_000:])
    assert abs(val.mean() - 0.05) < 0.005
    assert abs(dedup.below(doc_hash, 0.3, 4).mean() - 0.3) < 0.01


def test_adding_documents_moves_none():
    key = dedup.shuffle_key(hashes(5000), 1)
    some = dedup.validates(key[:4000], dedup.validation_limit(key[:4000], 0.05, 1), 1)
    all_ = dedup.validates(key, dedup.validation_limit(key, 0.05, 1), 1)
    assert np.array_equal(some, all_[:4000])


def test_a_tiny_corpus_still_validates_on_one_document():
    key = dedup.shuffle_key(hashes(3), 1)
    assert dedup.validates(key, dedup.validation_limit(key, 0.0001, 1), 1).sum() == 1
    assert dedup.validates(key, dedup.validation_limit(key, 0.0, 1), 1).sum() == 0
    one = key[:1]
    assert dedup.validation_limit(one, 0.0001, 1) == int(0.0001 * 2**64)  # a lone document trains


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=50), st.integers(1, 3000))
@settings(max_examples=100, deadline=None)
def test_shards_cover_all_documents_and_are_about_equal(tokens, shard_tokens):
    tokens = np.array(tokens)
    limits = dedup.shard_limits(tokens, shard_tokens)
    assert (limits[0], limits[-1]) == (0, len(tokens))
    assert (np.diff(limits) > 0).all()
    sizes = [int(tokens[a:b].sum()) for a, b in itertools.pairwise(limits)]
    wanted = min(-(-tokens.sum() // shard_tokens), len(tokens))
    assert len(sizes) <= wanted
    assert max(sizes) <= tokens.sum() / wanted + tokens.max()
