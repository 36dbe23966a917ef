"""Which tokens a step trains on: `batch_at(step)`, a pure function of seed, dataset, block size, global batch and step.

Training reads an endless row of epochs. In each epoch every window of `block_size` tokens is seen once: shards come in
an order of that epoch's own, windows inside a shard in a permutation of its own, and the grid of windows is shifted by
an offset of its own; with a `stride` below the block size windows overlap, and an epoch has more of them. Only one shard is read at a time, so memory-mapped reads stay local and training begins with the
first shard, while train/staging.py brings the others. There is no state: nothing to save, nothing to lose, and another micro-batch changes nothing.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from queue import Empty, Queue

import numpy as np

from cli.errors import UserError
from store.hashing import mix


def permute(index: np.ndarray, n: int, seed: int) -> np.ndarray:
    """Where each index in [0, n) goes under the seed's permutation of [0, n); any shape, int64.

    A four-round Feistel network over the next even number of bits, walked until it lands inside (Black & Rogaway 2002):
    no table, so the permutation of ten million windows costs nothing to make.
    """
    half = max((max(n - 1, 1).bit_length() + 1) // 2, 1)
    mask = np.uint64((1 << half) - 1)
    x = index.astype(np.uint64)
    todo = np.ones(x.shape, bool)
    while todo.any():
        left, right = x[todo] >> np.uint64(half), x[todo] & mask
        for r in range(4):
            left, right = right, left ^ (mix(right, seed * 4 + r) & mask)
        x[todo] = (left << np.uint64(half)) | right
        todo = x >= n
    return x.astype(np.int64)


class WindowOrder:
    """The order of windows: position in the endless row of epochs -> (shard, first token)."""

    def __init__(self, shard_tokens: list[int], block_size: int, seed: int, stride: int | None = None) -> None:
        self.stride, self.seed = stride or block_size, seed
        room = np.array(shard_tokens, np.int64) - 1 - block_size  # a window needs one token more, the last target
        whole = np.maximum(room // self.stride + 1, 0)
        self.windows = np.where(whole > 1, whole - 1, whole)  # one is given up so that the grid can shift by a stride
        self.slack = np.clip(room - (self.windows - 1) * self.stride, 0, self.stride - 1)
        self.per_epoch = int(self.windows.sum())

    def locate(self, position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(shard, first token), both int64 like `position`."""
        epoch = position // self.per_epoch
        shard, start = np.empty_like(position), np.empty_like(position)
        for e in np.unique(epoch).tolist():  # a batch touches one epoch, or two
            order = self._shard_order(e)
            ends = np.cumsum(self.windows[order])
            here = epoch == e
            within = position[here] % self.per_epoch
            slot = np.searchsorted(ends, within, "right")
            s = order[slot]
            index = within - (ends[slot] - self.windows[s])
            first = np.empty_like(index)
            for one in np.unique(s).tolist():  # … and one shard, or two
                mine = s == one
                key = int(mix(one, self.seed * 5 + e * 104729)) >> 8
                shift = key % (int(self.slack[one]) + 1)
                first[mine] = shift + permute(index[mine], int(self.windows[one]), key) * self.stride
            shard[here], start[here] = s, first
        return shard, start

    def shards_between(self, begin: int, end: int) -> Iterator[int]:
        """The shards that the windows at positions [begin, end) lie in, as they are read: each once in every epoch."""
        while begin < end:
            epoch = begin // self.per_epoch
            at = epoch * self.per_epoch
            for shard in self._shard_order(epoch).tolist():
                first, at = at, at + int(self.windows[shard])
                if at > max(begin, first) and first < end:
                    yield shard
            begin = at

    def _shard_order(self, epoch: int) -> np.ndarray:
        return np.argsort(mix(np.arange(len(self.windows)), self.seed * 3 + epoch * 7919), kind="stable")


class Batches:
    """Training batches from token arrays, one per shard. Raises UserError when they do not fill one batch.

    `lengths` tells how many tokens each array has where it may not be there yet; then `shards[i]` waits for it.
    """

    def __init__(
        self, shards: Sequence[np.ndarray], *, block_size: int, batch: int, seed: int, stride: int | None = None,
        lengths: list[int] | None = None,
    ) -> None:  # fmt: skip
        lengths = [len(s) for s in shards] if lengths is None else lengths
        self.shards, self.batch, self.block_size = shards, batch, block_size
        self.order = WindowOrder(lengths, block_size, seed, stride)
        if self.order.per_epoch < batch:
            raise UserError(f"the training split has {sum(lengths):,} tokens, {self.order.per_epoch} windows of "
                            f"{block_size}: too few for one batch of {batch}: use a smaller --batch or --block-size, "
                            "or more text")  # fmt: skip

    @property
    def windows_per_epoch(self) -> int:
        """Windows seen in one pass over the data."""
        return self.order.per_epoch

    def replayed(self, step: int) -> int:
        """How many rows of this step's batch, its last ones, are of another dataset (train/replay.py)."""
        return 0

    def position(self, step: int) -> int:
        """How many windows the steps before `step` read."""
        return step * self.batch

    def batch_at(self, step: int) -> np.ndarray:
        """(batch, block_size + 1) ids of 0-based `step`, in the shards' dtype: inputs are [:, :-1], targets [:, 1:]."""
        return self.windows(self.position(step), self.position(step + 1))

    def windows(self, begin: int, end: int) -> np.ndarray:
        """(end - begin, block_size + 1) ids: the windows at these positions in the endless row of epochs."""
        shard, start = self.order.locate(np.arange(begin, end, dtype=np.int64))
        out = None
        for s in dict.fromkeys(shard.tolist()):  # in reading order: what staging takes for passed has been copied
            mine = shard == s
            # a view of every window there could be: picking rows copies whole windows, without a loop over them
            rows = np.lib.stride_tricks.sliding_window_view(self.shards[s], self.block_size + 1)[start[mine]]
            if out is None:
                out = np.empty((end - begin, self.block_size + 1), rows.dtype)
            out[mine] = rows
        return out

    def ahead(
        self, step: int, stop: int, depth: int = 2, told_to_stop: Callable[[], bool] = lambda: False
    ) -> Iterator[np.ndarray]:
        """batch_at(step), batch_at(step + 1), … below `stop`, made in a thread while the device is busy.

        It ends early when told to stop while a shard is waited for.
        """
        queue: Queue = Queue(depth)
        ended = threading.Event()

        def work() -> None:
            try:
                for s in range(step, stop):
                    if ended.is_set():
                        return
                    queue.put(self.batch_at(s))
            except BaseException as e:  # a fault in the thread must surface in the loop
                queue.put(e)

        threading.Thread(target=work, daemon=True).start()
        try:
            for _ in range(step, stop):
                item = None
                while item is None:
                    try:
                        item = queue.get(timeout=0.1)
                    except Empty:
                        if told_to_stop():
                            return
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            ended.set()
            while not queue.empty():
                queue.get_nowait()


def validation_grid(lengths: list[int], *, block_size: int, tokens: int) -> list[tuple[int, int]]:
    """(shard, first token) of the validation windows: about `tokens` in all, spread evenly over the split."""
    grid = [(s, i * block_size) for s, length in enumerate(lengths) for i in range((length - 1) // block_size)]
    n = min(len(grid), max(1, tokens // block_size))
    return [grid[i * len(grid) // n] for i in range(n)]


def validation_windows(
    shards: Sequence[np.ndarray], *, block_size: int, tokens: int, lengths: list[int] | None = None
) -> np.ndarray:
    """(n, block_size + 1) ids, the same ones every time; n is 0 when the split holds no whole window."""
    lengths = [len(s) for s in shards] if lengths is None else lengths
    chosen = validation_grid(lengths, block_size=block_size, tokens=tokens)
    rows = [np.array(shards[s][a : a + block_size + 1]) for s, a in chosen]
    return np.stack(rows) if rows else np.empty((0, block_size + 1), np.uint16)
