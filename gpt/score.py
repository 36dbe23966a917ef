"""How likely a model finds given ids: the losses behind perplexity, bits per byte and multiple choice."""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from gpt.errors import GPTError
from gpt.model import GPT


@torch.no_grad()
def id_losses(model: GPT, rows: Sequence[Sequence[int]]) -> list[Tensor]:
    """-log p of every id but the first of each row, in nats: (len(row) - 1,) float32 each, on the CPU.

    Rows of any lengths up to block_size + 1 go through the model as one batch. The model is in eval mode.
    """
    device = model.wte.weight.device
    longest = max(map(len, rows)) - 1
    # Padding goes to the right: a causal model cannot see it from the ids before it.
    padded = torch.tensor([[*row[:-1], *[0] * (longest + 1 - len(row))] for row in rows], device=device)
    losses = []
    for x, row in zip(model.hidden(padded), rows, strict=True):  # (T, C) each: the logits of one row at a time
        logits = F.linear(x[: len(row) - 1], model.head_weight).float()  # (T, V)
        losses.append(F.cross_entropy(logits, torch.tensor(row[1:], device=device), reduction="none").cpu())
    return losses


def windows(n_ids: int, *, length: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(begin, end, first): the model reads ids[begin:end] and is asked for ids[first:end + 1].

    Every id but the very first is asked for exactly once, after at least length - stride ids wherever so many precede it.
    With stride = length these are training's windows. In the terms of transformers' guide to perplexity, where the ids asked
    for lie inside the window, its max_length is length + 1.
    """
    if not 1 <= stride <= length:
        raise GPTError(f"stride {stride}: expected 1 to the window's {length}")
    asked = 1
    for begin in range(0, n_ids, stride):
        end = min(begin + length, n_ids - 1)
        if asked <= end:
            yield begin, end, asked
        asked = end + 1
        if asked >= n_ids:
            return


def text_losses(model: GPT, ids: np.ndarray, *, length: int, stride: int, batch: int) -> Iterator[Tensor]:
    """-log p of ids[1:] in their order, window by window; `batch` windows go through the model at a time.

    ids: (N,), any integer dtype; it may be memory-mapped, only the windows at hand are copied.
    """
    spans = windows(len(ids), length=length, stride=stride)
    while part := list(itertools.islice(spans, batch)):
        losses = id_losses(model, [ids[begin : end + 1].tolist() for begin, end, _ in part])
        for (begin, _, first), row in zip(part, losses, strict=True):
            yield row[first - begin - 1 :]
