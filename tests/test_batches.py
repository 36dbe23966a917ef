"""batch_at(step) is pure, sees every window once an epoch, and does not depend on anything else."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cli.errors import UserError
from train.batches import Batches, WindowOrder, permute, validation_windows

BLOCK = 8


def shards(*lengths: int) -> list[np.ndarray]:
    """Shards whose ids are all different, so that a window tells where it came from."""
    ends = np.cumsum(lengths)
    return [np.arange(e - n, e, dtype=np.uint16) for n, e in zip(lengths, ends, strict=True)]


@given(st.integers(1, 3000), st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_permute_is_a_permutation(n, seed):
    assert sorted(permute(np.arange(n), n, seed).tolist()) == list(range(n))


def test_permute_differs_by_seed_and_is_not_the_identity():
    a, b = permute(np.arange(1000), 1000, 1), permute(np.arange(1000), 1000, 2)
    assert (a != b).mean() > 0.9
    assert (a != np.arange(1000)).mean() > 0.9


@given(st.lists(st.integers(0, 300), min_size=1, max_size=5), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_every_window_is_seen_once_an_epoch_and_none_overlaps(lengths, seed):
    order = WindowOrder(lengths, BLOCK, seed)
    if not order.per_epoch:
        assert max(lengths) <= BLOCK
        return
    for epoch in range(3):
        shard, start = order.locate(np.arange(epoch * order.per_epoch, (epoch + 1) * order.per_epoch))
        for s, n in enumerate(lengths):
            mine = np.sort(start[shard == s])
            assert len(mine) == order.windows[s]
            assert len(mine) == 0 or (mine[0] >= 0 and mine[-1] + BLOCK + 1 <= n)
            assert (np.diff(mine) == BLOCK).all()  # a grid: none twice, no gap
    assert order.per_epoch * BLOCK >= sum(n - 2 * BLOCK for n in lengths if n > 2 * BLOCK)  # at most two blocks lost


@given(st.lists(st.integers(0, 300), min_size=1, max_size=5), st.integers(0, 99), st.integers(1, BLOCK))
@settings(max_examples=60, deadline=None)
def test_with_a_stride_windows_begin_so_many_tokens_apart(lengths, seed, stride):
    order = WindowOrder(lengths, BLOCK, seed, stride)
    assert order.per_epoch >= WindowOrder(lengths, BLOCK, seed).per_epoch
    if not order.per_epoch:
        return
    for epoch in range(2):
        shard, start = order.locate(np.arange(epoch * order.per_epoch, (epoch + 1) * order.per_epoch))
        for s, n in enumerate(lengths):
            mine = np.sort(start[shard == s])
            assert (np.diff(mine) == stride).all()
            if len(mine):
                assert mine[0] in range(stride)  # nothing at the beginning or the end goes unseen for want of a window
                assert n - 2 * stride < mine[-1] + BLOCK + 1 <= n


def test_epochs_differ_in_order_and_in_grid():
    order = WindowOrder([1000, 1000], BLOCK, 1)
    starts = [order.locate(np.arange(e * order.per_epoch, (e + 1) * order.per_epoch)) for e in range(8)]
    assert len({tuple(s[0].tolist()) for s in starts}) > 1  # shards change places
    assert len({tuple(s[1].tolist()) for s in starts}) == 8
    assert len({int(s[1][s[0] == 0].min()) % BLOCK for s in starts}) > 2


def test_one_shard_at_a_time():
    order = WindowOrder([500, 500, 500], BLOCK, 3)
    shard, _ = order.locate(np.arange(order.per_epoch))
    assert (np.diff(shard) != 0).sum() == 2


@given(
    st.lists(st.integers(0, 300), min_size=1, max_size=5), st.integers(0, 99), st.integers(0, 400), st.integers(0, 400)
)
@settings(max_examples=60, deadline=None)
def test_the_shards_between_are_those_that_are_read_in_that_order(lengths, seed, begin, length):
    order = WindowOrder(lengths, BLOCK, seed)
    if not order.per_epoch:
        return
    positions = np.arange(begin, begin + length)
    read = dict.fromkeys(zip((positions // order.per_epoch).tolist(), order.locate(positions)[0].tolist(), strict=True))
    assert list(order.shards_between(begin, begin + length)) == [shard for _, shard in read]


def test_batches_are_pure_and_span_epochs():
    data = shards(200, 333, 90)
    a = Batches(data, block_size=BLOCK, batch=16, seed=5)
    b = Batches(data, block_size=BLOCK, batch=16, seed=5)
    steps = 3 * a.windows_per_epoch // 16
    forward = [a.batch_at(s) for s in range(steps)]
    backward = [b.batch_at(s) for s in reversed(range(steps))][::-1]
    assert all(np.array_equal(x, y) for x, y in zip(forward, backward, strict=True))
    for ids in forward:
        assert ids.shape == (16, BLOCK + 1)
        assert (np.diff(ids.astype(int), axis=1) == 1).all()  # whole windows of one shard
    assert not np.array_equal(forward[0], Batches(data, block_size=BLOCK, batch=16, seed=6).batch_at(0))


def test_batch_size_cuts_the_same_row_differently():
    data = shards(500, 300)
    small, large = (Batches(data, block_size=BLOCK, batch=n, seed=1) for n in (4, 12))
    assert np.array_equal(np.concatenate([small.batch_at(s) for s in range(30)]),
                          np.concatenate([large.batch_at(s) for s in range(10)]))  # fmt: skip


def test_ahead_equals_batch_at_and_can_be_left():
    b = Batches(shards(500), block_size=BLOCK, batch=4, seed=1)
    for step, ids in zip(range(3, 9), b.ahead(3, 9), strict=True):
        assert np.array_equal(ids, b.batch_at(step))
    iterator = b.ahead(0, 1_000_000)
    next(iterator)
    iterator.close()


def test_a_fault_in_the_thread_surfaces():
    b = Batches(shards(500), block_size=BLOCK, batch=4, seed=1)
    b.batch_at = lambda step: 1 / 0
    with pytest.raises(ZeroDivisionError):
        next(b.ahead(0, 5))


def test_too_few_tokens_for_a_batch_is_a_clear_error():
    with pytest.raises(UserError, match=r"99 tokens.*too few for one batch of 64"):
        Batches(shards(99), block_size=BLOCK, batch=64, seed=1)


def test_the_order_never_changes():
    """Checkpoints of older versions must go on with the same data: these values are part of the format."""
    b = Batches(shards(200, 333, 90), block_size=BLOCK, batch=4, seed=1)
    assert [b.batch_at(s)[:, 0].tolist() for s in (0, 7, 100)] == FROZEN


FROZEN = [[109, 101, 37, 93], [555, 579, 587, 547], [292, 260, 492, 516]]


def test_validation_windows_are_fixed_and_spread():
    data = shards(100, 50, 3)
    w = validation_windows(data, block_size=BLOCK, tokens=6 * BLOCK)
    assert np.array_equal(w, validation_windows(data, block_size=BLOCK, tokens=6 * BLOCK))
    assert w.shape == (6, BLOCK + 1)
    assert w[0, 0] == 0
    assert w[-1, 0] >= 100
    assert len(validation_windows(shards(5), block_size=BLOCK, tokens=100)) == 0
    assert len(validation_windows(data, block_size=BLOCK, tokens=10**9)) == 12 + 6
