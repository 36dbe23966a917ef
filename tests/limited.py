"""train/run.py on a device whose memory ends: python -m tests.limited '[[first, rows], …]' FLAGS…

From the model's call number `first` on (1 is the first), more than `rows` rows at once do not fit; every second refusal comes
in the backward pass. Calls are those that a step or a validation makes, refused ones too.
"""

import json
import sys
from collections.abc import Iterable
from unittest import mock

import torch
from torch import Tensor

import gpt.model
from gpt.model import GPT


class Limited:
    """GPT.forward with a limit on rows; `refused` counts."""

    def __init__(self, limits: Iterable[tuple[int, int]]) -> None:
        self.limits, self.calls, self.refused, self.forward = [tuple(x) for x in limits], 0, 0, GPT.forward

    def __call__(self, model: GPT, ids: Tensor, targets: Tensor | None = None, **options: object) -> Tensor:
        with mock.patch.object(gpt.model, "checkpoint", wraps=gpt.model.checkpoint) as recomputing:
            out = self.forward(model, ids, targets, **options)
        self.calls += 1
        rows = next((rows for first, rows in reversed(self.limits) if self.calls >= first), len(ids))
        if len(ids) <= rows or (rows == 0 and model.recompute and (recomputing.called or not out.requires_grad)):
            return out
        self.refused += 1
        if out.requires_grad and self.refused % 2 == 0:
            out.register_hook(_refuse)
            return out
        _refuse()


def _refuse(grad: Tensor | None = None) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def limit(monkeypatch: object, *limits: tuple[int, int]) -> Limited:
    """The same in this process, for one test."""
    limited = Limited(limits)
    monkeypatch.setattr(GPT, "forward", lambda model, *args, **options: limited(model, *args, **options))
    return limited


if __name__ == "__main__":
    from cli import flags
    from train import run

    limited = Limited(json.loads(sys.argv[1]))
    GPT.forward = lambda model, *args, **options: limited(model, *args, **options)
    flags.run(lambda: run.main(sys.argv[2:]), outlives_stdout=True, at_once=True)
