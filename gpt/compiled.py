"""Decoding by one compiled graph of one shape: on a GPU, a CUDA graph that is launched once per token.

A small model's kernels are shorter than the time Python takes to launch them one by one. A graph needs shapes and
addresses that stay: the cache is allocated once and used again by every text, a step attends to all of its positions and
hides those that are not there yet, and rows that have ended are computed along (the arrangement of gpt-fast, and of
transformers' StaticCache). The prompt runs as it would without.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from gpt.cache import KVCache
from gpt.decoding import linear
from gpt.model import GPT


def compile_decoding(model: GPT, batch: int = 1) -> GPT:
    """The same model, whose texts of `batch` prompts at once are decoded by a compiled graph from now on.

    The first step compiles, seconds to a minute. Weights must not be replaced or moved afterwards (written into: yes).
    """
    model.compiled_cache = CompiledCache(model, batch)
    return model


@contextmanager
def cache_for(model: GPT, batch: int) -> Iterator[KVCache]:
    """The cache that compile_decoding gave the model, where it has this many rows and is free; else a fresh one."""
    compiled = getattr(model, "compiled_cache", None)
    if compiled is None or compiled.k.shape[1] != batch or not compiled.in_use.acquire(blocking=False):
        yield KVCache(model.config, batch, dtype=model.wte.weight.dtype, device=model.wte.weight.device)
        return
    try:
        compiled.rows = list(range(batch))
        yield compiled
    finally:
        compiled.in_use.release()


class CompiledCache(KVCache):
    """A cache that also decodes: single positions by the graph, all else as its parent does."""

    def __init__(self, model: GPT, batch: int) -> None:
        weight = model.wte.weight
        super().__init__(model.config, batch, dtype=weight.dtype, device=weight.device)
        self.in_use = threading.Lock()
        self.rows = list(range(batch))  # those still growing, of the `batch` that are always computed
        self.next_ids = torch.zeros(batch, dtype=torch.int64, device=weight.device)
        self.next_positions = torch.zeros_like(self.next_ids)
        self.step = torch.compile(_one_token, fullgraph=True, dynamic=False)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.model = model

    def decode_one_token(self, ids: Tensor) -> Tensor:
        """Logits (B, V) after one more id for each growing row, ids (B,)."""
        self.make_room(1)
        self.next_ids[self.rows] = ids
        self.next_positions[self.rows] = torch.tensor(self.lengths, device=ids.device)
        self.lengths = [length + 1 for length in self.lengths]
        inputs = (self.model, self.next_ids, self.next_positions, self.k, self.v)
        if ids.device.type != "cuda":
            return self.step(*inputs)[self.rows]
        if self.graph is None:
            self.record(inputs)
        self.graph.replay()
        return self.logits[self.rows]  # a copy: the next replay overwrites them

    def record(self, inputs: tuple) -> None:
        """Compile the step, then record its kernels. What it writes into the cache it would write again: no harm.

        By hand and not by torch.compile(mode="reduce-overhead"), whose graphs belong to the thread that made them.
        """
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):  # as torch's documentation asks: libraries set themselves up at their first calls
                self.step(*inputs)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # a server's other threads use the GPU too
            self.logits = self.step(*inputs)
        self.graph = graph  # where recording failed there is none

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if len(self.rows) == self.k.shape[1]:
            return super().update(layer, k, v)
        rows = torch.tensor(self.rows, device=k.device)
        for store, new in ((self.k[layer], k), (self.v[layer], v)):
            store[rows[:, None], :, self.positions] = new.transpose(1, 2).to(store.dtype)  # (B, T, H, D)
        return self.k[layer, rows, :, : self.used], self.v[layer, rows, :, : self.used]

    def keep_rows(self, rows: Sequence[int]) -> None:
        self.rows = [self.rows[row] for row in rows]
        self.lengths = [self.lengths[row] for row in rows]


@torch.no_grad()
def _one_token(model: GPT, ids: Tensor, positions: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Logits (B, V) of one more id at a position of its own in each row, ids and positions (B,); writes into k and v."""
    x = model.hidden(ids[:, None], cache=_OnePosition(positions, k, v))  # (B, 1, C)
    return linear(x[:, 0], model.head_weight)


class _OnePosition:
    """What Attention asks of a cache, without anything that depends on how full it is."""

    causal = False

    def __init__(self, positions: Tensor, k: Tensor, v: Tensor) -> None:
        self.positions, self.k, self.v = positions, k, v
        self.mask = (torch.arange(k.shape[3], device=k.device) <= positions[:, None])[:, None, None]  # (B, 1, 1, S)

    def advance(self, T: int) -> Tensor:
        return self.positions[:, None]

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        rows = torch.arange(k.shape[0], device=k.device)
        for store, new in ((self.k[layer], k), (self.v[layer], v)):
            store[rows, :, self.positions] = new[:, :, 0].to(store.dtype)
        return self.k[layer], self.v[layer]
